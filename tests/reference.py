"""What the tests compare with: float64 references, tolerances, and helpers that make gradients.

The reference takes the values as stored, widens them to float64 and computes there; it is
independent of torch.nn.utils, whose results are compared separately.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NATIVE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
NATIVE_NORM_TYPES = (1.0, 2.0, math.inf)
# Older releases break the graph in torch.nn.utils' own clipping too, and cannot trace everything.
WITHOUT_GRAPH_BREAKS = torch.torch_version.TorchVersion(torch.__version__) >= (2, 13)

# Relative error of one scaled element: the norm's own, which is summed in short float32 chains and
# counted as one rounding (equal values, the worst of the ordinary lists, reach 1.2); one rounding
# of the coefficient to the compute dtype, one of the product there, one to the stored dtype. For
# float64, where the norm is computed in the same precision: its own two units, and a rounding each
# for adding the epsilon, dividing and multiplying.
ELEMENT_TOLERANCE = {
    torch.float32: 3.0 * 2**-24,
    torch.float64: 7.0 * 2**-53,
    torch.float16: 2**-11 + 3.0 * 2**-24,
    torch.bfloat16: 2**-8 + 3.0 * 2**-24,
    torch.complex64: 5.0 * 2**-24,
    torch.complex128: 7.0 * 2**-53,
}

# How far the norm of an ordinary list, random or all equal, may be from the float64 one, in units
# in the last place (ulp) of its own dtype. In 16 bits there is the rounding of the result, and next
# to nothing else.
NORM_ULPS = {
    torch.float32: 2.0,
    torch.float64: 2.0,
    torch.float16: 0.501,
    torch.bfloat16: 0.501,
}

# Relative error of a norm of any list before it is rounded, by order. Between an element and a
# float64 sum there are at most 6 roundings in float32, each of at most 2^-24: 3 in a chain of four
# and 3 where the chains are folded. A square is one more, and the root leaves half of 7.
CHAIN_ERROR = {1.0: 6.0 * 2**-24, 2.0: 3.5 * 2**-24}
# So for any list a float32 norm is within this many ulp: just below a power of two an ulp is 2^-24
# of the norm, and rounding the norm adds half an ulp.
LARGEST_FLOAT32_NORM_ULPS = {1.0: 6.5, 2.0: 4.0}

# Relative error allowed to torch.nn.utils itself on the small gradients of the tests.
TORCH_TOLERANCE = {
    torch.float32: 1e-5,
    torch.float64: 1e-12,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
    torch.complex64: 1e-5,
    torch.complex128: 1e-12,
}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def widened(tensor: Tensor) -> Tensor:
    """The values in float64 (complex128 for complex), always a copy."""
    values = tensor.detach()
    if values.layout == torch.sparse_coo:
        values = values.coalesce().values()
    return values.to(torch.complex128 if values.is_complex() else torch.float64, copy=True)


def reference_norm(tensors: Sequence[Tensor], norm_type: float) -> float:
    """The norm of all values together, in float64 with exact summation."""
    # There, because the magnitudes of complex numbers are less exact on a GPU.
    magnitudes = torch.cat([widened(tensor).cpu().abs().flatten() for tensor in tensors])
    if magnitudes.isnan().any():
        return math.nan
    if magnitudes.numel() == 0:
        return 0.0
    if norm_type == math.inf:
        return magnitudes.max().item()
    if norm_type == 1.0:
        return math.fsum(magnitudes.tolist())
    assert norm_type == 2.0
    # Squares of float64 values may overflow; scaling by a power of two is exact.
    largest = magnitudes.max().item()
    if largest == 0.0 or math.isinf(largest):
        return largest
    scale = 2.0 ** -math.frexp(largest)[1]
    return math.sqrt(math.fsum(((magnitudes * scale) ** 2).tolist())) / scale


def reference_coefficient(max_norm: float, norm: float) -> float:
    if max_norm == math.inf:
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance from |value| to the next number of the dtype."""
    info = torch.finfo(dtype)
    if value == 0.0:
        return info.smallest_normal
    digits = 1 - round(math.log2(info.eps))
    return max(2.0 ** (math.frexp(value)[1] - digits), info.smallest_normal * info.eps)


def norm_error(norm: Tensor, expected: float) -> float:
    """How many ulp of its dtype the norm is off."""
    return abs(norm.item() - expected) / ulp(expected, norm.dtype)


def assert_norm(norm: Tensor, tensors: Sequence[Tensor], norm_type: float) -> None:
    """The norm is as near to the reference as NORM_ULPS says, or infinite if out of its range."""
    expected = reference_norm(tensors, norm_type)
    found = norm.item()
    if math.isnan(expected):
        assert math.isnan(found), f"expected NaN, found {found}"
    elif abs(expected) > torch.finfo(norm.dtype).max:
        assert found == math.inf, f"expected inf for {expected}, found {found}"
    else:
        error = norm_error(norm, expected)
        assert error <= NORM_ULPS[norm.dtype], (
            f"{found} is {error:.2f} ulp from {expected} ({norm.dtype})"
        )


def assert_scaled(after: Tensor, before: Tensor, coefficient: float) -> None:
    """Each element of `after` is that of `before` (widened earlier) times the coefficient."""
    expected = before * coefficient
    found = widened(after)
    tolerance = ELEMENT_TOLERANCE[after.dtype]
    info = torch.finfo(after.dtype)
    allowed = expected.abs() * tolerance + info.smallest_normal * info.eps
    wrong = (found - expected).abs() > allowed
    wrong |= found.isnan() != expected.isnan()
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"element {first} of {wrong.sum().item()} wrong ones: expected "
            f"{expected[first].item()}, found {found[first].item()} ({after.dtype})"
        )


def assert_unchanged(tensors: Sequence[Tensor], originals: Sequence[Tensor]) -> None:
    for tensor, original in zip(tensors, originals, strict=True):
        assert torch.equal(tensor, original)


def parameter(gradient: Tensor | None, shape: Sequence[int] = (1,)) -> torch.nn.Parameter:
    """A parameter on its gradient's device whose gradient is this very tensor."""
    if gradient is None:
        return torch.nn.Parameter(torch.zeros(tuple(shape)))
    # Not zeros_like, which would take over an expanded dimension or another type.
    zeros = torch.zeros(gradient.shape, dtype=gradient.dtype, device=gradient.device)
    result = torch.nn.Parameter(zeros)
    result.grad = gradient
    return result


def parameters(gradients: Sequence[Tensor | None]) -> list[torch.nn.Parameter]:
    return [parameter(gradient) for gradient in gradients]


class Holder(torch.nn.Parameter):
    """A parameter whose gradient may be any tensor: another shape, layout, dtype or type."""

    def __new__(cls, gradient: Tensor) -> Holder:
        return super().__new__(cls, torch.zeros(1))

    def __init__(self, gradient: Tensor) -> None:
        self.held = gradient

    @property
    def grad(self) -> Tensor:
        return self.held


def random_gradient(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0
) -> Tensor:
    # The same numbers on every default device.
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device()
    if dtype.is_complex:
        real_dtype = torch.float32 if dtype == torch.complex64 else torch.float64
        pairs = torch.randn((*shape, 2), generator=generator, dtype=real_dtype, device="cpu")
        return (torch.view_as_complex(pairs) * scale).to(device)
    return (torch.randn(tuple(shape), generator=generator, device="cpu") * scale).to(device, dtype)


def copies(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Copies that keep strides, so that torch sees the same layout."""
    return [
        torch.empty_strided(g.shape, g.stride(), dtype=g.dtype, device=g.device).copy_(g)
        for g in gradients
    ]


# Layouts: each takes a contiguous matrix of at least 2 x 2 and returns a tensor of the same values.
# Gaps are filled with 768, which is exact in every dtype.


def _contiguous(matrix: Tensor) -> Tensor:
    return matrix


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


def _every_second_column(matrix: Tensor) -> Tensor:
    storage = torch.full((matrix.shape[0], matrix.shape[1] * 2), 768.0).to(matrix.dtype)
    view = storage[:, ::2]
    view.copy_(matrix)
    return view


def _offset_by_one(matrix: Tensor) -> Tensor:
    storage = torch.full((matrix.numel() + 2,), 768.0).to(matrix.dtype)
    view = storage[1:-1].view(matrix.shape)
    view.copy_(matrix)
    return view


def _channels_last(matrix: Tensor) -> Tensor:
    images = matrix.reshape(1, 2, matrix.shape[0] // 2, matrix.shape[1])
    return images.contiguous(memory_format=torch.channels_last)


def _column_slice(matrix: Tensor) -> Tensor:
    storage = torch.full((matrix.shape[0], matrix.shape[1] + 3), 768.0).to(matrix.dtype)
    view = storage[:, 1 : 1 + matrix.shape[1]]
    view.copy_(matrix)
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "every_second_column": _every_second_column,
    "offset_by_one": _offset_by_one,
    "channels_last": _channels_last,
    "column_slice": _column_slice,
}

# Around the vector width, a block of lanes, a staged piece of 16-bit values, a tile, a worker.
BORDER_SIZES = (
    0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257,
    511, 512, 513, 2047, 2048, 2049, 4095, 4096, 4097, 8191, 8192, 8193, 16385, 65537,
)  # fmt: skip
