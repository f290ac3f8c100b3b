"""The patch in the processes that a program starts, and the one report on all of their calls."""

from __future__ import annotations

import importlib.metadata
import re
import tempfile
from pathlib import Path

import pytest
from programs import CLIPPING, ENTRY_POINT

IS_OURS = CLIPPING + "print(clip() < float('inf'))\n"
PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"

# Of other processes, which take the same way on every build.
pytestmark = pytest.mark.install

MULTIPROCESSING = (
    CLIPPING
    + """
import multiprocessing, os, sys
def work(count):
    print(clip(count) < float("inf"))
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    clip(100)
    started = [context.Process(target=work, args=(count,)) for count in (10, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0]
"""
)


@pytest.fixture(autouse=True)
def no_file_left(programs):
    # Of a short name, since sockets are put there too.
    with tempfile.TemporaryDirectory() as folder:
        programs.environment["TMPDIR"] = folder
        yield
        assert list(Path(folder).glob("gradclip_ext-*")) == []


class TestProcesses:
    def test_started_by_a_program(self, programs):
        programs.write("child.py", IS_OURS + "clip(2)")
        programs.write(
            "script.py",
            "import subprocess, sys\nfor _ in range(2):\n"
            "    subprocess.run([sys.executable, 'child.py'], check=True)",
        )
        result = programs.run("script.py")
        assert (result.returncode, result.stdout, result.stderr) == (0, "True\nTrue\n", "")
        assert result.report[0].startswith("gradclip_ext: 6 calls in 2 processes, 100 % native, ")
        assert result.report[1:] == ["clip_grad_norm_ 6"]

    @pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
    def test_of_multiprocessing(self, programs, method):
        programs.write("script.py", MULTIPROCESSING)
        result = programs.run("script.py", method)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == "True\nTrue\n"
        assert result.report[0].startswith("gradclip_ext: 111 calls in 3 processes, 100 % native, ")

    def test_forked(self, programs):
        programs.write(
            "script.py",
            "import os\n"
            + IS_OURS
            + "if os.fork() == 0:\n    clip(10)\nelse:\n    os.wait()\n    clip(100)",
        )
        result = programs.run("script.py")
        assert result.returncode == 0
        assert result.report[0].startswith("gradclip_ext: 111 calls in 2 processes, ")
        assert len(result.report) == 2

    def test_that_run_again(self, programs):
        """A program under gradclip_ext.run that starts another one under it."""
        programs.write("child.py", IS_OURS)
        programs.write(
            "script.py",
            CLIPPING + "import subprocess, sys\nclip()\n"
            "subprocess.run([sys.executable, '-m', 'gradclip_ext.run', 'child.py'], check=True)",
        )
        result = programs.run("script.py")
        assert (result.returncode, result.stdout) == (0, "True\n")
        assert result.report[0].startswith("gradclip_ext: 2 calls in 2 processes, ")
        assert len(result.report) == 2

    def test_program_that_replaces_itself(self, programs):
        programs.write(
            "script.py",
            CLIPPING + "import os, sys\nclip()\n"
            "if 'AGAIN' not in os.environ:\n    os.environ['AGAIN'] = 'yes'\n"
            "    os.execv(sys.executable, [sys.executable, *sys.argv])\nclip()",
        )
        result = programs.run("script.py")
        assert result.returncode == 0
        # Those of the first are lost.
        assert result.report[0].startswith("gradclip_ext: 2 calls, 100 % native, ")

    def test_program_that_clears_its_environment(self, programs):
        programs.write("script.py", CLIPPING + "import os; clip(); os.environ.clear()")
        result = programs.run("script.py")
        assert (result.returncode, result.stderr) == (0, "")
        assert result.report[0].startswith("gradclip_ext: 1 calls, 100 % native, ")

    def test_not_patched_because_of_a_setting_of_torch(self, programs):
        programs.write("child.py", IS_OURS)
        programs.write(
            "script.py", "import subprocess, sys; subprocess.run([sys.executable, 'child.py'])"
        )
        result = programs.run("script.py", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
        assert result.stdout == "False\n"
        assert result.report[-1] == (
            "Only this process was patched, since TORCH_DEVICE_BACKEND_AUTOLOAD is set."
        )


RANKS = """
import os, torch, torch.distributed
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
weight = torch.nn.Parameter(torch.zeros(2))
weight.grad = torch.tensor([1e20, 2e20]) * (1 + rank)
torch.distributed.all_reduce(weight.grad)
norm = torch.nn.utils.clip_grad_norm_(weight, 1.0).item()
open(f"{rank}.txt", "w").write(str(norm))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


class TestRanks:
    @pytest.mark.parametrize("outside", [False, True], ids=["torchrun runs it", "it runs torchrun"])
    def test_one_report(self, programs, outside):
        programs.write("train.py", RANKS)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        ours = ["-m", "gradclip_ext.run"]
        command = [*ours, *launch, "train.py"] if outside else [*launch, *ours, "train.py"]
        result = programs.python(*command)
        assert result.returncode == 0, result.stderr
        for rank in (0, 1):
            norm = float((programs.folder / f"{rank}.txt").read_text())
            assert norm == pytest.approx(3e20 * 5**0.5)
        # Each rank has one call; without the launcher around it, the first reports its own.
        reports = re.findall("gradclip_ext: (.*?), 100 % native", result.stderr)
        assert reports == ["2 calls in 2 processes" if outside else "1 calls"]
        assert result.stderr.count("gradclip_ext: ") == 1


class TestWhenTorchIsImported:
    @pytest.mark.parametrize("first", ["torch", "gradclip_ext", "torch.optim", "gradclip_ext.amp"])
    @pytest.mark.parametrize("value", ["1", "0"])
    def test_whatever_is_imported_first(self, programs, first, value):
        code = f"import {first}\n{IS_OURS}"
        result = programs.python("-c", code, GRADCLIP_EXT_PATCH=value)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == f"{value == '1'}\n"

    def test_nothing_is_imported_without_the_variable(self, programs):
        result = programs.python(
            "-c",
            "import sys\nbefore = set(sys.modules)\nimport gradclip_ext_autoload\n"
            "gradclip_ext_autoload.load()\nprint(sorted(set(sys.modules) - before))",
        )
        assert result.stdout == "['gradclip_ext_autoload']\n"

    def test_package_that_cannot_be_imported(self, programs):
        programs.write("gradclip_ext/__init__.py", "raise ImportError('built for another torch')")
        path = f"{programs.folder}:{programs.environment['PYTHONPATH']}"
        result = programs.python("-c", IS_OURS, GRADCLIP_EXT_PATCH="1", PYTHONPATH=path)
        assert (result.returncode, result.stdout) == (0, "False\n")
        assert result.stderr == (
            "gradclip_ext: GRADCLIP_EXT_PATCH=1 is set, but torch's own functions stay in place: "
            "built for another torch\n"
        )

    def test_something_else_was_there_before(self, programs):
        code = (
            "import torch\ntorch.nn.utils.get_total_norm = print\nimport gradclip_ext\n" + IS_OURS
        )
        result = programs.python(
            "-c", code, GRADCLIP_EXT_PATCH="1", TORCH_DEVICE_BACKEND_AUTOLOAD="0"
        )
        assert (result.returncode, result.stdout) == (0, "False\n")
        assert result.stderr.startswith(
            "gradclip_ext: not patched: patch: torch.nn.utils.get_total_norm has been replaced by "
            "<built-in function print>"
        )

    def test_entry_point_that_is_registered(self):
        group, line = ENTRY_POINT.splitlines()
        registered = f'[project.entry-points."{group[1:-1]}"]\n{line}\n'
        assert registered in PYPROJECT.read_text(encoding="utf-8")
        installed = importlib.metadata.entry_points(group="torch.backends", name="gradclip_ext")
        assert {point.value for point in installed} <= {"gradclip_ext_autoload:load"}
