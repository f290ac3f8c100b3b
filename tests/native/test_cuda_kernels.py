"""Builds and runs tests/native/test_kernels*.cpp: the bodies of the CUDA kernels on the CPU.

An emulation, never a test on a GPU: see tests/native/emulation.h. That it finds what it is there
for is tested, too: with mistakes put into copies of the kernels, each of which has to be caught.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from compiled import linked, object_file

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "tests/native"
SOURCES = [
    "tests/native/grid.cpp",
    "tests/native/kernel_testing.cpp",
    "tests/native/test_kernels.cpp",
    "tests/native/test_kernels_writing.cpp",
    "csrc/cuda/plan.cpp",
]
# With the bodies of the kernels, which mutants change.
KERNELS = "tests/native/kernels.cpp"
WARNINGS = ["-Wall", "-Wextra", "-Werror"]

# Options and the number of threads in a block.
BUILDS = {
    "c++17": (["-std=c++17", "-O2"], 256),
    "c++20": (["-std=c++20", "-O1"], 32),
    "address and undefined behavior sanitizers": (
        ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        64,
    ),
}
# Of the tests for mutants, and of the mutants, which are compiled in no time and fail early.
QUICK_BUILD = (["-std=c++17", "-O1"], 64)
MUTANT_BUILD = (["-std=c++17", "-O0"], 64)

# What the emulation itself has to notice, and what it then says.
STUCK = "block 0: {} threads stand in a shuffle, {} at a barrier, {} wait, {} have ended"
RULES = {
    "barrier that a thread leaves out": lambda threads: STUCK.format(0, threads - 1, 0, 1),
    "shuffle that a thread leaves out": lambda threads: STUCK.format(31, 0, 0, threads - 31),
    "shuffle beside a barrier": lambda threads: STUCK.format(27, 5, 0, threads - 32),
    "shuffles of different offsets": lambda threads: STUCK.format(32, 0, 0, threads - 32),
    "early exit of a thread": lambda threads: STUCK.format(0, 0, threads - 1, 1),
    "early exit of a block": lambda threads: (
        "a block ended before it waited for the previous kernel"
    ),
    "early load of a result": lambda threads: (
        "block 0, thread 0: loads a result before it has waited"
    ),
}

BARRIER = "  __syncthreads();\n"
WAIT = "  wait_for_previous_kernel();\n"
SCALE = f"any store.\n{WAIT}"
SCALE_SHARE = "double coefficient) {\n  "
FINISH = f"void* norm_result) {{\n{WAIT}"
TENSOR_NORMS = f"double* norms) {{\n{WAIT}"

# A file of csrc, and what is replaced in it.
NO_MUTANT = "nothing changed"
MUTANTS = {
    NO_MUTANT: ("cuda/bodies.cuh", {}),
    # Barriers.
    "no barrier before the sums of warps are read": (
        "cuda/accumulators.cuh",
        {f"of_warps[warp] = own;\n{BARRIER}": "of_warps[warp] = own;\n"},
    ),
    "no barrier before the sums of warps are overwritten": (
        "cuda/accumulators.cuh",
        {f"{BARRIER}  return own;": "  return own;"},
    ),
    "barrier in the first warp alone": (
        "cuda/accumulators.cuh",
        {
            f"where this one reads.\n{BARRIER}": "",
            "own = warp_total(own);\n  }": f"own = warp_total(own);\n  {BARRIER}  }}",
        },
    ),
    "no barrier before the coefficient is read": (
        "cuda/bodies.cuh",
        {f"{BARRIER}  return coefficient;": "  return coefficient;"},
    ),
    # Early launches.
    "scale does not wait": ("cuda/bodies.cuh", {SCALE: "any store.\n"}),
    "scale waits in the first thread alone": (
        "cuda/bodies.cuh",
        {SCALE: f"any store.\n  if (threadIdx.x == 0) {WAIT}"},
    ),
    "a block ends before it waits": (
        "cuda/bodies.cuh",
        {SCALE: f"any store.\n  if (blockIdx.x == 2) return;\n{WAIT}"},
    ),
    "scale loads a result before it waits": (
        "cuda/bodies.cuh",
        {
            f"{SCALE}  double norm = 0.0;": "any store.\n"
            f"  double norm = clip.partials != nullptr ? load_result(clip.partials) : 0.0;\n{WAIT}"
        },
    ),
    "scale adds up before it waits": (
        "cuda/bodies.cuh",
        {
            SCALE: "any store.\n",
            "load_result(partials + i + k * kThreads)": "partials[i + k * kThreads]",
            "norm = value_of(clip.given_norm);\n  }\n": "norm = value_of(clip.given_norm);\n  }\n"
            + WAIT,
        },
    ),
    "scale reads max_norm before it waits": (
        "cuda/bodies.cuh",
        {
            SCALE: "any store.\n  Clip early = clip;\n"
            "  early.max_norm = {max_norm_of(clip.max_norm), nullptr, DType::kFloat64};\n" + WAIT,
            "shared_coefficient(clip, norm)": "shared_coefficient(early, norm)",
        },
    ),
    "scale stores the norm before it waits": (
        "cuda/bodies.cuh",
        {
            SCALE: "any store.\n  if (threadIdx.x == 0 && clip.norm_result != nullptr) {\n"
            f"    write_norm(0.0, clip.norm_dtype, clip.norm_result);\n  }}\n{WAIT}"
        },
    ),
    "finish does not wait": ("cuda/bodies.cuh", {FINISH: "void* norm_result) {\n"}),
    "tensor_norms does not wait": ("cuda/bodies.cuh", {TENSOR_NORMS: "double* norms) {\n"}),
    # Who owns what.
    "slot that no pair owns left out": ("cuda/bodies.cuh", {"slots[slot - 1] = 0.0;": ""}),
    "partials of a second launch over those of the first": (
        "cuda/bodies.cuh",
        {"partials[table.first_worker + worker]": "partials[worker]"},
    ),
    "slots of a second launch over those of the first": (
        "cuda/bodies.cuh",
        {"slot_of(table.first_tensor + tensor,": "slot_of(tensor,"},
    ),
    "sum of a tensor kept for the next": (
        "cuda/bodies.cuh",
        {"sums.tensor = Accumulator<kNorm>::zero();": ""},
    ),
    "last worker of a tensor left out": (
        "cuda/bodies.cuh",
        {"worker <= end; worker +=": "worker < end; worker +="},
    ),
    "one worker's tiles scaled by all blocks": (
        "cuda/bodies.cuh",
        {"table.workers - 1 - static_cast<int>(blockIdx.x)": "table.workers - 1"},
    ),
    "tiles counted in elements of float32": (
        "cuda/bodies.cuh",
        {"first) * tile_elements(dtype)": "first) * tile_elements(DType::kFloat32)"},
    ),
    "partials left out beyond one for each thread": (
        "cuda/bodies.cuh",
        {"i < count; i +=": "i < count && i < kThreads; i +="},
    ),
    "partials taken for 0 beyond one load of each thread": (
        "cuda/bodies.cuh",
        {"loaded[k] = i + k * kThreads < count ?": "loaded[k] = k == 0 ?"},
    ),
    # Rows.
    "no barrier before the coefficient of a row is read": (
        "cuda/bodies.cuh",
        {f"being written too early.\n  {BARRIER}": "being written too early.\n"},
    ),
    "coefficient of a row in the first thread alone": (
        "cuda/bodies.cuh",
        {"__shared__ double coefficient;\n  const int": "double coefficient = 1.0;\n  const int"},
    ),
    "rows scaled that begin where those of the weights do": (
        "cuda/bodies.cuh",
        {
            "data += row_of_tensor * numel_of(packed) * element_size(dtype);": "data += "
            "row_of_tensor * numel_of(packed) * element_size(dtype_of(table.weights_row[tensor]));"
        },
    ),
    "rows of the second half left out": (
        "cuda/bodies.cuh",
        {
            "for (int64_t row = worker; row < table.rows;": "for (int64_t row = worker; row < "
            "table.rows / 2;"
        },
    ),
    "smallest coefficients of a second launch over those of the first": (
        "cuda/bodies.cuh",
        {"smallest[table.first_worker + worker]": "smallest[worker]"},
    ),
    # Ends of segments.
    "tail left out": ("cuda/segments.cuh", {"if (thread < tail) work": "if (false) work"}),
    "head counted twice": (
        "cuda/segments.cuh",
        {"if (thread < head) work": "for (int k = 0; k < 2 && thread < head; ++k) work"},
    ),
    "last run read beyond its end": (
        "cuda/segments.cuh",
        {"if (k * kThreads >= left) break;": ""},
    ),
    "last run not scaled": (
        "cuda/segments.cuh",
        {"if (rest > 0) apply_to_run": "if (false) apply_to_run"},
    ),
    # Numbers.
    "float32 always taken as in range": (
        "cuda/segments.cuh",
        {"return sum <= 3.4028234663852886e38 &&": "return true ||"},
    ),
    "vanished squares taken as in range": ("cuda/segments.cuh", {"sum >= 0x1p-95": "true"}),
    "maximum that drops NaN": (
        "cuda/accumulators.cuh",
        {"= other > bits ?": "= magnitude > double_of(bits) ?"},
    ),
    "coefficient of NaN taken for 1": (
        "cuda/bodies.cuh",
        {f"{SCALE_SHARE}if (coefficient == 1.0)": f"{SCALE_SHARE}if (!(coefficient < 1.0))"},
    ),
    "minimum that drops NaN": (
        "core/norm.h",
        {"coefficient > 1.0 ? 1.0 : coefficient": "coefficient < 1.0 ? coefficient : 1.0"},
    ),
    "coefficient of 1 multiplied with": (
        "cuda/bodies.cuh",
        {f"{SCALE_SHARE}if (coefficient == 1.0) return;": SCALE_SHARE},
    ),
    "infinity multiplied with 0 where it should be cleared": (
        "cuda/bodies.cuh",
        {"if (coefficient != 0.0) return": "if (true) return"},
    ),
    "coefficients taken without regard to places": (
        "cuda/bodies.cuh",
        {"coefficients[table.positions[tensor]]": "coefficients[table.first_tensor + tensor]"},
    ),
    "norms of tensors left without regard to places": (
        "cuda/bodies.cuh",
        {"norms[table.positions[tensor]]": "norms[number]"},
    ),
    "tiny coefficient in float32": (
        "cuda/bodies.cuh",
        {"fabs(coefficient) < kSmallestFloat32Coefficient": "false"},
    ),
    "negative max_norm taken as it is": (
        "cuda/bodies.cuh",
        {"max_norm >= 0.0 ? max_norm": "max_norm == max_norm ? max_norm"},
    ),
}


def compile_one(csrc: Path, source: str, options: list[str], threads: int) -> Path:
    """A source with the headers of `csrc`, as an object file."""
    # g++ does not know `pragma unroll`.
    options = [*options, "-Wno-unknown-pragmas", "-DGRADCLIP_EMULATION"]
    options += [f"-DGRADCLIP_THREADS={threads}"]
    return object_file(ROOT / source, options, [csrc, NATIVE])


def link(objects: list[Path], options: list[str], folder: Path) -> Path:
    return linked(folder / "program", objects, [*options, "-pthread"])


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def outcome_of_mutant(
    mutant: str, folder: Path, tests: list[Path]
) -> subprocess.CompletedProcess[str]:
    """What the compiled tests say of a mutant."""
    name, replacements = MUTANTS[mutant]
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    file = folder / "csrc" / name
    source = file.read_text(encoding="utf-8")
    for old, new in replacements.items():
        assert source.count(old) == 1, f"{name} should hold this once: {old}"
        source = source.replace(old, new)
    file.write_text(source, encoding="utf-8")
    options, threads = MUTANT_BUILD
    kernels = compile_one(folder / "csrc", KERNELS, options, threads)
    # First, so that of two copies of an inline function the linker keeps the mutant's.
    return run(link([kernels, *tests], options, folder), "--quick")


@pytest.fixture(scope="module")
def side_by_side() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def programs(side_by_side, tmp_path_factory) -> dict[str, Future[Path]]:
    """The tests with the kernels as they are."""

    def build(name: str, folder: Path) -> Path:
        options, threads = BUILDS[name]
        objects = [
            compile_one(ROOT / "csrc", source, [*options, *WARNINGS], threads)
            for source in [KERNELS, *SOURCES]
        ]
        return link(objects, options, folder)

    # The last takes longest.
    return {
        name: side_by_side.submit(build, name, tmp_path_factory.mktemp("kernels"))
        for name in reversed(BUILDS)
    }


@pytest.fixture(scope="module")
def outcomes(request, side_by_side, tmp_path_factory) -> Callable[[str], Future]:
    """What the tests say of a mutant."""
    tests = [
        side_by_side.submit(compile_one, ROOT / "csrc", source, *QUICK_BUILD) for source in SOURCES
    ]

    def outcome(mutant: str, folder: Path) -> subprocess.CompletedProcess[str]:
        return outcome_of_mutant(mutant, folder, [test.result() for test in tests])

    def submit(mutant: str) -> Future:
        return side_by_side.submit(outcome, mutant, tmp_path_factory.mktemp("mutant"))

    if "PYTEST_XDIST_WORKER" in os.environ:
        # Another process takes some of them, and nobody knows yet which.
        return submit
    selected = [
        item.callspec.params["mutant"]
        for item in request.session.items
        if getattr(item, "originalname", None) == test_mutant_is_caught.__name__
    ]
    return {mutant: submit(mutant) for mutant in selected}.__getitem__


@pytest.mark.parametrize("build_name", BUILDS)
def test_kernels_on_the_cpu(programs, build_name):
    result = run(programs[build_name].result())
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) checks", result.stdout)[1]) > 1_000_000


@pytest.mark.parametrize("build_name", BUILDS)
@pytest.mark.parametrize("rule", RULES)
def test_emulation_notices(programs, build_name, rule):
    result = run(programs[build_name].result(), "--break", rule)
    assert result.returncode == 1
    _, threads = BUILDS[build_name]
    assert result.stdout == RULES[rule](threads) + "\n"


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(outcomes, mutant):
    result = outcomes(mutant).result()
    if mutant == NO_MUTANT:
        assert result.returncode == 0, result.stdout
        return
    assert result.returncode != 0, f"nobody noticed: {result.stdout}"
    # By a test or by the processor, not because it could not start.
    assert result.stdout or result.returncode < 0, result
