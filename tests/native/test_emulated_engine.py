"""The CUDA engine as a whole, from Python down to the kernels, in an emulation on the CPU.

A second _C is built, in which binding, launchers and kernels are those of a CUDA build, and only
CUDA itself is emulated (tests/native/emulation.h and emulated/): its device memory is the CPU's.
There every tensor of the CPU takes the way of a CUDA tensor, so the suites that say nothing of a
device run over the CUDA engine. This is not a test on a GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from compiled import linked, object_file, shared_folder
from suites import TESTS, device_suites
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "tests" / "native"
# Importing the plugin of hypothesis takes as long as many a suite, and adds nothing here.
PYTEST_OPTIONS = ["-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
PYTEST_OPTIONS += ["-m", "not cpu_only"]


@pytest.fixture(scope="session")
def package_folder(tmp_path_factory):
    """A folder with a package gradclip_ext whose _C is the emulated one."""
    # Of torch's own headers: C++17 up to 2.11, C++20 later.
    standard = 17 if [int(n) for n in torch.__version__.split(".")[:2]] < [2, 12] else 20
    options = [f"-std=c++{standard}", "-fPIC", "-fopenmp", "-fvisibility=hidden"]
    options += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    options += ["-DGRADCLIP_WITH_CUDA=1", "-DGRADCLIP_EMULATION=1", "-DGRADCLIP_TUNING=1"]
    # Before torch's headers, some of which are replaced.
    folders = [NATIVE / "emulated", NATIVE, ROOT / "csrc"]
    headers = [*cpp_extension.include_paths(), sysconfig.get_path("include")]

    def compiled(source: Path) -> Path:
        # The suites spend most of their time in the kernels.
        level = "-O3" if source.suffix == ".cu" else "-O1"
        return object_file(source, [*options, level, "-xc++"], folders, headers)

    sources = [
        *(ROOT / "csrc").glob("binding/*.cpp"),
        *(ROOT / "csrc").glob("cpu/*.cpp"),
        *(ROOT / "csrc").glob("cuda/*.cpp"),
        *(ROOT / "csrc").glob("cuda/*.cu"),
        NATIVE / "grid.cpp",
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    with shared_folder(tmp_path_factory, "emulated") as (folder, is_new):
        if is_new:
            package = folder / "gradclip_ext"
            shutil.copytree(ROOT / "gradclip_ext", package, ignore=shutil.ignore_patterns("*.so"))
            target = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
            linked(target, objects, ["-shared", *libraries])
    return folder


def run(package_folder: Path, arguments: list[str], **environment: str):
    """Runs Python where the emulated package is found first."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=package_folder,
        env={**os.environ, "PYTHONPATH": str(package_folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("suite", device_suites(), ids=lambda file: file.stem)
def test_suite(suite, package_folder):
    result = run(package_folder, ["-m", "pytest", *PYTEST_OPTIONS, str(suite)])
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 1


def test_driver_that_takes_no_large_tables(package_folder):
    # Lists of hundreds of tensors take several launches then, and weight decay is declined.
    files = ["functional/test_lists.py", "norms", "textbook/test_add_weight_decay.py"]
    result = run(
        package_folder,
        ["-m", "pytest", *PYTEST_OPTIONS, *(str(TESTS / file) for file in files)],
        GRADCLIP_EMULATED_DRIVER="12000",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    code = "import torch, gradclip_ext; gradclip_ext.get_total_norm([torch.ones(4)] * 191)"
    for driver, launches in [("12000", 3), ("12010", 2)]:
        result = run(
            package_folder,
            ["-c", code],
            GRADCLIP_EMULATED_DRIVER=driver,
            GRADCLIP_COUNT_LAUNCHES="1",
        )
        assert result.stderr.splitlines()[-1] == f"{launches} kernels launched"


SMALL, LARGE = "[torch.ones(100), torch.ones(7)]", "[torch.ones(1000, 1000), torch.ones(7)]"
# Up to 8 tensors of 256 KB together take one block and one launch.
EIGHT, NINE = "[torch.ones(8192) for _ in range(8)]", "[torch.ones(1) for _ in range(9)]"
CALLS = [
    (f"gradclip_ext.clip_grad_norm_(with_grads({SMALL}), 1.0)", 1),
    (f"gradclip_ext.clip_grad_norm_(with_grads({EIGHT}), 1.0)", 1),
    (f"gradclip_ext.clip_grad_norm_(with_grads({NINE}), 1.0)", 2),
    ("gradclip_ext.clip_grad_norm_(with_grads([torch.ones(65537)]), 1.0)", 2),
    (f"gradclip_ext.clip_grad_norm_(with_grads({LARGE}), 1.0)", 2),
    (f"gradclip_ext.clip_grad_norm_(with_grads({LARGE}), 1e9)", 2),
    (f"gradclip_ext.clip_grad_norm_(with_grads({LARGE} * 2), 1.0)", 3),
    ("gradclip_ext.clip_grad_norm_(with_grads([torch.ones(9)]), 1.0, 1.0)", 1),
    (f"gradclip_ext.get_total_norm({LARGE})", 2),
    (f"gradclip_ext.clip_grads_with_norm_(with_grads({LARGE}), 1.0, 5.0)", 1),
    (f"gradclip_ext.clip_grad_value_(with_grads({LARGE}), 0.5)", 1),
    ("gradclip_ext.get_total_norm([torch.ones(4) for _ in range(1601)])", 3),
    (f"gradclip_ext.grad_norms(with_grads({SMALL}))", 3),
    # Frozen parameters take no launch of their own.
    (f"gradclip_ext.grad_norms([torch.nn.Parameter(torch.ones(2)), *with_grads({SMALL})])", 3),
    # As many measuring launches as for the norm alone, whose bits it has to have.
    ("gradclip_ext.grad_norms(with_grads([torch.ones(4) for _ in range(1600)]))", 3),
    ("gradclip_ext.grad_norms(with_grads([torch.ones(4) for _ in range(1601)]))", 5),
]


@pytest.fixture(scope="session")
def launches_of_calls(package_folder, tmp_path_factory):
    """What a process of its own says at its end for each of CALLS; torch is imported once."""
    code = f"""
import os, sys
import torch, gradclip_ext
def with_grads(gradients):
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    return parameters
for call in {[call for call, _ in CALLS]}:
    child = os.fork()
    if child == 0:
        eval(call)
        sys.exit()
    _, status = os.waitpid(child, 0)
    print("exit status", status, "of", call, file=sys.stderr)
"""
    with shared_folder(tmp_path_factory, "launches") as (folder, is_new):
        if is_new:
            result = run(package_folder, ["-c", code], GRADCLIP_COUNT_LAUNCHES="1")
            assert result.returncode == 0, result.stderr
            (folder / "said").write_text(result.stderr)
        return (folder / "said").read_text().splitlines()


@pytest.mark.parametrize("call, launches", CALLS)
def test_launches_of_a_call(call, launches, launches_of_calls):
    end = launches_of_calls.index(f"exit status 0 of {call}")
    assert launches_of_calls[end - 1] == f"{launches} kernels launched"


@pytest.mark.parametrize(
    ("settings", "launches"),
    [
        ({}, 1),
        ({"one_block_bytes": 428}, 1),
        ({"one_block_bytes": 427}, 2),
        ({"one_block_tensors": 1}, 2),
        ({"workers_per_multiprocessor": 1, "early_start": 0, "one_block_tensors": 0}, 2),
    ],
)
def test_tuning(settings, launches, package_folder):
    code = f"""
import torch, gradclip_ext
for name, value in {settings}.items():
    gradclip_ext._C.set_tuning(name, value)
parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (100, 7)]
for parameter in parameters:
    parameter.grad = torch.full_like(parameter, 2.0)
norm = gradclip_ext.clip_grad_norm_(parameters, 1.0, dtype=torch.float64)
assert abs(norm.item() - 428**0.5) < 1e-12
assert abs(parameters[1].grad[6].item() * norm.item() - 2.0) < 1e-6
"""
    result = run(package_folder, ["-c", code], GRADCLIP_COUNT_LAUNCHES="1")
    assert result.stderr.splitlines()[-1] == f"{launches} kernels launched", result.stderr


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("one_block_tensors", 41, "one_block_tensors has to be between 0 and 40, found 41"),
        ("early_start", -1, "early_start has to be between 0 and 1, found -1"),
        ("threads", 1, "there is no threads"),
    ],
)
def test_bad_tuning(name, value, message, package_folder):
    code = f"import torch, gradclip_ext; gradclip_ext._C.set_tuning({name!r}, {value})"
    result = run(package_folder, ["-c", code])
    assert result.stderr.splitlines()[-1] == f"ValueError: set_tuning: {message}"


def test_lists_of_the_sanitizers(package_folder):
    result = run(package_folder, [str(ROOT / "tools" / "gpu_sanitize.py"), "--device", "cpu"])
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("all values correct\n")
