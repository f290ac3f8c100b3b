"""The mixes on several GPUs, where no host reads a vector."""

from __future__ import annotations

import math
from typing import Any

import mixes
import pytest
import torch
from torch.distributed.tensor import DTensor

import gradclip_ext

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs several CUDA GPUs"),
]
SIZES = [size for size in (2, 4) if size <= max(2, torch.cuda.device_count())]


# On the ranks.


def clip(name: str, norm_type: float) -> Any:
    entries = mixes.MIXES[name]
    wholes = mixes.whole_gradients(entries)
    parameters = mixes.parameters_of(entries, wholes)
    wide = [w.to(torch.complex128 if w.is_complex() else torch.float64).flatten() for w in wholes]
    expected = torch.linalg.vector_norm(torch.cat(wide), norm_type)
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = gradclip_ext.clip_grad_norm_(parameters, 1.0, norm_type, dtype=torch.float64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    left = [
        mixes.whole_of(parameter.grad).to(w.dtype).flatten()
        for parameter, w in zip(parameters, wide, strict=True)
    ]
    return (
        norm.item().hex(),
        expected.item(),
        torch.linalg.vector_norm(torch.cat(left), norm_type).item(),
    )


def fail() -> Any:
    entries = mixes.MIXES["fsdp"]
    wholes = mixes.whole_gradients(entries)
    parameters: list[Any] = mixes.parameters_of(entries, wholes)
    is_broken = torch.distributed.get_rank() == 1
    found = []
    for _ in range(1 if is_broken else 2):
        try:
            norm = gradclip_ext.clip_grad_norm_([*parameters, 3] if is_broken else parameters, 1.0)
            found.append(norm.full_tensor().item())
        except (RuntimeError, TypeError) as error:
            found.append(str(error))
    for parameter, whole in zip(parameters, wholes, strict=True):
        assert torch.equal(mixes.whole_of(parameter.grad), whole)
    return found


# In the test process.


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "name", [name for name in mixes.MIXES if name not in ("dtypes", "bfloat16")]
)
def test_mixes(world, name, size, norm_type):
    answers = world(size, "nccl").run(clip, name, norm_type)
    assert len({norm for norm, _, _ in answers}) == 1
    for norm, expected, left in answers:
        assert float.fromhex(norm) == pytest.approx(expected, rel=1e-6)
        assert left == pytest.approx(1.0, rel=1e-5)


def test_a_failure(world):
    sound, broken = world(2, "nccl").run(fail)
    assert "found 3 (int)" in broken[0]
    assert math.isnan(sound[0]) and "rank 1 failed" in sound[1]
