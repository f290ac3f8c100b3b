"""Builds and runs the tests of csrc that need neither torch nor CUDA.

tests/native/test_engine.cpp is for csrc/core and csrc/cpu, test_plan.cpp for csrc/cuda/plan.h. Both
also run on an emulated aarch64, where its compiler and the emulator are installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compiled import linked, object_file

from gradclip_ext import _C

ROOT = Path(__file__).resolve().parents[2]
# From the narrowest to the widest; this machine runs those up to the one it has chosen.
INSTRUCTION_SETS = ["portable", "avx2", "avx512"]
AVAILABLE = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_C.instruction_set()) + 1]

by_instruction_set = pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)


def skip_unless_available(instruction_set):
    if instruction_set not in AVAILABLE:
        pytest.skip(f"this processor has no {instruction_set}, or GRADCLIP_CPU rules it out")


BUILDS = {
    "c++17": ["-std=c++17", "-O3"],
    "c++20": ["-std=c++20", "-O3"],
    "address and undefined behavior sanitizers": ["-std=c++17", "-O1", "-g"]
    + ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread sanitizer": ["-std=c++17", "-O1", "-g", "-fsanitize=thread"],
}
COMMON = ["-Wall", "-Wextra", "-Werror", "-pthread"]
FOLDERS = [ROOT / "csrc", ROOT / "tests/native"]


ENGINE = [
    *sorted((ROOT / "tests/native").glob("test_engine*.cpp")),
    *sorted((ROOT / "csrc/cpu").glob("*.cpp")),
]
PLAN = [ROOT / "tests/native/test_plan.cpp", ROOT / "csrc/cuda/plan.cpp"]
AARCH64 = ["aarch64-linux-gnu-g++", "qemu-aarch64"]


def built(options, sources, folder, command=None):
    options = [*options, *COMMON]

    def compiled(source):
        return object_file(source, options, FOLDERS, command=command)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    return linked(folder / "program", objects, options, command)


def require_success(call, instruction_set):
    result = subprocess.run(
        call,
        env={**os.environ, "GRADCLIP_CPU": instruction_set},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) checks", result.stdout)[1]) > 100_000


@pytest.fixture(scope="module", params=BUILDS)
def program(request, tmp_path_factory):
    return built(BUILDS[request.param], ENGINE, tmp_path_factory.mktemp("native"))


@by_instruction_set
def test_engine_without_torch(program, instruction_set):
    skip_unless_available(instruction_set)
    require_success([program], instruction_set)


@pytest.mark.parametrize("build_name", BUILDS)
def test_plan_without_cuda(build_name, tmp_path):
    require_success([built(BUILDS[build_name], PLAN, tmp_path)], AVAILABLE[-1])


@pytest.mark.parametrize("sources", [ENGINE, PLAN], ids=["engine", "plan"])
def test_on_an_emulated_aarch64(sources, tmp_path):
    missing = [command for command in AARCH64 if shutil.which(command) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}; see tools/install_aarch64.sh")
    command, emulator = map(shutil.which, AARCH64)
    # Static, so that it runs without the libraries of such a machine.
    options = [*BUILDS["c++17"], "-static"]
    require_success([emulator, built(options, sources, tmp_path, command)], "portable")


@by_instruction_set
def test_python_tests_on_every_instruction_set(instruction_set):
    skip_unless_available(instruction_set)
    if instruction_set == AVAILABLE[-1]:
        pytest.skip("the whole test run uses this one")
    files = [
        str(ROOT / "tests/functional" / name)
        for name in ("test_clip_grad_norm.py", "test_family.py", "test_known_bugs.py")
    ]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env={**os.environ, "GRADCLIP_CPU": instruction_set},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 1000


def import_with(instruction_set):
    return subprocess.run(
        [sys.executable, "-c", "from gradclip_ext import _C; print(_C.instruction_set())"],
        env={**os.environ, "GRADCLIP_CPU": instruction_set},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_instruction_set_can_be_forced():
    result = import_with("portable")
    assert result.stdout.strip() == "portable", result.stderr


def test_an_unknown_instruction_set_is_an_import_error():
    result = import_with("sse9")
    assert result.returncode != 0
    assert (
        "ImportError: GRADCLIP_CPU is 'sse9', and has to be one of what this processor and build "
        f"offer: {', '.join(reversed(AVAILABLE))}"
    ) in result.stderr


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS[1:])
def test_wide_instructions_stay_in_their_own_kernels(instruction_set):
    """No function that another file may share is compiled for a wide machine.

    A weak symbol exists once in the program, and the linker may keep the copy that only a wide
    machine can run.
    """
    source = ROOT / f"csrc/cpu/kernels_{instruction_set}.cpp"
    compiled = object_file(source, [*BUILDS["c++17"], *COMMON], FOLDERS)
    symbols = subprocess.run(
        ["nm", "--demangle", compiled], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line for line in symbols if re.search(r" [WVu] ", line)] == []
    defined = [line.split(maxsplit=2)[2] for line in symbols if re.search(r" [TDRB] ", line)]
    table = {"avx2": "kAvx2Kernels", "avx512": "kAvx512Kernels"}[instruction_set]
    assert defined == [f"gradclip::cpu::{table}"]
