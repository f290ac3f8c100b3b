"""tools/gpu_check.sh, over an interpreter and tools that are made up, and as a dry run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
# What a caller keeps of the output.
CHARACTERS = 12_000
# Stands for python, compute-sanitizer and bench/cuda/run.sh: notes how it was called, then prints
# and fails as `behavior` says for that step.
STUB = """\
#!{python}
import json, os, pathlib, sys, time
folder = pathlib.Path({folder!r})
name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
steps = {{
    "-c": "probe", "setup.py": "build", "-m gradclip_ext": "report", "-m pytest": "tests",
    "bench/clip.py": "bench", "bench/plot.py": "plots", "tools/gpu_sanitize.py": "sanitize",
}}
step = name if name != "python" else next(
    steps[key] for key in steps if " ".join(arguments).startswith(key)
)
if name == "compute-sanitizer" and arguments == ["--help"]:
    print((folder / "sanitizer_help").read_text())
    sys.exit()
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps([step, arguments, dict(os.environ)]) + "\\n")
if step == "probe":
    print("capability 9.0")
if step == "bench":
    pathlib.Path(arguments[arguments.index("--output") + 1]).write_text("{{}}")
if step == "run.sh":
    pathlib.Path(arguments[0]).write_text("")
if step == "plots":
    for plot in ("bytes", "error", "speedup", "tensors"):
        pathlib.Path(arguments[0].replace(".json", f"-{{plot}}.png")).write_text("")
behavior = json.loads((folder / "behavior").read_text()).get(step, {{}})
print(behavior.get("print", f"{{step}} was here"), flush=True)
time.sleep(behavior.get("sleep", 0))
sys.exit(behavior.get("exit", 0))
"""


class Outcome(NamedTuple):
    """How a run of the script ended."""

    status: int
    text: str
    # Step, arguments and environment of each call.
    calls: list[tuple[str, list[str], dict[str, str]]]
    out: Path

    @property
    def steps(self) -> list[str]:
        return [step for step, _, _ in self.calls]

    @property
    def summary(self) -> str:
        return (self.out / "summary.txt").read_text()

    def log(self, name: str) -> str:
        with tarfile.open(self.out / "logs.tar.gz") as archive:
            member = archive.extractfile(f"./{name}.log")
            assert member is not None
            return member.read().decode()

    def arguments(self, step: str) -> list[str]:
        (found,) = [arguments for name, arguments, _ in self.calls if name == step]
        return found


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the script in a repository of stubs."""
    folder = tmp_path / "clone with a space"
    for place in ("tools", "bench/cuda", "bin"):
        (folder / place).mkdir(parents=True)
    shutil.copy(SCRIPT, folder / "tools")
    stub = STUB.format(python=sys.executable, folder=str(folder))
    for name in ("python", "compute-sanitizer", "run.sh"):
        (folder / "bin" / name).write_text(stub)
        (folder / "bin" / name).chmod(0o755)
    (folder / "bench" / "cuda" / "run.sh").write_text(f'"{folder}/bin/run.sh" "$@"')
    (folder / "sanitizer_help").write_text("  --kernel-name arg      key1=val1,...")
    return folder


@pytest.fixture
def check(clone: Path, tmp_path: Path) -> Callable[..., Outcome]:
    def run(*options: str, out: Path = tmp_path / "new" / "out", **behavior: Any) -> Outcome:
        (clone / "behavior").write_text(json.dumps(behavior))
        (clone / "calls").write_text("")
        environment = {**os.environ, "PATH": f"{clone / 'bin'}:{os.environ['PATH']}"}
        for name in ("TORCH_CUDA_ARCH_LIST", "PYTHONPATH"):
            environment.pop(name, None)
        result = subprocess.run(
            [clone / "tools" / "gpu_check.sh", *options, out],
            env={**environment, "PYTHON": "python"},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            # As in a shell that runs in the background, whose children ignore interrupts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
        calls = [tuple(json.loads(line)) for line in (clone / "calls").read_text().splitlines()]
        assert len(result.stdout) < 2 * CHARACTERS
        return Outcome(result.returncode, result.stdout, calls, out)

    return run


def test_the_most_valuable_steps_come_first(check: Callable[..., Outcome], clone: Path) -> None:
    outcome = check()
    assert outcome.status == 0, outcome.text
    assert outcome.steps == ["probe", "build", "report", "tests", "bench", "plots"]
    for _, _, environment in outcome.calls:
        assert environment["PYTHONPATH"] == str(clone)
    _, arguments, environment = outcome.calls[1]
    assert arguments == ["setup.py", "build_ext", "--inplace"]
    assert environment["GRADCLIP_CUDA"] == "1"
    assert environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    tests = " ".join(outcome.arguments("tests"))
    assert "-m cuda" in tests and "-n 6" in tests and "--borrowed 30" in tests
    path = str(outcome.out / "clip-gpu.json")
    assert outcome.arguments("bench") == [
        *("bench/clip.py", "--suite", "gpu", "--device", "cuda", "--output", path)
    ]
    assert outcome.arguments("plots") == ["bench/plot.py", path]


def test_sweep_comes_before_the_sanitizers(check: Callable[..., Outcome], clone: Path) -> None:
    outcome = check("--sweep")
    assert outcome.status == 0, outcome.text
    sanitizers = ["compute-sanitizer"] * 4
    assert outcome.steps == ["probe", "run.sh", "build", "report", *sanitizers]
    path, option, seconds = outcome.arguments("run.sh")
    assert (path, option) == (str(outcome.out / "sweep.csv"), "--seconds")
    limit = re.search(r"^sweep .* of (\d+) s ", outcome.summary, re.M)
    # The rest is for compiling it.
    assert limit is not None and 0 < int(seconds) <= int(limit[1]) - 60
    script = ["python", "tools/gpu_sanitize.py"]
    options = {}
    for step, arguments, environment in outcome.calls:
        if step == "compute-sanitizer":
            assert arguments[-2:] == script
            options[arguments[1]] = " ".join(arguments[2:-2])
            assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert list(options) == ["memcheck", "racecheck", "initcheck", "synccheck"]
    for tool, found in options.items():
        assert "--error-exitcode 1" in found
        assert ("--report-api-errors no" in found) == (tool == "memcheck")
        # It has to see what torch's kernels write.
        assert ("--kernel-name kns=gradclip" in found) == (tool != "initcheck")
    (clone / "sanitizer_help").write_text("  --filter arg      key1=val1,...")
    older = check("--sweep")
    assert not any("--kernel-name" in arguments for _, arguments, _ in older.calls)


@pytest.mark.parametrize("mode", [[], ["--sweep"]], ids=["main", "sweep"])
def test_limits_and_files(check: Callable[..., Outcome], mode: list[str]) -> None:
    outcome = check(*mode)
    limits = [int(limit) for limit in re.findall(r"\d+ of (\d+) s", outcome.summary)]
    grace = re.search(r"^GRACE=(\d+)$", SCRIPT.read_text(), re.MULTILINE)
    # Every step of the run has one.
    assert grace is not None and len(limits) == len(outcome.steps)
    assert sum(limits) + len(limits) * int(grace[1]) < 540
    files = [path.name for path in outcome.out.rglob("*")]
    assert {"summary.txt", "logs.tar.gz"} <= set(files)
    assert len(files) <= 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in files)


def test_a_failing_step_does_not_stop_the_others(check: Callable[..., Outcome]) -> None:
    failures = [f"tests/test_a.py::test_{i} - assert 1 == 2" for i in range(9)]
    named = "\n".join(f"!! {failure}" for failure in failures)
    outcome = check(
        tests={"print": f"..F\n{named}\nE   assert 1 == 2\n9 failed in 3 s", "exit": 1},
        bench={"print": "workload  torch us\nsmall  12.0"},
        plots={"print": "no rows", "exit": 2},
    )
    assert outcome.status == 1
    assert outcome.steps[-3:] == ["tests", "bench", "plots"]
    assert re.search(r"^tests +FAILED \(1\) +\d+ of \d+ s +9 failed in 3 s$", outcome.summary, re.M)
    assert re.search(r"^bench +ok ", outcome.summary, re.M)
    # At the end, where people look: what failed, the figures, the summary.
    order = [
        "== plots\nno rows",
        "== tests\n" + "\n".join(failures),
        "== bench\nworkload",
        "== summary\n",
    ]
    places = [outcome.text.index(text) for text in order]
    assert places == sorted(places)
    assert outcome.text.endswith(outcome.summary)
    assert outcome.log("tests").startswith("..F\n")


def test_the_end_of_the_output_has_it_all(check: Callable[..., Outcome]) -> None:
    failed = "\n".join(f"!! tests/test_a.py::test_{i} - {'x' * 500}" for i in range(2000))
    table = "\n".join(f"{f'row {i}':160}" for i in range(25))
    outcome = check(
        tests={"print": f"{failed}\n2000 failed", "exit": 1},
        bench={"print": table},
        report={"print": "y" * 50_000, "exit": 1},
        plots={"print": "z" * 50_000, "exit": 1},
    )
    end = outcome.text[-CHARACTERS:]
    assert end.endswith(outcome.summary)
    for text in ("test_a.py::test_0 - xxx", "test_a.py::test_5 - xxx", "yyy", "zzz"):
        assert text in end
    for i in range(25):
        assert f"row {i} " in end


def test_a_failed_build_ends_it(check: Callable[..., Outcome]) -> None:
    outcome = check(build={"print": "nvcc 12.0 cannot compile for sm_120", "exit": 1})
    assert outcome.status == 1
    assert outcome.steps == ["probe", "build"]
    assert "== build\nnvcc 12.0 cannot compile for sm_120\n" in outcome.text
    assert re.search(r"^build +FAILED \(1\) ", outcome.summary, re.M)


def test_a_gpu_that_the_build_does_not_cover_ends_it(check: Callable[..., Outcome]) -> None:
    text = "cuda:0 is 9.0, NOT COVERED: build again with TORCH_CUDA_ARCH_LIST=9.0"
    outcome = check(report={"print": f"All 9 checks passed.\n{text}", "exit": 1})
    assert outcome.status == 1
    assert outcome.steps == ["probe", "build", "report"]
    assert re.search(rf"^report +FAILED \(1\) .* {re.escape(text)}$", outcome.summary, re.M)
    # Any other failure of the report does not.
    assert check(report={"print": "1 of 18 checks failed", "exit": 1}).steps[-1] == "plots"


def test_without_a_gpu_there_is_one_clear_line(check: Callable[..., Outcome]) -> None:
    outcome = check(probe={"print": "torch 2.11.0 in /torch finds no GPU", "exit": 1})
    assert outcome.status == 2
    assert outcome.steps == ["probe"]
    (line,) = outcome.text.splitlines()
    assert line.endswith("torch 2.11.0 in /torch finds no GPU")
    assert outcome.summary == outcome.text


def test_the_probe_itself_finds_no_gpu(tmp_path: Path) -> None:
    result = subprocess.run(
        [SCRIPT, tmp_path / "out"],
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    (line,) = result.stdout.splitlines()
    assert line.endswith("finds no GPU")
    assert result.stderr == ""


def test_a_folder_that_cannot_be_written_is_one_clear_line(
    check: Callable[..., Outcome], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    outcome = check(out=tmp_path / "file" / "out")
    assert outcome.status == 2
    assert outcome.text == f"gpu_check: cannot write to {tmp_path}/file/out\n"
    assert outcome.calls == []


@pytest.mark.parametrize("arguments", [[], ["--fast", "out"], ["one", "two"], [""]])
def test_usage(arguments: list[str]) -> None:
    result = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "usage: tools/gpu_check.sh [--sweep] [--dry-run] OUT\n"


def test_what_is_missing_is_told_and_leaves_the_rest(check: Callable[..., Outcome]) -> None:
    def lacking(*names: str) -> Outcome:
        missing = "\n".join(f"missing {name}" for name in names)
        return check(probe={"print": f"{missing}\nGPU, 9.0; torch"})

    outcome = lacking("hypothesis", "xdist")
    assert outcome.status == 0
    assert "hypothesis xdist: tests that need one of them are skipped" in outcome.summary
    assert "-n" not in outcome.arguments("tests")
    outcome = lacking("matplotlib", "pytest")
    assert outcome.status == 1
    assert outcome.steps == ["probe", "build", "report", "bench"]
    assert re.search(r"^tests +not run +pytest is not installed$", outcome.summary, re.M)
    assert re.search(r"^plots +not run +matplotlib is not installed$", outcome.summary, re.M)
    outcome = lacking("tqdm")
    assert outcome.steps == ["probe", "build", "report", "tests"]
    assert re.search(r"^plots +not run +nothing was measured$", outcome.summary, re.M)


def test_a_step_that_takes_too_long_says_where_it_stood(
    check: Callable[..., Outcome], clone: Path
) -> None:
    script = clone / "tools" / "gpu_check.sh"
    script.write_text(re.sub(r"\[tests\]=\d+", "[tests]=2", script.read_text()))
    outcome = check(tests={"sleep": 60})
    assert outcome.status == 1
    assert re.search(r"^tests +TIMED OUT +[2-9] of 2 s ", outcome.summary, re.M)
    assert "time.sleep(" in outcome.log("tests") and "KeyboardInterrupt" in outcome.log("tests")
    assert outcome.steps[-2:] == ["bench", "plots"]


def test_results_of_an_earlier_run_do_not_stay(check: Callable[..., Outcome]) -> None:
    check("--sweep")
    assert (check().out / "sweep.csv").exists() is False
    outcome = check("--sweep", **{"run.sh": {"exit": 1}})
    assert re.search(r"^sweep +FAILED \(1\) ", outcome.summary, re.M)
    assert not list(outcome.out.glob("clip-gpu*"))
    # The sanitizers do not need it.
    assert outcome.steps.count("compute-sanitizer") == 4


@pytest.mark.install
@pytest.mark.parametrize(
    ("mode", "steps"),
    [
        ([], ["probe", "build", "report", "tests", "bench", "plots"]),
        (
            ["--sweep"],
            ["probe", "sweep", "build", "report"]
            + ["memcheck", "racecheck", "initcheck", "synccheck"],
        ),
    ],
    ids=["main", "sweep"],
)
def test_dry_run(tmp_path: Path, mode: list[str], steps: list[str]) -> None:
    """Imports, collects and compiles all that the run on a GPU needs."""
    if mode and subprocess.run([sys.executable, ROOT / "tools" / "find_cuda.py"]).returncode:
        pytest.skip("needs a CUDA toolkit")
    out = tmp_path / "out"
    result = subprocess.run(
        [SCRIPT, *mode, "--dry-run", out],
        env={**os.environ, "PYTHON": sys.executable},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = (out / "summary.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == steps
    assert [line.split()[1] for line in lines] == ["ok"] * len(steps), result.stdout
    assert (result.returncode, result.stderr) == (0, "")
    if not mode:
        (collected,) = [line for line in lines if line.startswith("tests ")]
        tests = re.search(r"(\d+)/\d+ tests collected", collected)
        assert tests is not None and int(tests[1]) > 1000
        assert {path.name for path in out.iterdir()} == {
            *("summary.txt", "logs.tar.gz", "clip-gpu.json"),
            *(f"clip-gpu-{plot}.png" for plot in ("bytes", "error", "speedup", "tensors")),
        }
