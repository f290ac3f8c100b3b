"""Finds the CUDA toolkit and what it can compile for; needs neither torch nor a GPU.

As a script it prints in one line which toolkit it found, and exits with 1 if there is none.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# Older ones lack what the kernels need, or are no longer supported by current compilers.
MINIMUM_ARCHITECTURE = 75
# Where NVIDIA's own installer puts it, without setting any environment variable.
DEFAULT_HOME = Path("/usr/local/cuda")
# However the kernels are compiled. Where a product is fused with a sum is for the source to say, by
# fma(): left to the compiler, two kernels that share a formula could give different bits.
NVCC_OPTIONS = ["-O3", "--expt-relaxed-constexpr", "--fmad=false"]


class Toolkit(NamedTuple):
    """A folder that holds nvcc and the headers."""

    home: Path
    include: Path
    version: str

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"

    @property
    def major(self) -> str:
        return self.version.partition(".")[0]

    def codes(self) -> set[str]:
        """Returns the architectures that nvcc compiles for: sm_75, sm_80, ..."""
        return set(_output([self.nvcc, "--list-gpu-code"]).split())


def find_toolkit(guess: str | None = None, major: str | None = None) -> tuple[Toolkit | None, str]:
    """Returns the toolkit, or None, and in either case a line that says what was found where.

    `guess` is where torch expects it. Of several, the first one of the wanted `major` version is
    taken, else the first. If CUDA_HOME or CUDA_PATH is set, only that folder is looked at.
    """
    found: list[Toolkit] = []
    missing: dict[Path, str] = {}
    for place in _places(guess):
        toolkit = _toolkit_in(place)
        if isinstance(toolkit, str):
            missing[place] = toolkit
            # A wrapper of nvcc on PATH may have the toolkit that it wraps beside it.
            toolkit = _toolkit_in(place / "cuda")
        if isinstance(toolkit, Toolkit):
            found.append(toolkit)
    fitting = [toolkit for toolkit in found if toolkit.major == major]
    for toolkit in fitting or found:
        return toolkit, f"CUDA toolkit {toolkit.version} in {toolkit.home}"
    if not missing:
        return None, "no CUDA toolkit was found: no nvcc on PATH, CUDA_HOME is not set"
    places = ", ".join(f"{home} has no {what}" for home, what in missing.items())
    return None, f"no CUDA toolkit was found: {places}"


def architecture_list(torch_flags: str, codes: Iterable[str]) -> str:
    """Returns the architectures that torch is built for, as in TORCH_CUDA_ARCH_LIST.

    `torch_flags` is what torch._C._cuda_getArchFlags() returns, `codes` what nvcc can compile for.
    The highest is also built as PTX, which the driver compiles for newer GPUs. Raises ValueError if
    none is left.
    """
    numbers = {int(number) for number in re.findall(r"\bsm_(\d+)\b", torch_flags)}
    supported = set(codes)
    kept = [n for n in sorted(numbers) if n >= MINIMUM_ARCHITECTURE and f"sm_{n}" in supported]
    if not kept:
        raise ValueError(
            f"torch is built for {torch_flags.strip() or 'no architecture'}, and nvcc compiles for "
            f"none of these from sm_{MINIMUM_ARCHITECTURE} on"
        )
    return ";".join(f"{n // 10}.{n % 10}" for n in kept) + "+PTX"


def jobs() -> int:
    """Returns how many compilers may run at once; as in torch, a bad MAX_JOBS is ignored."""
    asked = os.environ.get("MAX_JOBS", "")
    return max(int(asked), 1) if asked.isdigit() else os.cpu_count() or 1


def _places(guess: str | None) -> list[Path]:
    """Returns the folders to look at, the most reliable first."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return [Path(named)]
    places = []
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        places.append(Path(nvcc).resolve().parent.parent)
        # A wrapper can be anywhere, but nvcc itself knows its own folder.
        plan = _output([nvcc, "--dryrun", "-x", "cu", os.devnull])
        top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
        if top is not None:
            places.append(Path(top[1].strip()).resolve())
    if guess:
        places.append(Path(guess))
    if DEFAULT_HOME.exists():
        places.append(DEFAULT_HOME)
    return places


def _toolkit_in(home: Path) -> Toolkit | str:
    """Returns the toolkit whose folder is `home`, or what is missing there."""
    nvcc = home / "bin" / "nvcc"
    if not nvcc.is_file():
        return "bin/nvcc"
    include = _include(home)
    if include is None:
        return "include/cuda_runtime.h"
    version = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"]))
    if version is None:
        return "bin/nvcc that works"
    return Toolkit(home.resolve(), include.resolve(), version[1])


def _include(home: Path) -> Path | None:
    """Returns the folder of the headers; conda has them only in the folder of the target."""
    target = "sbsa" if platform.machine() == "aarch64" else platform.machine()
    for folder in (home / "include", home / "targets" / f"{target}-linux" / "include"):
        if (folder / "cuda_runtime.h").is_file():
            return folder
    return None


def _output(command: list[str | Path]) -> str:
    """Returns what a command prints, or an empty string if it cannot be run."""
    try:
        answer = subprocess.run(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return answer.stdout


if __name__ == "__main__":
    toolkit, line = find_toolkit()
    print(line)
    sys.exit(toolkit is None)
