"""Stands in for the C++ compiler in a build that a test starts; compiles as compiled.py does."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from compiled import compiler, object_file


def main(arguments: list[str]) -> None:
    if "-c" not in arguments:
        os.execv(compiler(), [compiler(), *arguments])
    options: list[str] = []
    folders: list[Path] = []
    files: dict[str, Path] = {}
    rest = iter(arguments)
    for argument in rest:
        if argument in ("-o", "-MF"):
            files[argument] = Path(next(rest))
        elif argument.endswith(".cpp"):
            files["source"] = Path(argument)
        elif argument.startswith("-I"):
            folders.append(Path(argument[2:]))
        elif argument not in ("-c", "-MMD"):
            options.append(argument)
    # The others are those of Python, which count as headers of the system.
    own = [folder for folder in folders if files["source"].is_relative_to(folder)]
    system = [str(folder) for folder in folders if folder not in own]
    shutil.copyfile(object_file(files["source"], options, own, system), files["-o"])
    # Ninja reads here what the object file depends on; it will not build this again.
    files["-MF"].write_text(f"{files['-o']}:\n", encoding="utf-8")


main(sys.argv[1:])
