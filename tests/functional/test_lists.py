"""Lists of any length, mixture and overlap: around the borders of blocks, tables and launches."""

from __future__ import annotations

import math

import pytest
import reference as ref
import torch
from parametrize import by_native_dtype, by_order

import gradclip_ext


def gradients_of(shapes, dtype=torch.float32):
    return [ref.random_gradient(shape, dtype, seed) for seed, shape in enumerate(shapes)]


def check_clip(gradients, max_norm, order=2.0):
    before = [ref.widened(gradient) for gradient in gradients]
    expected = ref.reference_norm(before, order)
    norm = gradclip_ext.clip_grad_norm_(ref.parameters(gradients), max_norm, order)
    ref.assert_norm(norm, before, order)
    coefficient = ref.reference_coefficient(max_norm, expected)
    for gradient, original in zip(gradients, before, strict=True):
        ref.assert_scaled(gradient, original, coefficient)


@by_order
@by_native_dtype
@pytest.mark.parametrize("count", [1, 39, 40, 41, 190, 191])
def test_lists_of_any_length(count, dtype, order):
    check_clip(gradients_of([(7 + 3 * (i % 11),) for i in range(count)], dtype), 0.5, order)


@pytest.mark.parametrize("count", [1600, 1601, 5000])
def test_lists_of_several_launches(count):
    check_clip(gradients_of([(7 + 3 * (i % 11),) for i in range(count)]), 0.5)


@by_order
@by_native_dtype
def test_more_tiles_than_workers(dtype, order):
    check_clip(gradients_of([(300_001,), (5,), (200, 1_000), (77_777,)], dtype), 0.5, order)


@by_order
def test_mixed_dtypes(order):
    gradients = [
        gradient
        for seed in range(3)
        for dtype in ref.NATIVE_DTYPES
        for gradient in gradients_of([(200 + seed, 101)], dtype)
    ]
    check_clip(gradients, 0.5, order)


def test_the_same_gradient_many_times():
    gradient = torch.full((200_000,), 1.0)
    other = torch.full((50,), 1.0)
    parameters = ref.parameters([gradient, other, gradient, gradient])
    norm = gradclip_ext.clip_grad_norm_(parameters, 1.0)
    expected = math.sqrt(3 * 200_000 + 50)
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    coefficient = ref.reference_coefficient(1.0, expected)
    assert gradient.tolist() == pytest.approx([coefficient**3] * 200_000, rel=1e-6)
    assert other.tolist() == pytest.approx([coefficient] * 50, rel=1e-6)


def test_views_that_overlap_partly():
    storage = torch.full((300_000,), 1.0)
    views = [storage[:200_000], storage[100_000:], storage[150_000:150_100]]
    norm = gradclip_ext.clip_grad_norm_(ref.parameters(views), 1.0)
    expected = math.sqrt(400_100)
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    coefficient = ref.reference_coefficient(1.0, expected)
    times = torch.ones(300_000)
    times[100_000:200_000] += 1
    times[150_000:150_100] += 1
    torch.testing.assert_close(storage, coefficient**times, rtol=1e-5, atol=0)


@by_native_dtype
def test_views_at_odd_offsets(dtype):
    storage = torch.full((10_000,), 3.0, dtype=dtype)
    views = [storage[1:4], storage[5:1000], storage[1001:9_998]]
    norm = gradclip_ext.clip_grad_norm_(ref.parameters(views), 1.0, dtype=torch.float64)
    expected = 3.0 * math.sqrt(3 + 995 + 8_997)
    assert norm.item() == pytest.approx(expected, rel=1e-15)
    outside = torch.cat([storage[:1], storage[4:5], storage[1000:1001], storage[9_998:]])
    assert (outside == 3.0).all()
    for view in views:
        torch.testing.assert_close(view, torch.full_like(view, 3.0 / expected), rtol=2**-8, atol=0)
