"""Bugs of other multi-tensor implementations, each of them asked of this one."""

from __future__ import annotations

import math

import pytest
import reference as ref
import torch
from parametrize import by_native_dtype, by_order

import gradclip_ext


def norm_of(*gradients, order=2.0):
    return gradclip_ext.get_total_norm(list(gradients), order).item()


@by_order
def test_a_trailing_empty_tensor_does_not_drop_the_last_gradient(order):
    expected = norm_of(torch.full((3,), 2.0), order=order)
    assert norm_of(torch.full((3,), 2.0), torch.empty(0), order=order) == expected
    gradient = torch.full((3,), 2.0)
    gradclip_ext.clip_grad_norm_(ref.parameters([gradient, torch.empty(0)]), expected / 2, order)
    assert gradient.tolist() == pytest.approx([1.0] * 3, rel=1e-6)


def test_a_thousand_empty_tensors():
    gradients = [torch.empty(0) for _ in range(1000)]
    gradients[500] = torch.tensor([3.0])
    gradients[999] = torch.tensor([4.0])
    assert norm_of(*gradients) == 5.0


def test_an_empty_tensor_in_the_middle_does_not_shift_anything():
    gradients = [torch.tensor([3.0]), torch.empty(0), torch.tensor([4.0, 0.0])]
    gradclip_ext.clip_grad_norm_(ref.parameters(gradients), 1.0)
    assert gradients[0].tolist() == pytest.approx([0.6], rel=1e-6)
    assert gradients[2].tolist() == pytest.approx([0.8, 0.0], rel=1e-6)


def test_an_empty_list_is_no_error():
    assert gradclip_ext.clip_grad_norm_([], 1.0).item() == 0.0


def test_mixed_dtypes_are_not_all_read_as_the_first():
    gradients = [
        torch.full((1000,), 2.0, dtype=torch.bfloat16),
        torch.full((1000,), 3.0, dtype=torch.float64),
        torch.full((1000,), 4.0, dtype=torch.float32),
    ]
    assert norm_of(*gradients) == pytest.approx(math.sqrt(29_000), rel=1e-15)


def test_more_elements_than_a_32_bit_integer_counts():
    size = 2**31 + 5
    gradient = torch.zeros(1, dtype=torch.bfloat16).expand(size)
    with pytest.raises(RuntimeError, match="more than one element"):
        gradclip_ext.clip_grad_norm_(ref.Holder(gradient), 1.0)
    # Untouched pages of a large allocation cost no memory.
    sparse_memory = torch.zeros(size, dtype=torch.bfloat16)
    sparse_memory[0] = 3.0
    sparse_memory[-1] = 4.0
    assert norm_of(sparse_memory) == 5.0
    assert norm_of(sparse_memory, order=math.inf) == 4.0


@pytest.mark.parametrize("offset", [1, 2, 3, 5, 7])
@by_native_dtype
def test_misaligned_views_give_the_same_values(offset, dtype):
    aligned = ref.random_gradient((10_000,), dtype)
    storage = torch.zeros(10_000 + offset, dtype=dtype)
    storage[offset:] = aligned
    assert norm_of(storage[offset:]) == norm_of(aligned)


@pytest.mark.parametrize("position", [0, 1, 8, 62, 63, 64, 500, 998, 999])
def test_nan_is_not_dropped_by_the_infinity_norm(position):
    for dtype in ref.NATIVE_DTYPES:
        gradient = torch.full((1000,), 5.0, dtype=dtype)
        gradient[position] = math.nan
        other = torch.full((3,), math.inf, dtype=dtype)
        assert math.isnan(norm_of(gradient, order=math.inf))
        assert math.isnan(norm_of(gradient, other, order=math.inf))
        assert math.isnan(norm_of(other, gradient, order=math.inf))


def test_a_quiet_call_with_an_infinite_max_norm_makes_no_nan():
    gradient = torch.tensor([math.inf, 1.0])
    gradclip_ext.clip_grad_norm_(ref.parameter(gradient), math.inf)
    assert gradient.tolist() == [math.inf, 1.0]


def test_duplicates_are_scaled_exactly_twice():
    gradient = torch.ones(1_000_000)
    gradclip_ext.clip_grads_with_norm_([ref.parameter(gradient)] * 2, 1.0, 4.0)
    assert (gradient == gradient[0]).all()
    assert gradient[0].item() == pytest.approx(1 / 16, rel=1e-6)


def test_partial_norms_are_not_rounded_before_they_are_combined():
    # Each tensor's norm rounds to 1.0 in bfloat16; together they are 10% more than that.
    gradients = [torch.full((100,), 0.1, dtype=torch.bfloat16) for _ in range(50)]
    value = gradients[0][0].item()
    exact = gradclip_ext.get_total_norm(gradients, dtype=torch.float64).item()
    assert exact == pytest.approx(value * math.sqrt(5000), rel=1e-14)


def test_many_tensors_of_many_sizes():
    gradients = [torch.full((1 + i % 700,), 0.5) for i in range(5000)]
    numel = sum(gradient.numel() for gradient in gradients)
    assert norm_of(*gradients) == pytest.approx(0.5 * math.sqrt(numel), rel=1e-7)
    gradclip_ext.clip_grad_norm_(ref.parameters(gradients), 1.0)
    assert norm_of(*gradients) == pytest.approx(1.0, rel=1e-6)
