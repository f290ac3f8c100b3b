"""clip_grads_with_norm_, clip_grad_value_ and what all four functions share."""

from __future__ import annotations

import inspect
import math

import pytest
import reference as ref
import torch
from parametrize import by_border_size, by_dtype, by_foreach, by_layout, by_native_dtype, by_way
from reference import LAYOUTS, name_of

import gradclip_ext

by_16_bit_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
FUNCTIONS = ("clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_", "clip_grad_value_")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_extends_torchs(name):
    ours = list(inspect.signature(getattr(gradclip_ext, name)).parameters.values())
    theirs = list(inspect.signature(getattr(torch.nn.utils, name)).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [
        (p.name, p.default) for p in theirs
    ]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])


class TestClipGradsWithNorm:
    @by_foreach
    @by_dtype
    @by_layout
    def test_scales_by_the_given_norm(self, layout, dtype, foreach):
        gradients = [LAYOUTS[layout](ref.random_gradient((6, 10), dtype, s)) for s in range(2)]
        before = [ref.widened(gradient) for gradient in gradients]
        result = gradclip_ext.clip_grads_with_norm_(
            ref.parameters(gradients), 1.0, torch.tensor(4.0), foreach
        )
        assert result is None
        for gradient, original in zip(gradients, before, strict=True):
            ref.assert_scaled(gradient, original, ref.reference_coefficient(1.0, 4.0))

    @pytest.mark.parametrize(
        "norm",
        [
            4,
            4.0,
            torch.tensor(4),
            torch.tensor(4.0),
            torch.tensor(4.0, dtype=torch.float64),
            torch.tensor(4.0, dtype=torch.bfloat16),
            torch.tensor([4.0]),
            torch.tensor([[4.0]], requires_grad=True),
            torch.nn.Parameter(torch.tensor(4.0)),
        ],
        ids=lambda norm: (
            f"{type(norm).__name__}-{getattr(norm, 'dtype', '')}".removesuffix("-")
            + str(list(getattr(norm, "shape", "")))
        ),
    )
    @by_way
    def test_norm_may_come_in_any_form(self, norm, mixed):
        gradients = [torch.tensor([8.0])]
        if mixed:
            gradients.append(torch.ones(4, 4)[:, ::2])
        gradclip_ext.clip_grads_with_norm_(ref.parameters(gradients), 1.0, norm)
        assert gradients[0].item() == pytest.approx(2.0, rel=1e-6)

    def test_uses_the_given_norm_as_it_is(self):
        for norm, expected in ((0.5, 8.0), (math.inf, 0.0), (16.0, 0.5)):
            gradient = torch.tensor([8.0])
            gradclip_ext.clip_grads_with_norm_(ref.parameter(gradient), 1.0, norm)
            assert gradient.item() == pytest.approx(expected, rel=1e-6)
        gradient = torch.tensor([8.0])
        gradclip_ext.clip_grads_with_norm_(ref.parameter(gradient), 1.0, math.nan)
        assert gradient.isnan().all()

    def test_together_with_get_total_norm_is_clip_grad_norm(self):
        one = [ref.random_gradient((70, 9), seed=s) for s in range(4)]
        two = ref.copies(one)
        norm = gradclip_ext.clip_grad_norm_(ref.parameters(one), 0.3, dtype=torch.float64)
        halves = gradclip_ext.get_total_norm(two, dtype=torch.float64)
        gradclip_ext.clip_grads_with_norm_(ref.parameters(two), 0.3, halves)
        assert torch.equal(norm, halves)
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b)


class TestClipGradValue:
    @by_foreach
    @by_native_dtype
    @by_layout
    def test_clamps_as_torch_does(self, layout, dtype, foreach):
        ours = [LAYOUTS[layout](ref.random_gradient((6, 10), dtype, seed)) for seed in range(2)]
        theirs = ref.copies(ours)
        gradclip_ext.clip_grad_value_(ref.parameters(ours), 0.3, foreach)
        torch.nn.utils.clip_grad_value_(ref.parameters(theirs), 0.3, foreach)
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)

    @by_native_dtype
    @by_border_size
    def test_sizes_at_the_borders(self, size, dtype):
        ours = ref.random_gradient((size,), dtype)
        theirs = ours.clone()
        gradclip_ext.clip_grad_value_(ref.parameter(ours), 0.7)
        if size:
            torch.nn.utils.clip_grad_value_(ref.parameter(theirs), 0.7)
        assert torch.equal(ours, theirs)

    @by_native_dtype
    def test_nan_stays_and_infinity_is_clamped(self, dtype):
        gradient = torch.tensor([math.nan, math.inf, -math.inf, 0.25, -0.0]).to(dtype)
        gradclip_ext.clip_grad_value_(ref.parameter(gradient), 0.5)
        assert gradient[0].isnan()
        assert gradient[1:].tolist() == [0.5, -0.5, 0.25, 0.0]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
    @pytest.mark.parametrize(
        "bound",
        [
            0.0,
            1e-45,
            3e-8,
            6.2e-8,
            1e-5,
            0.3,
            1.0,
            1.003,
            1.006,
            65504.0,
            65519.0,
            65520.0,
            3.39e38,
            math.inf,
        ],
    )
    def test_every_number_of_16_bits(self, bound, dtype):
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        numbers = patterns.view(dtype)
        expected = numbers.float().clamp(-bound, bound).to(dtype)
        # In one piece, and in pieces too short for a vector.
        for gradients in ([numbers.clone()], list(numbers.clone().split(5))):
            gradclip_ext.clip_grad_value_(ref.parameters(gradients), bound)
            found = torch.cat(gradients)
            assert torch.equal(found.isnan(), numbers.isnan())
            same = (found == expected) & (found.signbit() == expected.signbit())
            assert bool((same | numbers.isnan()).all())

    def test_infinite_bound_changes_nothing(self):
        gradient = torch.tensor([math.inf, -1e30, 2.0])
        gradclip_ext.clip_grad_value_(ref.parameter(gradient), math.inf)
        assert gradient.tolist() == [math.inf, float(torch.tensor(-1e30)), 2.0]

    def test_empty_view_with_a_stretched_dimension_is_no_overlap(self):
        gradclip_ext.clip_grad_value_(ref.parameter(torch.empty(1, 0).expand(4, 0)), 1.0)

    def test_zero_bound_zeroes(self):
        gradient = torch.tensor([3.0, -2.0])
        gradclip_ext.clip_grad_value_(ref.parameter(gradient), 0)
        assert gradient.tolist() == [0.0, 0.0]

    def test_bound_beyond_float16(self):
        # torch refuses a clip_value that float16 cannot hold.
        gradient = torch.tensor([3.0, -65504.0], dtype=torch.float16)
        gradclip_ext.clip_grad_value_(ref.parameter(gradient), 1e6)
        assert gradient.tolist() == [3.0, -65504.0]

    @pytest.mark.parametrize("coalesced", [True, False], ids=["coalesced", "uncoalesced"])
    def test_sparse_values(self, coalesced):
        weight = torch.nn.Parameter(torch.zeros(4))
        sparse = torch.sparse_coo_tensor(
            torch.tensor([[1, 1, 3]]), torch.tensor([2.0, 2.0, -0.5]), (4,), check_invariants=True
        )
        weight.grad = sparse.coalesce() if coalesced else sparse
        gradclip_ext.clip_grad_value_([weight], 3.0)
        assert weight.grad.to_dense().tolist() == [0.0, 3.0, 0.0, -0.5]

    def test_complex_is_refused_before_anything_changes(self):
        gradients = [torch.tensor([5.0]), torch.tensor([5.0 + 1j])]
        with pytest.raises(RuntimeError, match=r"parameters\[1\].grad: clamp is not supported"):
            gradclip_ext.clip_grad_value_(ref.parameters(gradients), 1.0)
        assert gradients[0].item() == 5.0


class TestMaxNorm:
    @by_way
    def test_infinite_max_norm_only_measures(self, mixed):
        for value, expected in ((math.inf, math.inf), (3.0, 5.0)):
            gradients = [torch.tensor([value, 4.0])]
            if mixed:
                gradients.append(torch.zeros(4, 4)[:, ::2])
            norm = gradclip_ext.clip_grad_norm_(ref.parameters(gradients), math.inf)
            assert norm.item() == expected
            assert gradients[0].tolist() == [value, 4.0]
            gradclip_ext.clip_grads_with_norm_(ref.parameters(gradients), math.inf, math.nan)
            assert gradients[0].tolist() == [value, 4.0]

    @by_way
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=name_of)
    @pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "one-element"])
    def test_max_norm_may_be_a_tensor(self, shape, dtype, mixed):
        gradients = [torch.tensor([30.0, 40.0])]
        if mixed:
            gradients.append(torch.zeros(4, 4)[:, ::2])
        max_norm = torch.full(shape, 5, dtype=dtype)
        norm = gradclip_ext.clip_grad_norm_(ref.parameters(gradients), max_norm)
        assert norm.item() == 50.0
        assert gradients[0].tolist() == pytest.approx([3.0, 4.0], rel=1e-6)
        gradclip_ext.clip_grads_with_norm_(ref.parameters(gradients), max_norm / 5, norm / 10)
        assert gradients[0].tolist() == pytest.approx([0.6, 0.8], rel=1e-6)

    @pytest.mark.parametrize("value", [-1.0, math.nan], ids=str)
    def test_bad_tensor_makes_nan_on_every_device_alike(self, value):
        gradient = torch.tensor([3.0, 4.0])
        gradclip_ext.clip_grad_norm_(ref.parameter(gradient), torch.tensor(value))
        assert gradient.isnan().all()

    def test_zero_max_norm_zeroes(self):
        gradient = torch.tensor([3.0, 4.0])
        gradclip_ext.clip_grad_norm_(ref.parameter(gradient), 0)
        assert gradient.tolist() == [0.0, 0.0]

    def test_threshold_is_torchs_to_the_epsilon(self):
        # The norm is exactly max_norm: torch's 1e-6 makes the coefficient a little below 1.
        for norm, max_norm in ((5.0, 5.0), (5.0, 5.000001), (5.0, 5.000002)):
            ours, theirs = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])
            assert gradclip_ext.clip_grad_norm_(ref.parameter(ours), max_norm).item() == norm
            torch.nn.utils.clip_grad_norm_(ref.parameter(theirs), max_norm)
            torch.testing.assert_close(ours, theirs, rtol=1.2e-7, atol=0)


class TestSharedMemory:
    """Each occurrence is scaled, natively and by the fallback."""

    @pytest.mark.parametrize("norm_type", [2.0, 3.0], ids=["native order", "torch's order"])
    def test_a_strided_view_twice(self, norm_type):
        ours, theirs = torch.ones(8), torch.ones(8)
        mine, other = ref.Holder(ours[::2]), ref.Holder(theirs[::2])
        gradclip_ext.clip_grad_norm_([mine, mine], 1.0, norm_type)
        torch.nn.utils.clip_grad_norm_([other, other], 1.0, norm_type)
        torch.testing.assert_close(ours, theirs)

    def test_a_whole_and_a_strided_view_of_it(self):
        ours, theirs = torch.ones(8), torch.ones(8)
        gradclip_ext.clip_grad_norm_([ref.Holder(ours), ref.Holder(ours[::2])], 1.0)
        torch.nn.utils.clip_grad_norm_([ref.Holder(theirs), ref.Holder(theirs[::2])], 1.0)
        torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("coalesced", [True, False], ids=["coalesced", "uncoalesced"])
    def test_a_sparse_gradient_twice(self, coalesced):
        sparse = torch.sparse_coo_tensor(
            torch.tensor([[0, 0, 2]]), torch.tensor([1.0, 2.0, 4.0]), (5,), check_invariants=True
        )
        sparse = sparse.coalesce() if coalesced else sparse
        norm = gradclip_ext.clip_grad_norm_([ref.Holder(sparse), ref.Holder(sparse)], 1.0)
        assert norm.item() == pytest.approx(math.sqrt(50), rel=1e-6)
        expected = torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0]) / 50
        torch.testing.assert_close(sparse.to_dense(), expected)


class TestNothingIsWrittenWithoutNeed:
    def test_uncoalesced_sparse_gradient(self):
        values = torch.tensor([2048.0, 1.0], dtype=torch.float16)  # their sum would round
        sparse = torch.sparse_coo_tensor([[0, 0]], values, (3,), check_invariants=True)
        version = sparse._version
        gradclip_ext.clip_grad_norm_([ref.Holder(sparse)], 1e5)
        assert sparse._values().tolist() == [2048.0, 1.0]
        assert not sparse.is_coalesced()
        assert sparse._version > version

    @pytest.mark.parametrize("max_norm", [1e5, math.inf], ids=["quiet", "measured only"])
    def test_fallback_bumps_versions_as_torch_does(self, max_norm):
        view = torch.ones(4, 4)[:, ::2]
        version = view._version
        gradclip_ext.clip_grad_norm_([ref.Holder(view)], max_norm)
        assert view._version > version


class TestSideEffects:
    @pytest.mark.parametrize("max_norm", [1e-3, 1e9], ids=["clip", "quiet"])
    @pytest.mark.parametrize("strided", [False, True], ids=["native", "fallback"])
    def test_version_counter(self, max_norm, strided):
        gradient = torch.ones(4, 4)[:, ::2] if strided else torch.ones(4)
        start = gradient._version
        gradclip_ext.get_total_norm([gradient])
        assert gradient._version == start
        gradclip_ext.clip_grad_norm_(ref.parameter(gradient), max_norm)
        assert gradient._version > start
        start = gradient._version
        gradclip_ext.clip_grad_value_(ref.parameter(gradient), 10.0)
        assert gradient._version > start

    def test_autograd_notices_the_change(self):
        x = torch.tensor([2.0], requires_grad=True)
        weight = torch.nn.Parameter(torch.tensor([3.0]))
        (gradient,) = torch.autograd.grad((weight * x).pow(2).sum(), weight, create_graph=True)
        penalty = gradient.pow(2).sum()
        weight.grad = gradient
        gradclip_ext.clip_grad_norm_([weight], 0.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            penalty.backward()

    def test_gradient_that_requires_grad(self):
        gradient = torch.ones(3, requires_grad=True)
        norm = gradclip_ext.get_total_norm([gradient])
        assert not norm.requires_grad
        gradclip_ext.clip_grad_norm_(ref.parameter(gradient), 1e-3)
        assert gradient.is_leaf and gradient.requires_grad

    # Only the GPU knows whether it will write, so there they are not shared afterwards.
    @pytest.mark.cpu_only
    def test_copy_on_write_tensors_stay_shared_until_written(self):
        original = torch.ones(1000)
        lazy = torch._lazy_clone(original)
        gradclip_ext.get_total_norm([lazy])
        assert torch._C._is_cow_tensor(lazy)
        gradclip_ext.clip_grad_norm_(ref.parameter(lazy), 1e9)
        assert torch._C._is_cow_tensor(lazy), "a quiet call does not write"
        gradclip_ext.clip_grad_norm_(ref.parameter(lazy), 1.0)
        assert not torch._C._is_cow_tensor(lazy)
        assert original.tolist() == [1.0] * 1000
        assert lazy[0].item() == pytest.approx(1000**-0.5, rel=1e-6)

    def test_inference_mode(self):
        with torch.inference_mode():
            gradient = torch.tensor([3.0, 4.0])
            holder = torch.zeros(2)
            holder.grad = gradient
            norm = gradclip_ext.clip_grad_norm_([holder], 1.0)
            assert norm.is_inference()
            assert gradient.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)
        assert gradclip_ext.get_total_norm([gradient]).item() == pytest.approx(1.0)
        ordinary = torch.tensor([5.0])
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            gradclip_ext.clip_grad_norm_([ref.parameter(ordinary), holder], 0.1)
        assert ordinary.item() == 5.0

    def test_default_device_mode_stays_native(self):
        gradient = torch.tensor([3.0, 4.0])
        with torch.device(gradient.device):
            assert not gradclip_ext._C.observed()
            assert gradclip_ext.clip_grad_norm_(ref.parameter(gradient), 1.0).item() == 5.0
        with torch.device("meta"):
            assert not gradclip_ext._C.observed()
            assert gradclip_ext.get_total_norm([gradient]).device == gradient.device

    def test_number_as_norm_under_a_default_device(self):
        gradients = [torch.full((4,), 8.0), torch.full((8,), 8.0)[::2]]
        with torch.device("meta"):
            gradclip_ext.clip_grads_with_norm_([ref.Holder(g) for g in gradients], 1.0, 4.0)
        for gradient in gradients:
            assert gradient.tolist() == pytest.approx([2.0] * 4, rel=1e-6)

    @pytest.mark.filterwarnings("ignore")
    def test_forward_mode_tangents_are_carried_along(self):
        import torch.autograd.forward_ad as forward_ad

        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.tensor([[3.0, 4.0]]), torch.ones(1, 2))
            norm = gradclip_ext.get_total_norm([dual], 2.0, False, False)
            assert forward_ad.unpack_dual(norm).tangent.item() == pytest.approx(1.4)
        assert gradclip_ext._C.is_native(torch.ones(2, requires_grad=True))

    @pytest.mark.cpu_only
    def test_autocast_changes_nothing(self):
        gradient = ref.random_gradient((300,))
        expected = gradclip_ext.get_total_norm([gradient])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(gradclip_ext.get_total_norm([gradient]), expected)

    @pytest.mark.cpu_only
    def test_flushing_denormals_does_not_change_16_bit_values(self):
        smallest = torch.full((100,), 2.0**-24, dtype=torch.float16)
        expected = gradclip_ext.get_total_norm([smallest], dtype=torch.float64)
        assert expected.item() == 2.0**-24 * 10
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush subnormals")
        try:
            found = gradclip_ext.get_total_norm([smallest], dtype=torch.float64)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("strided", [False, True], ids=["native", "fallback"])
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_profiler_shows_one_range(self, name, strided):
        arguments = {
            "clip_grad_norm_": (1.0,),
            "get_total_norm": (),
            "clip_grads_with_norm_": (1.0, 5.0),
            "clip_grad_value_": (0.5,),
        }[name]
        gradient = torch.ones(8)[::2] if strided else torch.ones(4)
        given = [gradient] if name == "get_total_norm" else [ref.Holder(gradient)]
        with torch.profiler.profile() as profile:
            getattr(gradclip_ext, name)(given, *arguments)
        # A GPU has a second one of the same name, around the kernels.
        on_cpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CPU]
        assert [e.name for e in on_cpu].count(f"gradclip_ext::{name}") == 1


@by_16_bit_dtype
def test_every_16_bit_value_scales_with_one_rounding(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    for norm in (1.5, 3.0, 7.77, 1e4):
        gradient = finite.clone()
        gradclip_ext.clip_grads_with_norm_(ref.parameter(gradient), 1.0, norm)
        coefficient = torch.tensor(ref.reference_coefficient(1.0, norm), dtype=torch.float64)
        expected = (finite.float() * coefficient.float()).to(dtype)
        assert torch.equal(gradient.view(torch.int16), expected.view(torch.int16))


@by_16_bit_dtype
def test_every_16_bit_value_is_measured_right(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for value in every[::54].tolist():
        gradient = torch.full((9,), value, dtype=torch.float64).to(dtype)
        norm = gradclip_ext.get_total_norm([gradient], dtype=torch.float64).item()
        if math.isnan(value):
            assert math.isnan(norm)
        else:
            assert norm == pytest.approx(3.0 * abs(value), rel=1e-15)
    finite = every[every.isfinite()]
    total = gradclip_ext.get_total_norm([finite], 1.0, dtype=torch.float64).item()
    assert total == pytest.approx(finite.double().abs().sum().item(), rel=1e-14)


@by_16_bit_dtype
def test_every_16_bit_nan_and_infinity_stays_one(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    scaled, limited = every.clone(), every.clone()
    gradclip_ext.clip_grads_with_norm_(ref.parameter(scaled), 1.0, 3.0)
    gradclip_ext.clip_grad_value_(ref.parameter(limited), 1.0)
    assert torch.equal(scaled.isnan(), every.isnan())
    assert torch.equal(scaled.isinf(), every.isinf())
    assert torch.equal(limited.nan_to_num(0.0), every.nan_to_num(0.0).clamp(-1.0, 1.0))
    assert torch.equal(limited.isnan(), every.isnan())


@by_16_bit_dtype
@pytest.mark.parametrize("bits", [0x7FF8000000000000, -1, 0x7FFFFFFFFFFFFFFF, 0x7FF80000E0000000])
def test_any_nan_as_norm_makes_nan(bits, dtype):
    # For any NaN payload: rounding to bfloat16 must not carry out of it and give a number.
    nan = torch.tensor([bits], dtype=torch.int64).view(torch.float64)
    gradient = torch.arange(-50, 50).to(dtype)
    gradclip_ext.clip_grads_with_norm_(ref.parameter(gradient), 1.0, nan)
    assert gradient.isnan().all()
