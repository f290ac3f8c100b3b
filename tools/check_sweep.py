"""Checks what nvcc makes of the variants in bench/cuda, as check_kernels.py does of csrc.

A variant that spills, or has fewer loads in flight than its name says, would lose for a reason that
is none of its own. Compiles for Hopper and Blackwell by default; needs no GPU.

usage: python tools/check_sweep.py [--verbose] [sm_90 ...]
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import check_kernels
import find_cuda
from check_kernels import Instruction, Resources, Row

ARCHITECTURES = ["sm_90", "sm_100"]
SOURCES = [
    check_kernels.ROOT / "bench/cuda" / name
    for name in ("measuring.cu", "scaling.cu", "small_lists.cu")
]


class Kernel(NamedTuple):
    """What is to be seen of a kernel in its machine code, apart from what holds for all."""

    # Over whole runs, per dtype.
    loops: int = 1
    # The place of the number of loads in flight among the arguments of the template.
    loads_at: int | None = None
    waits: bool = False
    triggers: bool = False
    # The place of the argument without which there is no memory of other blocks.
    cluster_at: int | None = None


KERNELS = {
    "measure_tiles_kernel": Kernel(loads_at=1),
    "scale_tiles_kernel": Kernel(loads_at=1, waits=True),
    "scale_after_prologue_kernel": Kernel(waits=True),
    # kNever, kFirst, kLast.
    "measure_before_trigger_kernel": Kernel(triggers=True),
    "clip_by_teams_kernel": Kernel(loops=2, cluster_at=3),
}


def arguments_of(mangled: str) -> list[int]:
    """Returns the numbers among the arguments of the template, in order."""
    _, _, arguments = mangled.partition("_kernelI")
    return [int(number) for number in re.findall(r"L(?:b|i|N\w+?E)(\d+)E", arguments)]


def label_of(mangled: str) -> str:
    """Returns the name with these numbers."""
    name = check_kernels.name_of(mangled).removesuffix("_kernel")
    return f"{name}<{', '.join(map(str, arguments_of(mangled)))}>"


def loads_of(mangled: str) -> int:
    """Returns how many loads the variant is to have in flight."""
    place = KERNELS[check_kernels.name_of(mangled)].loads_at
    return check_kernels.LOADS if place is None else arguments_of(mangled)[place]


def violations(mangled: str, resources: Resources, instructions: list[Instruction]) -> list[str]:
    """Returns a description of each rule that a variant breaks."""
    kernel = KERNELS[check_kernels.name_of(mangled)]
    arguments = arguments_of(mangled)
    kinds = {instruction.kind for instruction in instructions}
    found = check_kernels.memory_faults(resources, instructions)
    # The shared memory of another block is read as memory of unknown kind.
    allowed = {"LD"} if kernel.cluster_at is not None and arguments[kernel.cluster_at] else set()
    found += [f"{kind}: memory of unknown kind" for kind in sorted(kinds & {"LD", "ST"} - allowed)]
    loads = loads_of(mangled)
    wanted = kernel.loops * check_kernels.DTYPES
    groups = check_kernels.groups_in_flight(instructions, loads)
    if groups < wanted:
        found.append(f"{groups} loops with {loads} loads in flight, not {wanted}")
    if not any(map(check_kernels.reads_table, instructions)):
        found.append("the table is not read from the constant bank")
    if (check_kernels.TRIGGER in kinds) != (kernel.triggers and arguments[0] != 0):
        found.append(f"{check_kernels.TRIGGER}: there, or not there, as it should not be")
    if kernel.waits:
        found += check_kernels.before_wait(instructions)
    return found


def check(
    toolkit: find_cuda.Toolkit, cuobjdump: Path, architecture: str, source: Path, folder: Path
) -> list[Row]:
    """Compiles a file for one architecture and returns a row for each kernel."""
    return [
        Row(
            label_of(mangled),
            architecture,
            resources,
            check_kernels.groups_in_flight(instructions, loads_of(mangled)),
            violations(mangled, resources, instructions),
        )
        for mangled, (resources, instructions) in check_kernels.compiled_kernels(
            toolkit, cuobjdump, architecture, folder, source
        ).items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, metavar="sm_90")
    parser.add_argument("--verbose", action="store_true", help="a line for every variant")
    arguments = parser.parse_args()
    toolkit, line = find_cuda.find_toolkit()
    if toolkit is None:
        sys.exit(f"{line}. Name one: CUDA_HOME=/path/to/cuda")
    cuobjdump = check_kernels.find_cuobjdump(toolkit)
    print(f"{line}; {cuobjdump}")
    cases = [(name, source) for source in SOURCES for name in arguments.architectures]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(find_cuda.jobs()) as pool:
        results = pool.map(lambda case: check(toolkit, cuobjdump, *case, Path(folder)), cases)
        rows = sorted((row for result in results for row in result), key=lambda row: row.label)
    return check_kernels.report(rows, arguments.verbose)


if __name__ == "__main__":
    sys.exit(main())
