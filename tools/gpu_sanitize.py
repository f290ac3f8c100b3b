"""A short list of calls for compute-sanitizer, with their results checked: see gpu_check.sh."""

from __future__ import annotations

import math

import torch

import gradclip_ext

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def gradients(sizes: list[int]) -> list[torch.Tensor]:
    """One tensor of each size, the dtypes in turn, each one element off alignment."""
    result = []
    for i, size in enumerate(sizes):
        storage = torch.full((size + 1,), 0.5, dtype=DTYPES[i % len(DTYPES)], device="cuda")
        result.append(storage[1:])
    return result


def check(sizes: list[int], norm_type: float, count: int) -> None:
    """Clips a list in which the first gradient occurs `count` times, and checks the results."""
    found = gradients(sizes)
    parameters = []
    for gradient in [found[0]] * (count - 1) + found:
        parameter = torch.nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient
        parameters.append(parameter)
    total = sum(sizes) + (count - 1) * sizes[0]
    expected = {1.0: 0.5 * total, 2.0: 0.5 * math.sqrt(total), math.inf: 0.5}[norm_type]
    norm = gradclip_ext.clip_grad_norm_(parameters, expected / 2, norm_type, dtype=torch.float64)
    assert math.isclose(norm.item(), expected, rel_tol=1e-14), (norm.item(), expected)
    for i, gradient in enumerate(found):
        times = count if i == 0 else 1
        value = 0.5 * (0.5 * expected / (expected + 1e-6)) ** times
        assert torch.allclose(gradient.double(), torch.tensor(value).double().cuda(), rtol=2**-7)
    gradclip_ext.clip_grad_value_(parameters, 0.01)
    assert all(gradient.max().item() <= 0.0101 for gradient in found)
    assert math.isfinite(gradclip_ext.get_total_norm(found).item())


if __name__ == "__main__":
    for norm_type in (2.0, 1.0, math.inf):
        check([5, 33, 1000, 77], norm_type, 1)
        check([100_000, 3, 40_000, 70_001, 9], norm_type, 2)
        check([37] * 300, norm_type, 1)
    torch.cuda.synchronize()
    print("all values correct")
