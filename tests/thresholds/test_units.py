"""Unit-wise clipping natively: rows of every kind against float64, and against the fallback."""

from __future__ import annotations

import math

import pytest
import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parametrize import by_native_dtype
from reference import name_of
from torch.utils._python_dispatch import TorchDispatchMode

from gradclip_ext import _ops
from gradclip_ext._ops import units
from gradclip_ext.clipper import GradClipper
from gradclip_ext.thresholds import AGC, adaptive_clip_grad_

# Rows shorter and longer than a vector, a piece, a tile, and than what one worker clips in one
# pass; many rows and few, rows without elements and no rows.
SHAPES = [
    (), (5,), (90_001,), (300_001,), (1, 1), (7, 3), (2000, 2), (129, 9), (65, 8), (5, 31),
    (40, 33), (3, 127), (3, 128), (3, 129), (33, 1000), (3, 1024), (2, 1025), (70, 300), (4, 5000),
    (2, 70_000), (3, 150_001), (1, 100_000), (6, 3, 5, 5), (0, 3), (3, 0), (0,),
]  # fmt: skip


def made(shape, dtype=torch.float32, seed=0):
    """A parameter of whose rows about half have a gradient that is too large."""
    parameter = torch.nn.Parameter(ref.random_gradient(shape, dtype, seed))
    parameter.grad = ref.random_gradient(shape, dtype, seed + 100, 0.01)
    if parameter.dim() > 1:
        parameter.grad[::2] *= 0.1
        parameter.data[1::3] *= 0.001
    return parameter


def rows_of(tensor):
    return list(tensor) if tensor.dim() > 1 else [tensor]


def norm_of(row):
    return row.abs().square().sum().sqrt().item()


def expected_coefficients(weights, gradient, clip_factor=0.01, eps=1e-3):
    coefficients = []
    for weight, row in zip(rows_of(weights), rows_of(gradient), strict=True):
        limit, norm = max(norm_of(weight), eps) * clip_factor, norm_of(row)
        coefficients.append(limit / max(norm, 1e-6) if norm > limit else 1.0)
    return coefficients


def assert_clipped(parameter, before, clip_factor=0.01, eps=1e-3):
    coefficients = expected_coefficients(ref.widened(parameter), before, clip_factor, eps)
    triples = zip(rows_of(parameter.grad), rows_of(before), coefficients, strict=True)
    dtype = parameter.grad.dtype
    # The coefficient is made of two norms, in float32 rounded once each and off by up to 4 units.
    off = 1e-14 if dtype in (torch.float64, torch.complex128) else 10 * 2**-24
    for found, original, coefficient in triples:
        torch.testing.assert_close(
            ref.widened(found),
            original * coefficient,
            rtol=ref.ELEMENT_TOLERANCE[dtype] + off * (coefficient < 1.0),
            atol=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps,
        )
    return coefficients


@pytest.fixture
def natively(monkeypatch):
    """The native engine has to take the list."""

    def declined(*_):
        raise AssertionError("the native engine declined")

    monkeypatch.setattr(units, "clip_units_", declined)
    monkeypatch.setattr(units, "require_units", declined)


@by_native_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype):
    parameter = made(shape, dtype)
    before = ref.widened(parameter.grad)
    smallest = AGC().clip_([("weight", parameter)])
    coefficients = assert_clipped(parameter, before)
    if not coefficients:
        assert smallest is None
        return
    assert (smallest.dtype, smallest.shape) == (torch.float64, ())
    assert smallest.item() == pytest.approx(min(coefficients), rel=1e-6)
    if len(shape) > 1 and shape[0] > 1 and parameter.numel() > 1000:
        assert min(coefficients) < 1.0 and max(coefficients) == 1.0


@by_native_dtype
@pytest.mark.usefixtures("natively")
def test_a_list_of_all_shapes(dtype):
    parameters = [made(shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
    parameters.insert(2, torch.nn.Parameter(torch.ones(3)))
    before = [None if p.grad is None else ref.widened(p.grad) for p in parameters]
    versions = [None if p.grad is None else p.grad._version for p in parameters]
    adaptive_clip_grad_(parameters)
    for parameter, original, version in zip(parameters, before, versions, strict=True):
        if original is not None:
            assert_clipped(parameter, original)
            assert parameter.grad._version == version + 1


@pytest.mark.usefixtures("natively")
@pytest.mark.parametrize("dtype", ref.COMPLEX_DTYPES, ids=name_of)
def test_complex_numbers(dtype):
    for shape in ((), (7,), (5, 31), (40, 300)):
        parameter = made(shape, dtype)
        before = ref.widened(parameter.grad)
        adaptive_clip_grad_(parameter)
        assert_clipped(parameter, before)


@pytest.mark.usefixtures("natively")
def test_parameter_of_another_dtype():
    for dtype in (torch.bfloat16, torch.float64):
        parameter = made((40, 33))
        parameter.data = parameter.data.to(dtype)
        assert parameter.grad.dtype == torch.float32
        before = ref.widened(parameter.grad)
        adaptive_clip_grad_(parameter)
        assert_clipped(parameter, before)


@pytest.mark.usefixtures("natively")
def test_rows_with_their_elements_in_another_order():
    parameter = made((6, 3, 5, 5))
    parameter.grad = parameter.grad.contiguous(memory_format=torch.channels_last)
    before = ref.widened(parameter.grad)
    adaptive_clip_grad_(parameter)
    assert_clipped(parameter, before)
    assert parameter.grad.is_contiguous(memory_format=torch.channels_last)
    # A single row may have any.
    parameter = made((1, 4, 6))
    parameter.grad = parameter.grad.transpose(1, 2).contiguous().transpose(1, 2)
    before = ref.widened(parameter.grad)
    adaptive_clip_grad_(parameter)
    assert_clipped(parameter, before)


@pytest.mark.parametrize("which", ["gradient", "parameter"])
def test_rows_that_are_not_blocks(which):
    parameter = made((6, 10))
    if which == "gradient":
        parameter.grad = parameter.grad.t().contiguous().t()
    else:
        parameter.data = parameter.data.t().contiguous().t()
    before = ref.widened(parameter.grad)
    adaptive_clip_grad_([made((3, 4)), parameter])
    assert_clipped(parameter, before)


@pytest.mark.usefixtures("natively")
@by_native_dtype
@pytest.mark.parametrize("length", [3, 200, 150_000])
def test_rows_that_are_not_finite_are_unchanged(length, dtype):
    parameter = made((6, length), dtype)
    parameter.grad.fill_(1.0)
    parameter.grad[0, -1] = math.nan
    parameter.grad[1, 0] = -math.inf
    parameter.data[3, length // 2] = math.inf
    parameter.data[4, length // 2] = math.nan
    before = parameter.grad.clone()
    assert AGC().clip_([("weight", parameter)]).item() < 1.0
    for row in (0, 1, 3, 4):
        assert torch.equal(parameter.grad[row].nan_to_num(7.0), before[row].nan_to_num(7.0))
    for row in (2, 5):
        assert (parameter.grad[row] < 0.9).all()


@pytest.mark.usefixtures("natively")
def test_sums_outside_of_the_range_of_float32():
    for length in (8, 100, 2000):
        parameter = torch.nn.Parameter(torch.full((3, length), 1e-30))
        parameter.grad = torch.stack([torch.full((length,), v) for v in (1e25, 1e-20, 1e-30)])
        before = ref.widened(parameter.grad)
        adaptive_clip_grad_(parameter, clip_factor=1e-3, eps=1e-20)
        assert_clipped(parameter, before, 1e-3, 1e-20)


@pytest.mark.usefixtures("natively")
def test_a_row_at_its_limit_is_not_scaled_again():
    parameter = made((50, 77))
    adaptive_clip_grad_(parameter)
    limits = parameter.detach().norm(dim=1).clamp(min=1e-3) * 0.01
    at_limit = (parameter.grad.norm(dim=1) / limits - 1.0).abs() < 1e-5
    assert at_limit.sum() > 10
    before = parameter.grad.clone()
    adaptive_clip_grad_(parameter)
    # By one unit in the last place where the scaled norm was rounded up.
    torch.testing.assert_close(parameter.grad, before, rtol=2e-7, atol=0.0)


def shared_memory():
    memory = ref.random_gradient((8, 5), seed=3)
    first, second, third = (made((4, 5), seed=seed) for seed in range(3))
    one = made((4, 5), seed=4)
    return {
        "a parameter twice": [first, second, first],
        "a gradient twice": [_with(first, memory[:4]), _with(second, memory[:4])],
        "gradients that overlap": [_with(second, memory[:4]), _with(third, memory[2:6])],
        "parameters that overlap": [_of(memory[:4]), _of(memory[2:6])],
        "a gradient that is a parameter": [_with(one, memory[:4]), _of(memory[4:])],
        "its own gradient": [_with(_of(memory[:4]), memory[:4])],
    }


def _with(parameter, gradient):
    parameter.grad = gradient
    return parameter


def _of(values):
    parameter = torch.nn.Parameter(values)
    parameter.grad = ref.random_gradient(values.shape, seed=7)
    return parameter


@pytest.mark.parametrize("kind", shared_memory())
def test_shared_memory(kind):
    mine, others = shared_memory()[kind], shared_memory()[kind]
    adaptive_clip_grad_(mine)
    units.clip_units_(others, 0.01, 1e-3, _ops.Caller("adaptive_clip_grad_"))
    for parameter, other in zip(mine, others, strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=4e-7, atol=0.0)


def test_a_dispatch_mode_sees_the_operations():
    class Watching(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            self.seen += 1
            return function(*arguments, **(keywords or {}))

    mine, other = made((40, 33)), made((40, 33))
    with Watching() as watching:
        adaptive_clip_grad_(mine)
    adaptive_clip_grad_(other)
    assert watching.seen > 0
    torch.testing.assert_close(mine.grad, other.grad, rtol=4e-7, atol=0.0)


@pytest.mark.usefixtures("natively")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_clipper_looks_at_units_natively(weight_decay):
    parameters = [made((40, 33)), made((7,), seed=1), made((3, 2000), seed=2)]
    before = [ref.widened(p.grad) + weight_decay * ref.widened(p) for p in parameters]
    clipper = GradClipper(parameters, AGC(0.01), weight_decay=weight_decay)
    norm = clipper.clip_()
    assert norm.item() == pytest.approx(ref.reference_norm(before, 2.0), rel=1e-6)
    coefficients = []
    for parameter, original in zip(parameters, before, strict=True):
        expected = expected_coefficients(ref.widened(parameter), original)
        coefficients += expected
        for found, row, coefficient in zip(
            rows_of(parameter.grad), rows_of(original), expected, strict=True
        ):
            torch.testing.assert_close(ref.widened(found), row * coefficient, rtol=1e-5, atol=1e-7)
    assert clipper.report().coefficient == pytest.approx(min(coefficients), rel=1e-6)


def test_a_clipper_finds_what_is_wrong_before_it_writes():
    good, bad = made((40, 33)), made((3, 2))
    holder = ref.Holder(torch.ones(3, 2))
    originals = [good.grad.clone(), bad.grad.clone()]
    with pytest.raises(ValueError, match="has to have the shape of its parameter"):
        GradClipper([good, bad, holder], AGC(), weight_decay=0.1).clip_()
    ref.assert_unchanged([good.grad, bad.grad], originals)


@pytest.mark.cpu_only
@pytest.mark.usefixtures("natively")
@by_native_dtype
def test_the_same_bits_for_any_number_of_threads(dtype):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            parameters = [made(shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
            smallest = AGC().clip_((str(i), p) for i, p in enumerate(parameters))
            results.append([smallest, *(p.grad for p in parameters)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        ref.assert_unchanged(result, results[0])


@st.composite
def parameter(draw):
    shape = draw(st.lists(st.integers(0, 40), max_size=3).map(tuple))
    dtype = draw(st.sampled_from(ref.NATIVE_DTYPES + ref.COMPLEX_DTYPES))
    result = made(shape, dtype, draw(st.integers(0, 5)))
    if len(shape) > 1 and draw(st.booleans()):
        order = draw(st.permutations(range(len(shape))))
        back = [order.index(i) for i in range(len(shape))]
        result.grad = result.grad.permute(order).contiguous().permute(back)
    return result


@settings(max_examples=100, deadline=None)
@given(parameters=st.lists(parameter(), max_size=6), clip_factor=st.floats(1e-4, 10.0))
def test_any_list_is_as_in_the_fallback(parameters, clip_factor):
    others = []
    for item in parameters:
        other = torch.nn.Parameter(item.detach().clone())
        other.grad = item.grad.clone()
        others.append(other)
    caller = _ops.Caller("adaptive_clip_grad_")
    mine = _ops.clip_units_(parameters, clip_factor, 1e-3, caller)
    expected = units.clip_units_(others, clip_factor, 1e-3, caller)
    assert (mine is None) == (expected is None)
    if mine is not None:
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=0.0)
    for item, other in zip(parameters, others, strict=True):
        tolerance = 2 * torch.finfo(item.grad.dtype).eps + 4e-7 * (item.grad.itemsize > 2)
        torch.testing.assert_close(item.grad, other.grad, rtol=tolerance, atol=1e-7)
