"""Says what to run when gradclip_ext._C does not match the installed torch.

A compiled extension works only with the torch it was built against. With another one it fails to
load with `undefined symbol`, or worse, loads. So the package calls `check` before it loads `_C`.
"""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import sys
import sysconfig
from collections.abc import Iterable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

_SOURCE_FOLDER = Path(__file__).resolve().parent.parent


class BuildFacts(NamedTuple):
    """What has to match between the build and the interpreter that loads it."""

    torch: str
    cuda: str | None
    cxx11_abi: bool
    python: str


def installed() -> BuildFacts | None:
    """Returns the facts of the installed torch, or None if there is no torch."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return BuildFacts(
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        cxx11_abi=torch.compiled_with_cxx11_abi(),
        python=sysconfig.get_python_version(),
    )


def built_with() -> BuildFacts | None:
    """Returns the facts that the build recorded, or None if the package has not been built."""
    if importlib.util.find_spec("gradclip_ext._built_with") is None:
        return None
    built = importlib.import_module("gradclip_ext._built_with")
    return BuildFacts(built.TORCH_VERSION, built.TORCH_CUDA, built.CXX11_ABI, built.PYTHON)


def problem(
    built: BuildFacts | None, present: BuildFacts | None, has_extension: bool, build_command: str
) -> str | None:
    """Returns why `_C` cannot be loaded, as found, expected and command; None if it can.

    `built` is None if the package has not been built, `present` if there is no torch, and
    `has_extension` tells whether there is a `_C` for the running interpreter.
    """
    if built is None:
        found = "no compiled gradclip_ext._C"
        expected = "one, built against the installed torch"
    elif present is None:
        found = "no torch"
        expected = f"torch {_major_minor(built.torch)}, as gradclip_ext was built against it"
        build_command = f"pip install torch=={_public(built.torch)}"
    else:
        pairs = zip(_compared(present), _compared(built), strict=True)
        differing = [pair for pair in pairs if pair[0] != pair[1]]
        if differing:
            found = ", ".join(pair[0] for pair in differing) + f" (torch {present.torch})"
            expected = ", ".join(pair[1] for pair in differing) + f" (torch {built.torch})"
        elif not has_extension:
            found = "no compiled gradclip_ext._C for this interpreter"
            expected = "one beside gradclip_ext/_built_with.py"
        else:
            return None
    return _text(found, expected, build_command)


def hidden_install(folder: Path, paths: Iterable[str]) -> Path | None:
    """Returns the package, built for this interpreter, that another one in `folder` hides."""
    for path in paths:
        package = Path(path or ".").resolve() / "gradclip_ext"
        if package.parent == folder or not (package / "_built_with.py").is_file():
            continue
        if any((package / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
            return package
    return None


def hidden_problem(folder: Path, hidden: Path) -> str:
    """Returns what to do where the source folder is imported in place of what is installed."""
    return _text(
        f"no compiled gradclip_ext._C in {_quoted(folder / 'gradclip_ext')}, "
        f"which hides the one installed in {_quoted(hidden)}",
        f"the installed one, imported from another folder than {_quoted(folder)}",
        f"gradclip-ext    (in place of python -m gradclip_ext; for other programs: "
        f"{build_command(folder)})",
    )


def check() -> None:
    """Raises ImportError if loading `_C` would fail, with the command that fixes it."""
    has_extension = importlib.util.find_spec("gradclip_ext._C") is not None
    built = built_with()
    message = problem(built, installed(), has_extension, build_command(_SOURCE_FOLDER))
    if built is None or not has_extension:
        hidden = hidden_install(_SOURCE_FOLDER, sys.path)
        if hidden is not None:
            message = hidden_problem(_SOURCE_FOLDER, hidden)
    if message is not None:
        raise ImportError(message, name="gradclip_ext._C")


def build_command(folder: Path) -> str:
    """Returns the command that builds the package in `folder`."""
    if (folder / "setup.py").is_file():
        return f"pip install -e {_quoted(folder)}"
    return "pip install --force-reinstall --no-deps .    (in the source folder of gradclip_ext)"


def _text(found: str, expected: str, command: str) -> str:
    return (
        "gradclip_ext cannot be loaded.\n"
        f"  found:    {found}\n"
        f"  expected: {expected}\n"
        f"  run:      {command}"
    )


def _quoted(path: Path) -> str:
    """Returns a path as a shell takes it."""
    return shlex.quote(str(path))


def _compared(facts: BuildFacts) -> tuple[str, ...]:
    """Returns what has to match; a patch release or a minor version of CUDA does not."""
    return (
        f"Python {facts.python}",
        f"torch {_major_minor(facts.torch)}",
        "no CUDA" if facts.cuda is None else f"CUDA {facts.cuda.partition('.')[0]}",
        "the C++11 ABI" if facts.cxx11_abi else "the C++ ABI before C++11",
    )


def _major_minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _public(version: str) -> str:
    """Returns a version without its local part (+cpu), which package indexes do not have."""
    return version.partition("+")[0]
