"""``gradclip-ext``: what is installed, how it was built, and a self-check against torch.

The same as ``python -m gradclip_ext``, which in a clone would import the source folder. Checks
every device that the build has an engine for. Exits with 1 when a check fails or a GPU is not
covered, so that a Dockerfile or a job script can rely on it.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import gradclip_ext
from gradclip_ext import _C, _built_with
from gradclip_ext.patch import original_functions

# How far torch's own float32 result may be off on these small gradients.
_AGREEMENT_WITH_TORCH = 1e-4
# Of the norm. Only lists built to round in one direction come near the 4 units that an L2 norm in
# float32 may be off.
_UNITS_IN_THE_LAST_PLACE = 2.0


def main() -> int:
    """Print the report; returns the exit code."""
    for heading, facts in (("installed", _installed()), ("built", _built()), ("here", _here())):
        print(heading)
        for name, value in facts.items():
            print(f"  {name:<16} {value}")
    devices, uncovered = _devices_to_check()
    failures = 0
    for device in devices:
        print(f"self-check on {device}")
        for name, check in _CHECKS.items():
            problem = _problem(check, device)
            failures += problem is not None
            print(f"  {name:<52} {'ok' if problem is None else 'FAILED: ' + problem}")
    checks = len(devices) * len(_CHECKS)
    if failures:
        print(f"\n{failures} of {checks} checks failed: do not use this installation.")
    else:
        print(f"\nAll {checks} checks passed.")
    for line in uncovered:
        print(line)
    return 1 if failures or uncovered else 0


def _installed() -> dict[str, str]:
    return {
        "gradclip_ext": gradclip_ext.__version__,
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
        "from": str(gradclip_ext.__path__[0]),
    }


def _built() -> dict[str, str]:
    return {
        "against torch": _built_with.TORCH_VERSION,
        "C++ ABI": "C++11" if _built_with.CXX11_ABI else "before C++11",
        "engines": _built_with.ENGINES,
        "CUDA engine": _cuda_engine(_built_with.CUDA, _built_with.CUDA_CODES),
        "compiler": _built_with.COMPILER,
    }


def _cuda_engine(version: str | None, codes: tuple[str, ...]) -> str:
    if version is None:
        return "none: CUDA gradients take the way through torch's operations"
    return f"CUDA {version}, for {' '.join(codes)}"


def _here() -> dict[str, str]:
    devices = [f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"]
    for i in range(torch.cuda.device_count()):
        facts = [torch.cuda.get_device_name(i)]
        if _has_cuda_engine():
            facts.append(_coverage(torch.cuda.get_device_capability(i), _built_with.CUDA_CODES))
        devices.append(f"cuda:{i} ({', '.join(facts)})")
    return {"CPU kernels": _C.instruction_set(), "devices": ", ".join(devices)}


def _has_cuda_engine() -> bool:
    # On ROCm compute capabilities have another meaning.
    return _built_with.CUDA is not None and torch.version.cuda is not None


def _devices_to_check() -> tuple[list[torch.device], list[str]]:
    """Returns those that the engines run on, and a line for each GPU that is not covered."""
    devices, uncovered = [torch.device("cpu")], []
    for i in range(torch.cuda.device_count() if _has_cuda_engine() else 0):
        capability = torch.cuda.get_device_capability(i)
        if _code_for(capability, _built_with.CUDA_CODES) is None:
            uncovered.append(f"cuda:{i} is {_coverage(capability, _built_with.CUDA_CODES)}")
        else:
            devices.append(torch.device("cuda", i))
    return devices, uncovered


def _coverage(capability: tuple[int, int], codes: tuple[str, ...]) -> str:
    """Returns what a GPU of this compute capability runs of the built `codes`."""
    card = f"{capability[0]}.{capability[1]}"
    code = _code_for(capability, codes)
    if code is None:
        return f"{card}, NOT COVERED: build again with TORCH_CUDA_ARCH_LIST={card}"
    if code.startswith("compute"):
        return f"{card}, its driver compiles {code} on first use"
    return f"{card}, runs {code}"


def _code_for(capability: tuple[int, int], codes: tuple[str, ...]) -> str | None:
    """Returns which of the built `codes` a GPU of this compute capability runs, if any."""
    own, from_ptx = [], []
    for code in codes:
        kind, _, number = code.partition("_")
        # Codes with a letter, such as sm_90a, run on exactly one compute capability.
        digits = number.rstrip("af")
        major, minor = int(digits[:-1]), int(digits[-1])
        if digits != number and (major, minor) != capability:
            continue
        if kind == "compute" and (major, minor) <= capability:
            from_ptx.append(code)
        elif kind == "sm" and major == capability[0] and minor <= capability[1]:
            own.append(code)
    return next(reversed(own or from_ptx), None)


def _problem(check: Callable[[torch.device], None], device: torch.device) -> str | None:
    try:
        check(device)
    except AssertionError as error:
        return str(error)
    except Exception as error:  # of any kind: the remaining checks are still worth running
        return f"{type(error).__name__}: {error}"
    return None


def _expect(found: float, expected: float, tolerance: float, what: str) -> None:
    # Not assert: this has to work under python -O.
    if not abs(found - expected) <= tolerance:
        raise AssertionError(f"{what}: expected {expected!r}, found {found!r}")


def _parameters(dtype: torch.dtype, device: torch.device) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    result = []
    # One too large for a single thread or block, one empty, one 0-dim.
    for shape in ((300, 700), (17,), (0,), (), (3, 5, 7)):
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        # Drawn on the CPU, so that all devices get the same numbers.
        gradient = torch.randn(shape, generator=generator, device="cpu")
        parameter.grad = gradient.to(device, dtype)
        result.append(parameter)
    return result


def _gradients(parameters: list[torch.nn.Parameter]) -> Iterator[Tensor]:
    for parameter in parameters:
        if parameter.grad is not None:
            yield parameter.grad


def _check_norm(dtype: torch.dtype, device: torch.device) -> None:
    """Norm and every scaled element against float64."""
    parameters = _parameters(dtype, device)
    before = torch.cat([gradient.double().flatten() for gradient in _gradients(parameters)])
    expected = math.sqrt(math.fsum((before * before).tolist()))
    norm = gradclip_ext.clip_grad_norm_(parameters, 1.0)
    digits = 1 - round(math.log2(torch.finfo(dtype).eps))
    ulp = 2.0 ** (math.frexp(expected)[1] - digits)
    _expect(norm.item(), expected, _UNITS_IN_THE_LAST_PLACE * ulp, "norm")
    after = torch.cat([gradient.double().flatten() for gradient in _gradients(parameters)])
    error = (after - before / (expected + 1e-6)).abs().max().item()
    _expect(error, 0.0, torch.finfo(dtype).eps, "largest error of a scaled element")


def _check_torch(norm_type: float, device: torch.device) -> None:
    """The same outcome as torch.nn.utils."""
    ours, theirs = _parameters(torch.float32, device), _parameters(torch.float32, device)
    # torch cannot take the inf norm of an empty tensor.
    theirs = [parameter for parameter in theirs if parameter.numel() > 0]
    norm = gradclip_ext.clip_grad_norm_(ours, 1.0, norm_type)
    with original_functions():
        torch_norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0, norm_type)
    tolerance = _AGREEMENT_WITH_TORCH * torch_norm.item()
    _expect(norm.item(), torch_norm.item(), tolerance, "norm")
    mine = torch.cat([gradient.flatten() for gradient in _gradients(ours)])
    other = torch.cat([gradient.flatten() for gradient in _gradients(theirs)])
    _expect((mine - other).abs().max().item(), 0.0, _AGREEMENT_WITH_TORCH, "largest difference")


def _check_quiet(device: torch.device) -> None:
    """Gradients below max_norm keep every bit."""
    parameters, originals = _parameters(torch.float32, device), _parameters(torch.float32, device)
    gradclip_ext.clip_grad_norm_(parameters, 1e6)
    for gradient, original in zip(_gradients(parameters), _gradients(originals), strict=True):
        if not torch.equal(gradient, original):
            raise AssertionError("a gradient below max_norm was changed")


def _check_value(device: torch.device) -> None:
    """Elements are clamped as torch clamps them."""
    ours, theirs = _parameters(torch.float32, device), _parameters(torch.float32, device)
    gradclip_ext.clip_grad_value_(ours, 0.5)
    with original_functions():
        torch.nn.utils.clip_grad_value_(theirs, 0.5)
    for mine, other in zip(_gradients(ours), _gradients(theirs), strict=True):
        if not torch.equal(mine, other):
            raise AssertionError("a limited gradient differs from torch's")


_CHECKS: dict[str, Callable[[torch.device], None]] = {
    "norm and clipping in float32 against float64": partial(_check_norm, torch.float32),
    "norm and clipping in float64 against exact sums": partial(_check_norm, torch.float64),
    "norm and clipping in float16 against float64": partial(_check_norm, torch.float16),
    "norm and clipping in bfloat16 against float64": partial(_check_norm, torch.bfloat16),
    "L2 norm and clipping against torch.nn.utils": partial(_check_torch, 2.0),
    "L1 norm and clipping against torch.nn.utils": partial(_check_torch, 1.0),
    "inf norm and clipping against torch.nn.utils": partial(_check_torch, math.inf),
    "nothing is written when nothing is clipped": _check_quiet,
    "clip_grad_value_ against torch.nn.utils": _check_value,
}


if __name__ == "__main__":
    sys.exit(main())
