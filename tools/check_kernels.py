"""Checks what nvcc makes of csrc/cuda/kernels.cuh, for every architecture; needs no GPU.

Some mistakes show only in the machine code: a table copied to the stack, a spilled register, loads
that wait for each other, a 16-byte load split up, a result read before it is complete. This
compiles the kernels, reads nvcc's report and the disassembly, prints a table, and exits with 1 if a
kernel breaks a rule. cuobjdump comes with the CUDA toolkit or with the triton package.

usage: python tools/check_kernels.py [--verbose] [sm_90 ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import find_cuda

ROOT = Path(__file__).resolve().parent.parent
# Includes all of csrc/cuda/kernels.cuh.
KERNELS = ROOT / "csrc/cuda/launch.cu"
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]

# From Segment in csrc/cuda/segments.cuh: how many 16-byte loads a thread has in flight.
LOADS = 4
DTYPES = 4
# The number of loops over whole runs in each kernel, per dtype.
LOOPS = {
    "power_sums_kernel": 1,
    "scale_kernel": 1,
    "scale_each_kernel": 1,
    "clamp_kernel": 1,
    "clip_in_one_block_kernel": 2,
    "clip_rows_kernel": 3,
    "tensor_norms_kernel": 0,
    "finish_kernel": 0,
}
# With one of these tables a kernel reads two vectors at a time, and what it has just written.
DECAY_TABLE = "DecayTable"
# Before sm_80 there is no instruction that rounds to bfloat16. What stands for it takes so many
# registers that the compiler holds one of the loads back.
FIRST_WITH_BFLOAT16 = 80
ROUNDING = {"scale_kernel", "scale_each_kernel", "clip_in_one_block_kernel", "clip_rows_kernel"}
# Kernels that may start before the kernel whose results they read has ended.
WAITING = {"scale_kernel", "finish_kernel", "tensor_norms_kernel"}
WITHOUT_TABLE = {"finish_kernel"}
# The instruction that cudaGridDependencySynchronize() compiles to, and the first sm that has it.
WAIT = "ACQBULK"
FIRST_WITH_WAIT = 90
TRIGGER = "PREEXIT"


class Resources(NamedTuple):
    """What ptxas reports for a kernel: the number of registers, the rest in bytes."""

    registers: int
    stack: int
    spills: int


class Instruction(NamedTuple):
    """A line of the disassembly."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        return self.opcode.partition(".")[0]


def resources_of_kernels(report: str) -> dict[str, Resources]:
    """Returns what `ptxas -v` reports for each kernel, by mangled name."""
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", part)
        registers = re.search(r"Used (\d+) registers", part)
        if memory is None or registers is None:
            raise ValueError(f"the report of ptxas has another form than expected:\n{part}")
        stack, stores, loads = map(int, memory.groups())
        found[part.partition("'")[0]] = Resources(int(registers[1]), stack, stores + loads)
    return found


def instructions_of_kernels(listing: str) -> dict[str, list[Instruction]]:
    """Returns the instructions of each kernel in the output of cuobjdump -sass, by mangled name."""
    line = re.compile(
        r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.M
    )
    found = {}
    for part in listing.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        found[name.strip()] = [
            Instruction(int(address, 16), predicate, opcode, operands.strip())
            for address, predicate, opcode, operands in line.findall(body)
        ]
    return found


def name_of(mangled: str) -> str:
    """Returns the name of a kernel in the source."""
    match = re.search(r"\d([a-z][a-z_]*_kernel)[IE]", mangled)
    if match is None:
        raise ValueError(f"{mangled} is no kernel of kernels.cuh")
    return match[1]


def label_of(mangled: str) -> str:
    """Returns the name with the template's arguments, numbers and whether it decays."""
    arguments = re.findall(r"L(?:NS_4NormE|b|i)(\d+)E", mangled)
    if DECAY_TABLE in mangled:
        arguments.append("decay")
    return f"{name_of(mangled).removesuffix('_kernel')}<{', '.join(arguments)}>".replace("<>", "")


def groups_in_flight(instructions: list[Instruction], loads: int = LOADS) -> int:
    """Returns how often `loads` unconditional 16-byte loads from one base address come in a row.

    Other instructions may come between them, but none that needs what was loaded, and no jump.
    """
    groups = 0
    base = ""
    pending: list[str] = []
    for instruction in instructions:
        if is_vector_load(instruction) and not instruction.predicate:
            target, _, address = instruction.operands.partition(",")
            address_base = re.findall(r"\bR\d+", address)[0]
            if address_base != base or _reads(address, pending):
                pending = []
            base = address_base
            pending.append(target.strip())
            if len(pending) == loads:
                groups += 1
                pending = []
        elif _jumps(instruction) or _reads(instruction.operands, pending):
            pending = []
    return groups


def is_vector_load(instruction: Instruction) -> bool:
    """Whether it loads 16 bytes from global memory, with whatever hint for the caches."""
    return instruction.kind == "LDG" and "128" in instruction.opcode.split(".")


def _jumps(instruction: Instruction) -> bool:
    return instruction.kind in {"BRA", "BRX", "JMP", "CALL", "RET", "EXIT", "BSYNC", "SYNC"}


def _reads(operands: str, vectors: list[str]) -> bool:
    """Whether the operands name a register of these 16-byte vectors."""
    loaded = {f"R{int(vector[1:]) + k}" for vector in vectors for k in range(4)}
    return not loaded.isdisjoint(re.findall(r"\bR\d+", operands))


def before_wait(instructions: list[Instruction]) -> Iterator[str]:
    """Yields what must not come before the wait: access to global memory, a way past it."""
    wait = next((i.address for i in instructions if i.kind == WAIT), None)
    for instruction in instructions:
        if instruction.address == wait:
            return
        if instruction.kind in {"LDG", "LD", "STG", "ST", "RED", "ATOM", "ATOMG"}:
            yield f"{instruction.opcode} before the wait"
        elif _jumps(instruction) and (wait is None or not _stays_before(instruction, wait)):
            yield f"{instruction.opcode} that may pass the wait"
    yield f"no wait ({WAIT})"


def _stays_before(jump: Instruction, wait: int) -> bool:
    """Whether a jump leads to an address up to that of the wait, as a loop before it does."""
    target = re.fullmatch(r"(?:!?U?P\w+, )?0x([0-9a-f]+)", jump.operands)
    return jump.kind == "BRA" and target is not None and int(target[1], 16) <= wait


def memory_faults(resources: Resources, instructions: list[Instruction]) -> list[str]:
    """Returns which memory is used that no kernel needs, and loads that are too narrow."""
    found = []
    if resources.stack:
        found.append(f"{resources.stack} bytes of stack")
    if resources.spills:
        found.append(f"{resources.spills} bytes of spills")
    for kind in sorted({instruction.kind for instruction in instructions} & {"LDL", "STL"}):
        found.append(f"{kind}: local memory")
    if any(i.opcode.startswith(("LDG.E.U8", "LDG.E.S8")) for i in instructions):
        found.append("LDG.E.U8: a load taken apart into bytes")
    return found


def violations(
    mangled: str, architecture: str, resources: Resources, instructions: list[Instruction]
) -> list[str]:
    """Returns a description of each rule that a kernel breaks."""
    name = name_of(mangled)
    number = int(architecture.removeprefix("sm_"))
    if name not in LOOPS:
        return [f"nothing is known of it: add {name} to LOOPS in {Path(__file__).name}"]
    kinds = {instruction.kind for instruction in instructions}
    found = memory_faults(resources, instructions)
    found += [f"{kind}: memory of unknown kind" for kind in sorted(kinds & {"LD", "ST"})]
    if TRIGGER in kinds:
        found.append(f"{TRIGGER}: lets the next kernel start before this one has written")
    wanted = 0 if DECAY_TABLE in mangled else LOOPS[name] * DTYPES
    if number < FIRST_WITH_BFLOAT16 and name in ROUNDING:
        wanted -= 1
    groups = groups_in_flight(instructions)
    if groups < wanted:
        found.append(f"{groups} loops with {LOADS} loads in flight, not {wanted}")
    if name not in WITHOUT_TABLE and not any(map(reads_table, instructions)):
        found.append("the table is not read from the constant bank")
    if name in WAITING and number >= FIRST_WITH_WAIT:
        found += before_wait(instructions)
    return found


def reads_table(instruction: Instruction) -> bool:
    """Whether a parameter of the kernel is read with an index."""
    return re.search(r"c\[0x0\]\[U?R\d+\+", instruction.operands) is not None


def find_cuobjdump(toolkit: find_cuda.Toolkit) -> Path:
    """Returns the disassembler, or ends the program with a message that says where to get it."""
    places = [toolkit.home / "bin" / "cuobjdump"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    on_path = shutil.which("cuobjdump")
    if on_path is not None:
        places.append(Path(on_path))
    for place in places:
        if place.is_file():
            return place
    sys.exit(
        "no cuobjdump, neither in the CUDA toolkit nor on PATH, and no triton, which brings one.\n"
        "Run: make kernels, or with another interpreter: pip install triton"
    )


def compile_kernels(
    toolkit: find_cuda.Toolkit, architecture: str, output: Path, source: Path = KERNELS
) -> str:
    """Writes the machine code to `output`; returns the report of ptxas."""
    # As setup.py does, except for the C++ standard, which torch chooses there.
    command = [toolkit.nvcc, *find_cuda.NVCC_OPTIONS, "-Xptxas=-v", f"-I{ROOT / 'csrc'}"]
    command += ["-cubin", f"-arch={architecture}", source, "-o", output]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise RuntimeError(f"nvcc failed for {architecture}:\n{answer.stdout}{answer.stderr}")
    return answer.stdout + answer.stderr


def compiled_kernels(
    toolkit: find_cuda.Toolkit,
    cuobjdump: Path,
    architecture: str,
    folder: Path,
    source: Path = KERNELS,
) -> dict[str, tuple[Resources, list[Instruction]]]:
    """Returns what nvcc makes of the kernels of a file for one architecture, by mangled name."""
    compiled = folder / f"{source.stem}.{architecture}.cubin"
    resources = resources_of_kernels(compile_kernels(toolkit, architecture, compiled, source))
    listing = subprocess.run(
        [cuobjdump, "-sass", compiled], capture_output=True, text=True, check=True
    ).stdout
    instructions = instructions_of_kernels(listing)
    if not resources or resources.keys() != instructions.keys():
        raise RuntimeError(
            f"ptxas reports {len(resources)} kernels for {architecture}, cuobjdump finds "
            f"{len(instructions)}: the two differ"
        )
    return {name: (used, instructions[name]) for name, used in resources.items()}


class Row(NamedTuple):
    """A kernel on an architecture."""

    label: str
    architecture: str
    resources: Resources
    groups: int
    violations: list[str]


def check(
    toolkit: find_cuda.Toolkit, cuobjdump: Path, architecture: str, folder: Path
) -> list[Row]:
    """Compiles for one architecture and returns a row for each kernel."""
    return [
        Row(
            label_of(mangled),
            architecture,
            used,
            groups_in_flight(instructions),
            violations(mangled, architecture, used, instructions),
        )
        for mangled, (used, instructions) in compiled_kernels(
            toolkit, cuobjdump, architecture, folder
        ).items()
    ]


def print_rows(rows: list[Row], verbose: bool) -> None:
    """Prints every row, or one for all that differ only in their template arguments."""
    print(
        f"{'kernel':<36} {'for':<7} {'registers':>9} {'stack':>5} {'spills':>6} {'runs':>5}  rules"
    )
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        label = row.label if verbose else row.label.partition("<")[0]
        grouped.setdefault((label, row.architecture), []).append(row)
    for (label, architecture), members in grouped.items():
        registers = _range([row.resources.registers for row in members])
        stack = max(row.resources.stack for row in members)
        spills = max(row.resources.spills for row in members)
        groups = _range([row.groups for row in members])
        broken = sum(1 for row in members if row.violations)
        verdict = f"{broken} of {len(members)} BROKEN" if broken else "kept"
        if len(members) > 1:
            label += f" ({len(members)} variants)"
        print(
            f"{label:<36} {architecture:<7} {registers:>9} {stack:>5} {spills:>6} {groups:>5}  "
            f"{verdict}"
        )


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, metavar="sm_90")
    parser.add_argument("--verbose", action="store_true", help="a line for every variant")
    arguments = parser.parse_args()
    toolkit, line = find_cuda.find_toolkit()
    if toolkit is None:
        sys.exit(f"{line}. Name one: CUDA_HOME=/path/to/cuda")
    known = toolkit.codes()
    asked = [name for name in arguments.architectures if name in known]
    cuobjdump = find_cuobjdump(toolkit)
    print(f"{line}; {cuobjdump}")
    for name in sorted(set(arguments.architectures) - set(asked)):
        print(f"left out: {name}, which this nvcc does not know")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(find_cuda.jobs()) as pool:
        results = pool.map(lambda name: check(toolkit, cuobjdump, name, Path(folder)), asked)
        rows = sorted((row for result in results for row in result), key=lambda row: row.label)
    return report(rows, arguments.verbose)


def report(rows: list[Row], verbose: bool) -> int:
    """Prints the rows and what is wrong with them; returns the exit status."""
    print_rows(rows, verbose)
    broken = [row for row in rows if row.violations]
    for row in broken:
        print(f"{row.label} for {row.architecture}: {'; '.join(row.violations)}", file=sys.stderr)
    if broken:
        print(f"\n{len(broken)} of {len(rows)} kernels break a rule.", file=sys.stderr)
        return 1
    print(f"\nAll {len(rows)} kernels keep the rules.")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
