"""Parameters with every kind of gradient, ordinary and not, and what is stored in them."""

from __future__ import annotations

import math

import reference as ref
import torch
from torch import Tensor, nn

SHAPE = (4, 3)


def _strided(dtype=torch.float32):
    return torch.full((4, 6), 2.0).to(dtype)[:, ::2]


def _sparse(coalesced):
    tensor = torch.sparse_coo_tensor(
        [[0, 2, 2]], torch.ones(3, 3), SHAPE, check_invariants=True, dtype=torch.float32
    )
    return tensor.coalesce() if coalesced else tensor


def _inference():
    with torch.inference_mode():
        return torch.full(SHAPE, 2.0)


def _without_memory():
    tensor = torch.full(SHAPE, 2.0)
    tensor.untyped_storage().resize_(0)
    return tensor


def _complex():
    return torch.full(SHAPE, 2.0 + 1.0j)


def _with_nan():
    tensor = torch.full(SHAPE, 2.0)
    tensor[1, 1] = math.nan
    return tensor


GRADIENTS = {
    "none": lambda: None,
    "float32": lambda: torch.full(SHAPE, 2.0),
    "float64": lambda: torch.full(SHAPE, 2.0, dtype=torch.float64),
    "float16": lambda: torch.full(SHAPE, 2.0, dtype=torch.float16),
    "bfloat16": lambda: torch.full(SHAPE, 2.0, dtype=torch.bfloat16),
    "complex": _complex,
    "strided": _strided,
    "strided half": lambda: _strided(torch.float16),
    "strided conjugated": lambda: torch.full((4, 6), 2.0 + 1.0j)[:, ::2].conj(),
    "conjugated": lambda: _complex().conj(),
    "negated": lambda: torch.complex(torch.ones(SHAPE), torch.ones(SHAPE)).conj().imag,
    "sparse": lambda: _sparse(True),
    "sparse, not coalesced": lambda: _sparse(False),
    "expanded": lambda: torch.full((1, 3), 2.0).expand(SHAPE),
    "integer": lambda: torch.full(SHAPE, 2),
    "bool": lambda: torch.ones(SHAPE, dtype=torch.bool),
    "float8": lambda: torch.full(SHAPE, 2.0).to(torch.float8_e4m3fn),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(SHAPE), 0.1, 0, torch.qint8),
    "meta": lambda: torch.empty(SHAPE, device="meta"),
    "inference": _inference,
    "without memory": _without_memory,
    "NaN": _with_nan,
    "empty": lambda: torch.ones(0, 3),
}


class Kept(nn.Parameter):
    """A parameter whose gradient may be of any kind."""

    def __new__(cls, kind: str) -> Kept:
        del kind
        return super().__new__(cls, torch.full(SHAPE, 0.5))

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.held = GRADIENTS[kind]()

    @property
    def grad(self) -> Tensor | None:
        return self.held


def parameter(kind: str) -> nn.Parameter:
    """An ordinary parameter where torch takes such a gradient, else one that holds it."""
    if kind in ("float32", "none", "strided", "NaN", "negated", "sparse", "expanded"):
        result = nn.Parameter(torch.full(SHAPE, 0.5))
        result.grad = GRADIENTS[kind]()
        return result
    if kind in ("float64", "float16", "bfloat16", "complex", "conjugated"):
        return ref.parameter(GRADIENTS[kind]())
    return Kept(kind)


def stored(parameter: nn.Parameter) -> object:
    """What is in the gradient's memory, bit for bit, to be compared with ==."""
    gradient = parameter.grad
    if gradient is None or gradient.is_meta or gradient.is_quantized:
        return None if gradient is None else str(gradient.dtype)
    if gradient.layout == torch.sparse_coo:
        gradient = gradient._values()
    memory = gradient.untyped_storage()
    return bytes(memory.tolist()) if memory.nbytes() else b""
