"""Compiles C++ for the tests, each file once for all test runs and all their processes.

An object file lies in build/tests under a hash of everything that decides what it holds: compiler,
options, the source and the headers that it has included, whatever folder those lie in. So what has
not changed is not compiled again, and what has changed always is.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

STORE = Path(__file__).resolve().parents[1] / "build" / "tests"
UNUSED_SECONDS = 7 * 24 * 3600


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("needs a C++ compiler")
    return found


def object_file(
    source: Path,
    options: Sequence[str],
    folders: Sequence[Path],
    system: Sequence[str] = (),
    command: str | None = None,
) -> Path:
    """The source as an object file, which nobody may change.

    `folders` are searched for headers, and have to hold the source; `system` after them, for the
    headers of torch and Python, whose versions stand for their contents. `command` is a compiler
    for another machine.
    """
    command = command or compiler()
    place = hashlib.sha256()
    # A new file may be found where another was, so their names count as well.
    names = [
        _name(path, folders)
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix not in (".py", ".pyc")
    ]
    for part in (
        _version(command),
        importlib.metadata.version("torch"),
        *system,
        *options,
        *names,
    ):
        place.update(f"{part}\0".encode())
    place.update(_name(source, folders).encode())
    # What the source included when it was last compiled.
    includes = STORE / f"{place.hexdigest()[:32]}.includes"
    while True:
        found = _stored(includes, folders)
        if found is not None and found.exists():
            for used in (found, includes):
                os.utime(used)
            return found
        with _locked(found or includes):
            # Another process may have compiled it in the meantime.
            if _stored(includes, folders) == found and not (found and found.exists()):
                call = [command, *options, *_flags(folders, system)]
                _compile(call, source, includes, folders)


def linked(
    target: Path, objects: Sequence[Path], options: Sequence[str], command: str | None = None
) -> Path:
    subprocess.run([command or compiler(), *objects, *options, "-o", target], check=True)
    return target


@contextlib.contextmanager
def shared_folder(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> Iterator[tuple[Path, bool]]:
    """A folder for all processes of this test run, and whether it is still to be filled."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with _locked(folder):
        filled = folder / ".filled"
        folder.mkdir(exist_ok=True)
        yield folder, not filled.exists()
        filled.touch()


def _compile(call: Sequence[str], source: Path, includes: Path, folders: Sequence[Path]) -> None:
    partial = includes.with_suffix(f".{os.getpid()}.{time.monotonic_ns()}")
    rule = partial.with_suffix(f"{partial.suffix}d")
    try:
        subprocess.run([*call, "-MMD", "-MF", rule, "-c", source, "-o", partial], check=True)
        # As a rule of make: the target, a colon, and the files, in lines that end in backslashes.
        files = shlex.split(rule.read_text(encoding="utf-8").replace("\\\n", " "))[1:]
        rule.write_text("\n".join(_name(Path(file), folders) for file in files), encoding="utf-8")
        stored = _stored(rule, folders, includes.stem)
        assert stored is not None
        partial.replace(stored)
        rule.replace(includes)
    finally:
        partial.unlink(missing_ok=True)
        rule.unlink(missing_ok=True)
    for file in STORE.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > UNUSED_SECONDS:
                file.unlink()


def _stored(includes: Path, folders: Sequence[Path], place: str | None = None) -> Path | None:
    """Where the object file of the files as they are now lies, if it does."""
    content = hashlib.sha256((place or includes.stem).encode())
    try:
        for name in includes.read_text(encoding="utf-8").splitlines():
            number, path = name.split(":", 1)
            content.update(f"{name}\0".encode() + (folders[int(number)] / path).read_bytes())
    except FileNotFoundError:
        return None
    return STORE / f"{content.hexdigest()[:32]}.o"


def _flags(folders: Sequence[Path], system: Sequence[str]) -> list[str]:
    return [*(f"-I{folder}" for folder in folders), *(f"-isystem{folder}" for folder in system)]


def _name(file: Path, folders: Sequence[Path]) -> str:
    """The file's path in the first of the folders that holds it, after that folder's number."""
    for number, folder in enumerate(folders):
        if file.is_relative_to(folder):
            return f"{number}:{file.relative_to(folder)}"
    raise ValueError(f"{file} lies in none of {[str(folder) for folder in folders]}")


@functools.cache
def _version(command: str) -> str:
    result = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    return f"{command} {result.stdout}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
