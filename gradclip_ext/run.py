"""``python -m gradclip_ext.run``: a program whose gradients are clipped by this package.

Stands between ``python`` and what it runs otherwise:

.. code-block:: bash

    python -m gradclip_ext.run train.py --epochs 3
    python -m gradclip_ext.run -m my_package.train --epochs 3
    torchrun --nproc-per-node 2 -m gradclip_ext.run train.py

Runs a script, a folder or zip file with a ``__main__.py``, or a module as the interpreter does,
with the functions of ``torch.nn.utils`` patched as by :func:`gradclip_ext.patch`. So are the
processes that the program starts. A report on the calls goes to standard error at the end.
"""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import pkgutil
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import NoReturn

from gradclip_ext._processes import patch_and_report

__all__ = ["main"]

_USAGE = """\
usage: python -m gradclip_ext.run SCRIPT [ARGUMENT ...]
       python -m gradclip_ext.run -m MODULE [ARGUMENT ...]

Runs a program with the gradient clipping functions of torch.nn.utils replaced by those of
gradclip_ext, in all its processes, and reports on their calls at the end.

  SCRIPT     a file, or a folder or zip file with a __main__.py
  MODULE     a module or a package, found as by python -m
  ARGUMENT   passed to the program"""


def main(arguments: Sequence[str]) -> None:
    """Run the program that the arguments name; ends as that does."""
    first = arguments[0] if arguments else None
    if first in ("-h", "--help"):
        print(_USAGE)
        return
    program = list(arguments[1:] if first == "-m" else arguments)
    if not program:
        _exit(f"gradclip_ext.run: expected a script, or -m and a module\n{_USAGE}")
    if program[0].startswith("-"):
        _exit(f"gradclip_ext.run: expected a script or -m, found {program[0]!r}\n{_USAGE}")
    sys.argv[:] = program
    main_module = _empty_main_module()
    # For good, since other modules and threads may still ask for it when the program has ended.
    sys.modules["__main__"] = main_module
    try:
        if first == "-m":
            _run_module(program[0])
        else:
            _run_path(program[0], main_module)
    except SystemExit:
        raise
    except BaseException:
        # The interpreter prints it, and ends as after any error or interrupt.
        _leave_out_frames_before(main_module)
        raise


def _empty_main_module() -> ModuleType:
    """What the interpreter makes before it runs a program."""
    module = ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    # Only some versions of Python.
    if "__annotations__" in vars(sys.modules["__main__"]):
        module.__annotations__ = {}
    return module


def _run_module(name: str) -> None:
    if _can_be_run(name):
        patch_and_report()
    # What the interpreter calls for -m. Also has its words for a module that is none.
    runpy._run_module_as_main(name)  # type: ignore[attr-defined]


def _can_be_run(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except Exception:
        return False
    return spec is not None


def _run_path(path: str, main_module: ModuleType) -> None:
    folder_or_zip = pkgutil.get_importer(path)
    if folder_or_zip is not None:
        if folder_or_zip.find_spec("__main__") is not None:
            patch_and_report()
        _set_first_folder(os.path.abspath(path))
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
        return
    file = os.path.abspath(path)
    try:
        code = _compiled(file)
    except OSError as error:
        reason = f"[Errno {error.errno}] {error.strerror}"
        _exit(f"{sys.executable}: can't open file {file!r}: {reason}")
    patch_and_report()
    _set_first_folder(os.path.dirname(os.path.realpath(path)))
    main_module.__dict__.update(
        __file__=file,
        __cached__=None,
        __loader__=SourceFileLoader("__main__", file),
    )
    exec(code, main_module.__dict__)


def _compiled(file: str) -> CodeType:
    with io.open_code(file) as stream:
        code: CodeType | None = pkgutil.read_code(stream)
        if code is None:
            stream.seek(0)
            code = compile(stream.read(), file, "exec", dont_inherit=True)
    return code


def _set_first_folder(folder: str) -> None:
    """Look for modules there in place of where ``python -m`` does, unless told not to."""
    if sys.flags.isolated or getattr(sys.flags, "safe_path", False):
        return
    sys.path[0] = folder


def _leave_out_frames_before(main_module: ModuleType) -> None:
    """Have the error that is being handled printed as if the interpreter ran the program."""
    print_error = sys.excepthook

    def print_from_there(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        own = traceback
        while own is not None and own.tb_frame.f_globals is not main_module.__dict__:
            own = own.tb_next
        # Nothing of the program was run if it has a syntax error.
        if own is not None or isinstance(error, SyntaxError):
            traceback = own
        print_error(kind, error.with_traceback(traceback), traceback)

    sys.excepthook = print_from_there


def _exit(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
