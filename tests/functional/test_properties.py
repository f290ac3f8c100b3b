"""Any list of shapes, dtypes and layouts: hypothesis searches for one that fails."""

from __future__ import annotations

import math

import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradclip_ext

shapes = st.one_of(
    st.lists(st.integers(0, 9), min_size=0, max_size=4).map(tuple),
    st.tuples(st.integers(0, 20_000)),
)
dtypes = st.sampled_from(ref.NATIVE_DTYPES + ref.COMPLEX_DTYPES)


@st.composite
def gradient(draw):
    shape = draw(shapes)
    dtype = draw(dtypes)
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    tensor = ref.random_gradient(shape, dtype, draw(st.integers(0, 5)), scale)
    if tensor.dim() >= 2:
        order = draw(st.permutations(range(tensor.dim())))
        tensor = tensor.permute(order)
    if tensor.dim() >= 1 and tensor.shape[-1] > 2 and draw(st.booleans()):
        tensor = tensor[..., 1 :: draw(st.integers(1, 2))]
    return tensor


@settings(max_examples=150, deadline=None)
@given(
    gradients=st.lists(gradient(), min_size=1, max_size=12),
    norm_type=st.sampled_from(ref.NATIVE_NORM_TYPES),
    share=st.sampled_from([0.0, 0.01, 0.5, 0.999, 1.5, math.inf]),
)
def test_clip_grad_norm(gradients, norm_type, share):
    before = [ref.widened(g) for g in gradients]
    expected = ref.reference_norm(before, norm_type)
    max_norm = share if math.isinf(share) else share * expected
    norm = gradclip_ext.clip_grad_norm_(ref.parameters(gradients), max_norm, norm_type)
    ref.assert_norm(norm, before, norm_type)
    coefficient = ref.reference_coefficient(max_norm, expected)
    for after, original in zip(gradients, before, strict=True):
        ref.assert_scaled(after, original, coefficient)


@settings(max_examples=60, deadline=None)
@given(
    gradients=st.lists(gradient(), min_size=1, max_size=8),
    norm_type=st.sampled_from([0.5, 1.0, 2.0, 3.0, math.inf]),
)
def test_same_dtype_and_value_as_torch(gradients, norm_type):
    filled = [g for g in gradients if g.numel() > 0]
    if not filled:
        return
    expected = torch.nn.utils.get_total_norm(filled, norm_type)
    found = gradclip_ext.get_total_norm(filled, norm_type)
    assert found.dtype == expected.dtype
    if expected.isinf():
        return  # torch rounds each tensor's norm to its own dtype, where it may overflow
    tolerance = max(ref.TORCH_TOLERANCE[g.dtype] for g in filled) * 2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    gradients=st.lists(gradient().filter(lambda g: not g.is_complex()), max_size=8),
    bound=st.floats(0.0, 50.0),
)
def test_clip_grad_value(gradients, bound):
    expected = [g.clone().clamp_(-bound, bound) for g in gradients]
    gradclip_ext.clip_grad_value_(ref.parameters(gradients), bound)
    for found, other in zip(gradients, expected, strict=True):
        assert torch.equal(found, other)
