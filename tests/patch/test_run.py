"""python -m gradclip_ext.run: a program runs as the interpreter runs it."""

from __future__ import annotations

import py_compile
import signal
import sys
import zipfile

import pytest
from programs import CLIPPING

SHOW = """
import os, sys
names = {name: value for name, value in globals().items() if name not in ("os", "sys")}
names["__builtins__"] = names["__builtins__"] is sys.modules["builtins"]
for name in ("__loader__", "__spec__"):
    value = names[name]
    names[name] = value and (type(value).__name__, value.name, getattr(value, "origin", None))
print(sorted(names.items()))
print(sys.argv, sys.path, os.getcwd(), vars(sys.modules["__main__"]) is globals())
"""


@pytest.fixture
def same(programs):
    """Runs a program in both ways, and compares all that is seen of it from outside."""

    def compare(*arguments, options=(), **environment):
        expected = programs.python(*options, *arguments, **environment)
        command = [*options, "-m", "gradclip_ext.run", *arguments]
        found = programs.python(*command, **environment)
        error, _, report = found.stderr.partition("gradclip_ext: ")
        assert (found.returncode, found.stdout, error) == (
            expected.returncode,
            expected.stdout,
            expected.stderr,
        )
        return expected, report

    return compare


class TestNames:
    def test_script(self, programs, same):
        programs.write("show.py", SHOW)
        expected, report = same("show.py", "-m", "b c", "--help")
        assert "['show.py', '-m', 'b c', '--help']" in expected.stdout
        assert report.startswith("0 calls seen")

    def test_script_in_a_folder_of_its_own(self, programs, same):
        programs.write("inner/show.py", "from beside import value\n" + SHOW)
        programs.write("inner/beside.py", "value = 1")
        assert same("inner/show.py")[0].returncode == 0

    def test_link_to_a_script(self, programs, same):
        target = programs.write("inner/show.py", "from beside import value\n" + SHOW)
        programs.write("inner/beside.py", "value = 1")
        (programs.folder / "link.py").symlink_to(target)
        assert same("link.py")[0].returncode == 0

    def test_compiled_script(self, programs):
        script = programs.write("show.py", SHOW)
        py_compile.compile(str(script), str(programs.folder / "compiled.pyc"))
        expected, found = programs.python("compiled.pyc"), programs.run("compiled.pyc")
        assert expected.returncode == found.returncode == 0
        # The interpreter alone gives it a loader without sources.
        assert found.stdout.splitlines()[1:] == expected.stdout.splitlines()[1:]

    def test_folder(self, programs, same):
        programs.write("app/__main__.py", "from beside import value\n" + SHOW)
        programs.write("app/beside.py", "value = 1")
        assert same("app", "--help")[0].returncode == 0

    def test_zip_file(self, programs, same):
        with zipfile.ZipFile(programs.folder / "app.zip", "w") as archive:
            archive.writestr("__main__.py", "import sys; print(__name__, sys.argv, sys.path)")
        assert same("app.zip", "a")[0].returncode == 0

    def test_module(self, programs, same):
        programs.write("show.py", SHOW)
        expected, _ = same("-m", "show", "-m", "a")
        assert f"['{programs.folder}/show.py', '-m', 'a']" in expected.stdout

    def test_package(self, programs, same):
        programs.write("package/__init__.py", "value = 1")
        programs.write("package/__main__.py", "from . import value\n" + SHOW)
        assert same("-m", "package", "a")[0].returncode == 0

    @pytest.mark.skipif(sys.version_info < (3, 11), reason="no such option")
    def test_safe_path(self, programs, same):
        programs.write("inner/show.py", SHOW)
        assert same("inner/show.py", options=["-P"])[0].returncode == 0

    def test_future_of_run_is_not_that_of_the_script(self, programs, same):
        programs.write("script.py", "def f(x: int): pass\nprint(f.__annotations__)")
        assert same("script.py")[0].stdout == "{'x': <class 'int'>}\n"


ENDS = {
    "returns": ("pass", 0),
    "sys.exit(3)": ("import sys; sys.exit(3)", 3),
    "sys.exit of a text": ("import sys; sys.exit('that is why')", 1),
    "error": ("def f():\n    raise ValueError('no')\nf()", 1),
    "error while handling another": ("try:\n    1 / 0\nexcept Exception:\n    {}['a']", 1),
    "syntax error": ("a = (\n", 1),
    "excepthook of its own": (
        "import sys\ndef hook(*error): print('mine', error[0], error[2].tb_lineno)\n"
        "sys.excepthook = hook\n{}['a']",
        1,
    ),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", -signal.SIGINT),
    "SIGINT": ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
    "SIGTERM": ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    "os._exit": ("import os; os._exit(5)", 5),
    "threads and what is registered to run at the end": (
        "import atexit, sys, threading, time\n"
        "class Mine: pass\n"
        "def later():\n"
        "    import pickle\n"
        "    print(pickle.loads(pickle.dumps(Mine)) is Mine, sys.modules['__main__'].Mine)\n"
        "atexit.register(later)\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), later())).start()",
        0,
    ),
}


class TestEnds:
    @pytest.mark.parametrize(("text", "code"), ENDS.values(), ids=ENDS)
    def test_as_the_interpreter(self, programs, same, text, code):
        programs.write("script.py", text)
        expected, _ = same("script.py")
        assert expected.returncode == code

    def test_error_in_a_module(self, programs):
        programs.write("script.py", ENDS["error"][0])
        expected, found = programs.python("-m", "script"), programs.run("-m", "script")
        assert (found.returncode, found.stdout) == (1, "")
        # Two lines of runpy are left out too.
        assert "runpy" in expected.stderr
        lines = [line for line in expected.stderr.splitlines() if "runpy" not in line]
        assert found.stderr.splitlines() == lines

    @pytest.mark.parametrize(
        "arguments",
        [
            ["nowhere.py"],
            ["-m", "nowhere"],
            ["-m", "json"],
            ["empty"],
        ],
        ids=" ".join,
    )
    def test_there_is_no_such_program(self, programs, same, arguments):
        (programs.folder / "empty").mkdir()
        expected, report = same(*arguments)
        assert expected.returncode in (1, 2)
        assert report == ""

    def test_script_that_must_not_be_read(self, programs, monkeypatch):
        (programs.folder / "loop.py").symlink_to("loop.py")
        result = programs.run("loop.py")
        assert result.returncode == 2
        assert "loop.py': [Errno 40] Too many levels of symbolic links\n" in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ([], "gradclip_ext.run: expected a script, or -m and a module\nusage: "),
            (["-c", "1"], "gradclip_ext.run: expected a script or -m, found '-c'\nusage: "),
        ],
    )
    def test_wrong_arguments(self, programs, arguments, text):
        result = programs.python("-m", "gradclip_ext.run", *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(text)

    def test_help(self, programs):
        result = programs.run("--help")
        assert (result.returncode, result.stderr, result.report) == (0, "", [])
        assert result.stdout.startswith("usage: python -m gradclip_ext.run SCRIPT [ARGUMENT ...]\n")


class TestReport:
    def test_calls(self, programs):
        programs.write(
            "script.py",
            CLIPPING + "print(clip(5)); clip(2, norm_type=3.0); clip(norm_type=0.5)\n"
            "torch.nn.utils.clip_grad_value_(weight, 0.5)\n"
            "torch.nn.utils.clip_grad_norm_([], 1.0)\n",
        )
        result = programs.run("script.py")
        assert (result.returncode, result.stderr) == (0, "")
        # The patch is there: torch's norm is infinite.
        assert float(result.stdout) == pytest.approx(5e20)
        first, *rest = result.report
        assert first.startswith("gradclip_ext: 10 calls, 70 % native, ")
        assert rest == [
            "clip_grad_norm_ 9, clip_grad_value_ 1",
            "3 went through torch's operations:",
            "2: norm_type 3",
            "1: norm_type 0.5",
        ]

    def test_comes_after_what_the_program_does_at_its_end(self, programs):
        programs.write(
            "script.py", "import atexit, sys\n" + CLIPPING + "atexit.register(clip)\nsys.exit(4)"
        )
        result = programs.run("script.py")
        assert result.returncode == 4
        assert result.report[0].startswith("gradclip_ext: 1 calls, 100 % native, ")

    def test_standard_error_is_closed(self, programs):
        programs.write("script.py", CLIPPING + "import sys; clip(); sys.stderr.close()")
        result = programs.run("script.py")
        assert (result.returncode, result.stdout, result.report) == (0, "", [])

    def test_no_calls(self, programs):
        programs.write("script.py", "print(1)")
        result = programs.run("script.py")
        assert result.report == [
            "gradclip_ext: 0 calls seen",
            "What clips without a call of torch.nn.utils is not reached: DeepSpeed, Megatron, and",
            "FullyShardedDataParallel.clip_grad_norm_ (FSDP1) with sharded parameters.",
            "Calls inside of a compiled graph are not counted.",
        ]

    def test_replaced_by_something_else(self, programs):
        programs.write(
            "script.py",
            CLIPPING + "clip()\ndef theirs(*_): pass\ntorch.nn.utils.clip_grad_norm_ = theirs",
        )
        assert programs.run("script.py").report[-1] == (
            "torch.nn.utils.clip_grad_norm_ was replaced by __main__.theirs: "
            "calls of that are not seen"
        )

    def test_replaced_by_something_else_before(self, programs):
        """As by the entry point of another package, which torch may call before ours."""
        programs.write(
            "sitecustomize.py",
            "import torch\ndef theirs(*_): return 'theirs'\n"
            "torch.nn.utils.clip_grad_value_ = theirs",
        )
        programs.write("script.py", "import torch; print(torch.nn.utils.clip_grad_value_(0))")
        path = f"{programs.folder}:{programs.environment['PYTHONPATH']}"
        result = programs.run("script.py", PYTHONPATH=path)
        problem = (
            "patch: torch.nn.utils.clip_grad_value_ has been replaced by sitecustomize.theirs; "
            "undo that first, or call the functions of gradclip_ext themselves"
        )
        assert (result.returncode, result.stdout) == (0, "theirs\n")
        assert result.report == [
            f"gradclip_ext: not patched: {problem}",
            f"gradclip_ext: 0 calls seen, since torch is not patched: {problem}",
        ]
