"""Where the elements of tensors lie, and whether two tensors share memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, strided
from torch.nn import Parameter

from gradclip_ext._ops import torch_private

__all__ = ["extent", "first_shared"]


def extent(tensor: Tensor) -> int:
    """How many elements there are from the first to the last of one that is not empty."""
    sizes_and_strides = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in sizes_and_strides)


def first_shared(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """The places of two tensors whose memory overlaps from first to last element, if any do.

    Tensors that have no address, or none that says where their elements are, are left out.
    """
    ranges = []
    for place, tensor in enumerate(tensors):
        is_plain = type(tensor) in (Tensor, Parameter) and tensor.layout == strided
        if not is_plain or torch_private.is_wrapped(tensor) or tensor.numel() == 0:
            continue
        if begin := tensor.data_ptr():
            ranges.append((begin, begin + extent(tensor) * tensor.element_size(), place))
    ranges.sort()
    for (_, end, one), (begin, _, other) in itertools.pairwise(ranges):
        if begin < end:
            return one, other
    return None
