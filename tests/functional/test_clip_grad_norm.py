"""clip_grad_norm_ and get_total_norm against the float64 reference and against torch.nn.utils."""

from __future__ import annotations

import math

import numpy
import pytest
import reference as ref
import torch
from parametrize import (
    by_border_size,
    by_dtype,
    by_foreach,
    by_layout,
    by_native_dtype,
    by_norm_type,
)
from reference import COMPLEX_DTYPES, LAYOUTS, NATIVE_DTYPES, name_of

import gradclip_ext

ALL_DTYPES = NATIVE_DTYPES + COMPLEX_DTYPES


def check_clip(gradients, max_norm, norm_type=2.0, foreach=None):
    """Clip and compare the norm and every element with the reference; returns the norm."""
    before = [ref.widened(gradient) for gradient in gradients]
    expected = ref.reference_norm(gradients, norm_type)
    norm = gradclip_ext.clip_grad_norm_(
        ref.parameters(gradients), max_norm, norm_type, foreach=foreach
    )
    ref.assert_norm(norm, before, norm_type)
    coefficient = ref.reference_coefficient(max_norm, expected)
    for gradient, original in zip(gradients, before, strict=True):
        ref.assert_scaled(gradient, original, coefficient)
    return norm


@by_foreach
@by_norm_type
@by_dtype
def test_clips_a_small_model(dtype, norm_type, foreach):
    shapes = [(4, 3), (3,), (), (5, 2, 2), (0,), (1,)]
    gradients = [ref.random_gradient(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    norm = check_clip(gradients, 0.5, norm_type, foreach)
    assert norm.dtype == dtype.to_real()
    assert norm.shape == ()
    assert not norm.requires_grad


@by_norm_type
@by_dtype
def test_agrees_with_torch(dtype, norm_type):
    shapes = [(40, 30), (30,), (7, 5, 3), (1,)]
    ours = [ref.random_gradient(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    theirs = ref.copies(ours)
    norm = gradclip_ext.clip_grad_norm_(ref.parameters(ours), 0.7, norm_type)
    torch_norm = torch.nn.utils.clip_grad_norm_(ref.parameters(theirs), 0.7, norm_type)
    tolerance = ref.TORCH_TOLERANCE[dtype]
    assert norm.dtype == torch_norm.dtype
    torch.testing.assert_close(norm, torch_norm, rtol=tolerance, atol=0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=1e-7)


@by_norm_type
@by_native_dtype
@by_border_size
def test_sizes_at_the_borders(size, dtype, norm_type):
    check_clip([ref.random_gradient((size,), dtype, seed=size)], 0.25, norm_type)


@by_norm_type
@by_dtype
@by_layout
def test_layouts(layout, dtype, norm_type):
    make = LAYOUTS[layout]
    gradients = [make(ref.random_gradient((6, 10), dtype, seed)) for seed in range(3)]
    bases = [gradient._base for gradient in gradients]
    check_clip(gradients, 0.5, norm_type)
    for base in bases:
        if base is not None and (base == 768.0).any():
            gaps = base.numel() - 60
            assert (base == 768.0).sum() == gaps, "memory between the elements was written"


@pytest.mark.parametrize("offset", range(1, 9))
@by_native_dtype
def test_unaligned_views(dtype, offset):
    storage = ref.random_gradient((5000,), dtype)
    untouched = storage[:offset].clone()
    check_clip([storage[offset:]], 0.5)
    assert torch.equal(storage[:offset], untouched)


@by_norm_type
def test_mixed_dtypes_in_one_call(norm_type):
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.bfloat16]
    gradients = [ref.random_gradient((300 + i,), d, seed=i) for i, d in enumerate(dtypes)]
    norm = check_clip(gradients, 1.0, norm_type)
    assert norm.dtype == torch.float64


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.complex64, torch.float64), torch.float64),
        ((torch.complex64, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float16), torch.float16),
    ],
    ids=lambda value: "+".join(map(name_of, value)) if isinstance(value, tuple) else name_of(value),
)
def test_result_dtype_is_torchs(dtypes, expected):
    gradients = [ref.random_gradient((3,), dtype) for dtype in dtypes]
    assert torch.nn.utils.get_total_norm(gradients).dtype == expected
    assert gradclip_ext.get_total_norm(gradients).dtype == expected
    assert gradclip_ext.get_total_norm([g[::2] for g in gradients]).dtype == expected


@by_norm_type
@by_dtype
def test_quiet_call_leaves_every_bit(dtype, norm_type):
    gradients = [ref.random_gradient((50, 3), dtype, seed) for seed in range(3)]
    copies = ref.copies(gradients)
    norm = gradclip_ext.clip_grad_norm_(ref.parameters(gradients), 1e4, norm_type)
    ref.assert_norm(norm, copies, norm_type)
    for gradient, copy in zip(gradients, copies, strict=True):
        assert torch.equal(gradient, copy)


# Only the memory of the CPU can be made read-only.
@pytest.mark.cpu_only
def test_quiet_call_does_not_write():
    # Read-only memory also exposes a write that leaves the bits unchanged.
    import mmap

    import numpy

    memory = mmap.mmap(-1, 4096 * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(numpy.full(4096, 0.5, dtype=numpy.float32).tobytes())
    gradient = torch.frombuffer(memory, dtype=torch.float32)
    libc = __import__("ctypes").CDLL(None, use_errno=True)
    import ctypes

    address = ctypes.c_void_p(gradient.data_ptr())
    assert libc.mprotect(address, ctypes.c_size_t(4096 * 4), 1) == 0  # PROT_READ
    norm = gradclip_ext.clip_grad_norm_(ref.parameter(gradient), 100.0)
    assert norm.item() == 32.0
    assert libc.mprotect(address, ctypes.c_size_t(4096 * 4), 3) == 0


@by_norm_type
@by_native_dtype
@pytest.mark.parametrize("position", ["first", "middle", "last"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_non_finite_values_propagate_as_in_torch(value, position, dtype, norm_type):
    index = {"first": 0, "middle": 4100, "last": 9000 - 1}[position]
    gradients = [ref.random_gradient((9000,), dtype, seed) for seed in range(3)]
    gradients[1][index] = value
    theirs = ref.copies(gradients)
    norm = gradclip_ext.clip_grad_norm_(ref.parameters(gradients), 1.0, norm_type)
    torch.nn.utils.clip_grad_norm_(ref.parameters(theirs), 1.0, norm_type)
    if math.isnan(value):
        assert math.isnan(norm.item())
        assert all(gradient.isnan().all() for gradient in gradients)
    else:
        assert norm.item() == math.inf
        assert gradients[1][index].isnan()
        assert sum(gradient.count_nonzero().item() for gradient in gradients) == 1
    for mine, other in zip(gradients, theirs, strict=True):
        assert torch.equal(mine.nan_to_num(1.0), other.nan_to_num(1.0))


# Squares that underflow in float32, nearly do, overflow when four are added, and overflow at once.
MAGNITUDES = [1e-45, 1e-38, 1e-25, 1e-23, 2e-19, 1e-17, 8.8e-16, 9e-16, 1e-10, 1.0, 1e10, 7e18]
MAGNITUDES += [1.2e19, 2e22, 3e38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("magnitude", MAGNITUDES, ids=str)
def test_any_finite_magnitude(magnitude, dtype):
    # torch: 2e22 gives inf and zeroes every gradient; 1e-25 gives 0.
    gradients = [torch.full((1000,), magnitude), torch.full((10, 10), -magnitude)]
    gradients = [gradient.to(dtype) for gradient in gradients]
    before = [ref.widened(gradient) for gradient in gradients]
    expected = ref.reference_norm(before, 2.0)
    # Below 1e-6 the epsilon dominates; a max_norm far below it still clips.
    max_norm = expected / 4
    norm = gradclip_ext.clip_grad_norm_(ref.parameters(gradients), max_norm)
    ref.assert_norm(norm, before, 2.0)
    for gradient, original in zip(gradients, before, strict=True):
        ref.assert_scaled(gradient, original, ref.reference_coefficient(max_norm, expected))


@by_norm_type
@pytest.mark.parametrize("small, large", [(0.0, 1e-30), (1e-22, 1e-17), (1e-25, 1.0), (1e-3, 1e19)])
def test_few_large_values_among_many_small_ones(small, large, norm_type):
    # Alone at various places of a kernel's step, and in a list longer than a tile.
    for place in (0, 1, 17, 63, 64, 300, 999):
        gradient = torch.full((1000,), small)
        gradient[place] = large
        ref.assert_norm(gradclip_ext.get_total_norm([gradient], norm_type), [gradient], norm_type)
    gradients = [torch.full((20_000,), small) for _ in range(3)]
    gradients[1][12_345] = large
    ref.assert_norm(gradclip_ext.get_total_norm(gradients, norm_type), gradients, norm_type)


def test_norm_beyond_float32_still_scales_right():
    gradients = [torch.full((100_000,), 3e38), torch.full((3,), 1e30)]
    norm = gradclip_ext.clip_grad_norm_(ref.parameters(gradients), 1.0)
    assert norm.item() == math.inf
    coefficient = 1.0 / (float(torch.tensor(3e38)) * math.sqrt(100_000))
    assert gradients[0][0].item() == pytest.approx(3e38 * coefficient, rel=1e-6)
    assert gradients[1][0].item() == pytest.approx(1e30 * coefficient, rel=1e-6)


@pytest.mark.parametrize("step", [1, 2], ids=["native", "strided view"])
def test_coefficient_below_float32_multiplies_in_double(step):
    # 1e-6 / 6e38 underflows in float32; its product with 3e38 does not.
    gradient = torch.full((4 * step,), 3e38)[::step]
    gradclip_ext.clip_grad_norm_(ref.Holder(gradient), 1e-6)
    assert gradient.tolist() == pytest.approx([5e-7] * 4, rel=1e-6)


def test_float64_overflows_as_in_torch():
    gradient = torch.full((4,), 1e200, dtype=torch.float64)
    assert gradclip_ext.get_total_norm([gradient]).item() == math.inf
    assert torch.nn.utils.get_total_norm([gradient]).item() == math.inf


def test_float16_norm_overflow_returns_inf_and_clips_right():
    gradients = [torch.full((10_000,), 1000.0, dtype=torch.float16)]
    norm = gradclip_ext.clip_grad_norm_(ref.parameters(gradients), 1.0)
    assert norm.item() == math.inf
    assert norm.dtype == torch.float16
    assert gradients[0][0].item() == pytest.approx(0.01, rel=2**-10)


@by_norm_type
@by_native_dtype
def test_all_equal_values(dtype, norm_type):
    # With equal values all rounding errors have the same sign; random values hide this.
    values = [0.1, 1.0 / 3.0, 1.7, *(ref.random_gradient((20,)).abs() + 0.5).tolist()]
    for size in (1000, 4096, 20_003):
        for value in values:
            gradient = torch.full((size,), value, dtype=torch.float64).to(dtype)
            for result in (None, torch.float32, torch.float64):
                norm = gradclip_ext.get_total_norm(gradient, norm_type, dtype=result)
                ref.assert_norm(norm, [gradient], norm_type)


def test_bfloat16_coefficient_is_not_rounded_to_bfloat16():
    gradient = torch.ones(1000, dtype=torch.bfloat16)
    gradclip_ext.clip_grad_norm_(ref.parameter(gradient), 20.0)
    exact = 20.0 / (math.sqrt(1000.0) + 1e-6)
    assert gradient[0].item() == torch.tensor(exact).to(torch.bfloat16).item()


def test_dtype_argument_keeps_what_bfloat16_would_round():
    gradient = torch.ones(1000, dtype=torch.bfloat16)
    plain = gradclip_ext.get_total_norm([gradient])
    exact = gradclip_ext.clip_grad_norm_(ref.parameter(gradient), 1e9, dtype=torch.float64)
    assert plain.dtype == torch.bfloat16
    assert exact.dtype == torch.float64
    assert exact.item() == math.sqrt(1000.0)
    single = gradclip_ext.get_total_norm([gradient], dtype=torch.float32)
    assert single.dtype == torch.float32
    assert single.item() == torch.tensor(math.sqrt(1000.0), dtype=torch.float32).item()
    third = gradclip_ext.get_total_norm([gradient], 3.0, dtype=torch.float64)
    assert third.item() == pytest.approx(10.0, rel=1e-12)


@pytest.mark.parametrize(
    "norm_type", [0, 0.5, 1.5, 3, 4, -1, -2, -math.inf], ids=lambda p: f"L{p:g}"
)
@by_foreach
def test_other_orders_are_torchs_result_for_result(norm_type, foreach):
    ours = [ref.random_gradient((20, 5), torch.float32, seed) for seed in range(3)]
    theirs = ref.copies(ours)
    norm = gradclip_ext.clip_grad_norm_(ref.parameters(ours), 0.01, norm_type, foreach=foreach)
    torch_norm = torch.nn.utils.clip_grad_norm_(
        ref.parameters(theirs), 0.01, norm_type, foreach=foreach
    )
    assert torch.equal(norm, torch_norm)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("norm_type", ["inf", 2, 1, True, math.inf], ids=repr)
def test_order_may_be_anything_float_reads(norm_type):
    gradient = ref.random_gradient((10,))
    expected = torch.nn.utils.get_total_norm([gradient], norm_type)
    torch.testing.assert_close(gradclip_ext.get_total_norm([gradient], norm_type), expected)


def test_no_gradients():
    for empty in ([], (), set(), iter([]), [ref.parameter(None)], ref.parameter(None)):
        norm = gradclip_ext.clip_grad_norm_(empty, 1.0)
        assert torch.equal(norm, torch.tensor(0.0))
    assert gradclip_ext.get_total_norm([], dtype=torch.float64).dtype == torch.float64
    assert gradclip_ext.clip_grads_with_norm_([], 1.0, torch.tensor(2.0)) is None
    assert gradclip_ext.clip_grad_value_([], 1.0) is None


@by_norm_type
def test_only_empty_gradients(norm_type):
    gradients = [torch.empty(0), torch.empty(3, 0, dtype=torch.float64)]
    norm = gradclip_ext.clip_grad_norm_(ref.parameters(gradients), 1.0, norm_type)
    assert norm.item() == 0.0
    assert norm.dtype == torch.float64


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 3.0, -2.0, 0.0], ids=lambda p: f"L{p:g}")
def test_empty_gradients_contribute_nothing(norm_type):
    filled = [ref.random_gradient((9,), seed=seed) for seed in range(3)]
    with_empty = [torch.empty(0), filled[0], torch.empty(2, 0), filled[1], filled[2]]
    with_empty.append(torch.empty(0, dtype=torch.float64))
    expected = torch.nn.utils.get_total_norm(filled, norm_type)
    norm = gradclip_ext.get_total_norm(with_empty, norm_type)
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)


def test_kinds_of_iterables():
    for wrap in (list, tuple, set, iter, lambda ps: (p for p in ps), torch.nn.ParameterList):
        gradients = [torch.full((4,), 1.0), torch.full((5,), 1.0)]
        norm = gradclip_ext.clip_grad_norm_(wrap(ref.parameters(gradients)), 1.5)
        assert norm.item() == 3.0
        assert gradients[0][0].item() == pytest.approx(0.5, rel=1e-6)
    ordered_set = dict.fromkeys(ref.parameters([torch.full((9,), 1.0)]))
    assert gradclip_ext.clip_grad_norm_(ordered_set, 1.5).item() == 3.0
    named = dict(enumerate(ref.parameters([torch.ones(4)])))
    assert gradclip_ext.clip_grad_norm_(named.values(), 1.0).item() == 2.0


def test_single_tensor():
    gradient = torch.tensor([3.0, 4.0])
    assert gradclip_ext.clip_grad_norm_(ref.parameter(gradient), 1.0).item() == 5.0
    assert gradient.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)
    assert gradclip_ext.get_total_norm(torch.tensor([3.0, 4.0])).item() == 5.0


def test_parameters_without_gradient_are_skipped():
    gradient = torch.tensor([3.0, 4.0])
    given = [ref.parameter(None), ref.parameter(gradient), ref.parameter(None)]
    assert gradclip_ext.clip_grad_norm_(given, 1.0).item() == 5.0
    assert given[0].grad is None
    assert given[1].grad is gradient


@pytest.mark.parametrize("size", [10, 100_000], ids=["small", "parallel"])
def test_the_same_gradient_twice_counts_and_scales_twice(size):
    ours, theirs = torch.ones(size), torch.ones(size)
    mine, other = ref.parameter(ours), ref.parameter(theirs)
    norm = gradclip_ext.clip_grad_norm_([mine, mine], 1.0)
    # One after the other: on a GPU, torch's multi-tensor operations scale both at once, a race.
    torch_norm = torch.nn.utils.clip_grad_norm_([other, other], 1.0, foreach=False)
    torch.testing.assert_close(norm, torch_norm)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.cpu_only
@pytest.mark.parametrize("native", [True, False], ids=["all of it", "a part"])
def test_two_storages_of_the_same_memory_are_scaled_one_after_another(native):
    memory = numpy.ones(200_000, dtype=numpy.float32)
    first, second = torch.from_numpy(memory), torch.from_numpy(memory)
    others = [torch.ones(200_000) for _ in range(3)]
    beside = torch.ones(5) if native else torch.ones(10)[::2]
    given = ref.parameters([others[0], first, others[1], second, others[2], beside])
    norm = gradclip_ext.clip_grad_norm_(given, 1.0).item()
    assert norm == pytest.approx(math.sqrt(1_000_005), rel=1e-6)
    assert torch.allclose(first, torch.tensor(norm**-2), rtol=1e-5, atol=0)
    for other in [*others, beside]:
        assert torch.allclose(other, torch.tensor(1.0 / norm), rtol=1e-5, atol=0)


def test_views_that_overlap_partly_are_scaled_one_after_another():
    storage = torch.ones(200_000)
    given = ref.parameters([storage[:150_000], storage[50_000:]])
    norm = gradclip_ext.clip_grad_norm_(given, 1.0)
    assert norm.item() == pytest.approx(math.sqrt(300_000), rel=1e-6)
    c = 1.0 / math.sqrt(300_000)
    assert torch.allclose(storage[:50_000], torch.tensor(c))
    assert torch.allclose(storage[50_000:150_000], torch.tensor(c * c), atol=0)
    assert torch.allclose(storage[150_000:], torch.tensor(c))


@pytest.mark.parametrize("coalesced", [True, False], ids=["coalesced", "uncoalesced"])
@by_norm_type
def test_sparse_gradients(coalesced, norm_type):
    indices = torch.tensor([[0, 2, 2], [1, 0, 0]])
    sparse = torch.sparse_coo_tensor(
        indices, torch.tensor([3.0, 1.0, 3.0]), (3, 4), check_invariants=True
    )
    if coalesced:
        sparse = sparse.coalesce()
    dense = torch.tensor([12.0])
    expected = ref.reference_norm([torch.tensor([3.0, 4.0, 12.0])], norm_type)
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    weight.grad = sparse
    norm = gradclip_ext.clip_grad_norm_([weight, ref.parameter(dense)], expected / 2, norm_type)
    assert norm.item() == expected
    assert weight.grad is sparse
    assert sparse.to_dense()[0, 1].item() == pytest.approx(1.5, rel=1e-6)
    assert sparse.to_dense()[2, 0].item() == pytest.approx(2.0, rel=1e-6)
    assert dense.item() == pytest.approx(6.0, rel=1e-6)


def test_sparse_embedding_trains_like_a_dense_one():
    def weight_after_step(sparse):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(10, 4, sparse=sparse)
        embedding(torch.tensor([1, 3, 3])).pow(2).sum().backward()
        gradclip_ext.clip_grad_norm_(embedding.parameters(), 0.1)
        torch.optim.SGD(embedding.parameters(), lr=1.0).step()
        return embedding.weight.detach()

    torch.testing.assert_close(weight_after_step(True), weight_after_step(False))


def test_conjugate_and_negative_views():
    values = ref.random_gradient((50,), torch.complex64)
    conjugate = values.clone().conj()
    assert conjugate.is_conj()
    check_clip([conjugate], 0.5)
    negative = values.clone().conj().imag
    assert negative.is_neg()
    before = negative.clone()
    gradclip_ext.clip_grad_norm_(ref.parameter(negative), 0.5)
    coefficient = ref.reference_coefficient(0.5, ref.reference_norm([before], 2.0))
    ref.assert_scaled(negative.clone(), ref.widened(before), coefficient)


def test_gpt2_sized_float32_norm():
    # torch's float32 norm of these has a relative error of about 1e-3.
    shapes = [(50257, 768), (1024, 768), (3072, 768)]
    gradients = [torch.full(shape, 0.001) for shape in shapes]
    numel = sum(gradient.numel() for gradient in gradients)
    expected = float(torch.tensor(0.001)) * math.sqrt(numel)
    norm = gradclip_ext.get_total_norm(gradients)
    assert ref.norm_error(norm, expected) <= ref.NORM_ULPS[torch.float32]


def test_sequence_of_clip_and_step():
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    (weight * torch.tensor([30.0, 40.0])).sum().backward()
    gradclip_ext.clip_grad_norm_([weight], 5.0)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-2.0, -3.0]))
