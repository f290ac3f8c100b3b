"""unscale_and_clip_grad_norm_ leaves gradients and scaler as unscale_ and clip_grad_norm_ do."""

from __future__ import annotations

import math

import pytest
import reference as ref
import torch
from scaling import (
    SCALE,
    Calls,
    compare_200_steps,
    copies,
    flags,
    gradients,
    make_parameters,
    make_scaler,
    numbers_stay_in_tensors,
    one_rank,
    same,
    scale_gradients,
    stage,
    ulps,
    values,
)
from torch import nn

import gradclip_ext
from gradclip_ext import clip_grad_norm_, unscale_and_clip_grad_norm_

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
MAX_NORMS = (0.5, 1e6, math.inf, 0.0)


def sgd(parameters, **settings):
    return torch.optim.SGD(parameters, lr=0.1, **settings)


def both(dtype=torch.float32, **settings):
    """Twice the same parameters with scaled gradients, their optimizers and scalers."""
    mine = make_parameters(dtype)
    scale_gradients(mine)
    theirs = copies(mine)
    return (
        (mine, sgd(mine), make_scaler(**settings)),
        (theirs, sgd(theirs), make_scaler(**settings)),
    )


def recipe(scaler, optimizer, parameters, max_norm, norm_type=2.0):
    scaler.unscale_(optimizer)
    return clip_grad_norm_(parameters, max_norm, norm_type)


class TestValues:
    @pytest.mark.parametrize("max_norm", MAX_NORMS)
    @pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0, 0.0, 0.5])
    @pytest.mark.parametrize("dtype", DTYPES, ids=ref.name_of)
    def test_same_as_unscale_and_clip(self, dtype, norm_type, max_norm):
        (mine, optimizer, scaler), (theirs, other, other_scaler) = both(dtype)
        found = unscale_and_clip_grad_norm_(scaler, optimizer, max_norm, norm_type)
        expected = recipe(other_scaler, other, theirs, max_norm, norm_type)
        assert found.dtype == expected.dtype == dtype
        assert found.shape == () and found.device == expected.device
        # Norms of other orders are torch's own there, computed and rounded in the gradients' dtype.
        is_native = norm_type in ref.NATIVE_NORM_TYPES
        rtol = (2 if is_native else 8) * torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=rtol, atol=0)
        for one, another in zip(gradients(mine), gradients(theirs), strict=True):
            assert ulps(one, another) <= (1 if is_native else 8)
        assert stage(scaler, optimizer) == stage(other_scaler, other) == "UNSCALED"
        assert flags(scaler, optimizer) == flags(other_scaler, other) == 0.0

    @pytest.mark.parametrize("scale", [1.0, 3.0, 65536.0, 1e-3])
    def test_scales_that_are_no_power_of_two(self, scale):
        parameters = make_parameters()
        expected = ref.reference_norm([p.grad for p in parameters], 2.0)
        before = [ref.widened(p.grad) for p in parameters]
        scale_gradients(parameters, scale)
        norm = unscale_and_clip_grad_norm_(make_scaler(scale), sgd(parameters), 0.5)
        assert norm.item() == pytest.approx(expected, rel=1e-6)
        for parameter, gradient in zip(parameters, before, strict=True):
            wanted = gradient * 0.5 / (expected + 1e-6)
            torch.testing.assert_close(parameter.grad.double(), wanted, rtol=1e-6, atol=0)

    def test_max_norm_in_a_tensor(self):
        (mine, optimizer, scaler), (theirs, other, other_scaler) = both()
        unscale_and_clip_grad_norm_(scaler, optimizer, torch.tensor([0.5]))
        recipe(other_scaler, other, theirs, 0.5)
        assert all(ulps(*p) <= 1 for p in zip(gradients(mine), gradients(theirs), strict=True))

    def test_layouts_and_a_sparse_gradient(self):
        transposed = nn.Parameter(torch.ones(4, 3))
        transposed.grad = torch.arange(12.0).view(3, 4).t()
        gaps = nn.Parameter(torch.ones(5))
        gaps.grad = torch.arange(10.0)[::2]
        table = nn.Parameter(torch.ones(4, 2))
        indices = torch.tensor([[1, 3, 1]])
        table.grad = torch.sparse_coo_tensor(indices, torch.arange(6.0).view(3, 2), (4, 2))
        mine = [transposed, gaps, table]
        theirs = [nn.Parameter(p.detach().clone()) for p in mine]
        for one, other in zip(mine, theirs, strict=True):
            other.grad = one.grad.clone()
        scale = make_scaler(2.0)
        norm = unscale_and_clip_grad_norm_(scale, sgd(mine), 1.0)
        expected = recipe(make_scaler(2.0), sgd(theirs), theirs, 1.0)
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one.grad.to_dense(), other.grad.to_dense())

    def test_float64_norm_beyond_its_range_is_no_overflow(self):
        # The squares overflow, the elements do not: torch's scaler goes on.
        parameters = [nn.Parameter(torch.ones(2, dtype=torch.float64))]
        parameters[0].grad = torch.full((2,), 1e200, dtype=torch.float64)
        optimizer, scaler = sgd(parameters), make_scaler(1.0)
        assert unscale_and_clip_grad_norm_(scaler, optimizer, 1.0).item() == math.inf
        assert flags(scaler, optimizer) == 0.0
        assert parameters[0].grad.tolist() == [0.0, 0.0]

    def test_norms_that_hide_an_infinity(self):
        for norm_type in (0.0, -1.0, -math.inf):
            parameters = [nn.Parameter(torch.ones(2))]
            parameters[0].grad = torch.tensor([1.0, math.inf])
            optimizer, scaler = sgd(parameters), make_scaler()
            unscale_and_clip_grad_norm_(scaler, optimizer, 1.0, norm_type)
            assert flags(scaler, optimizer) == 1.0


@pytest.mark.cpu_only
class TestPasses:
    def test_one_pass_reads_and_one_writes(self, monkeypatch):
        (_, optimizer, scaler), _ = both()
        calls = Calls(monkeypatch)
        unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
        assert calls.counts == {"grad_norms": 1, "scale_": 1}

    def test_nothing_is_written_where_scale_and_coefficient_are_1(self, monkeypatch):
        parameters = make_parameters()
        calls = Calls(monkeypatch)
        unscale_and_clip_grad_norm_(make_scaler(1.0), sgd(parameters), 1e6)
        assert calls.counts == {"grad_norms": 1, "scale_": 0}

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    @pytest.mark.parametrize("dtype", DTYPES, ids=ref.name_of)
    def test_nothing_is_written_on_overflow(self, dtype, value, monkeypatch):
        (parameters, optimizer, scaler), _ = both(dtype)
        parameters[2].grad.view(-1)[17] = value
        before, weights = gradients(parameters), values(parameters)
        calls = Calls(monkeypatch)
        norm = unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
        assert not norm.isfinite()
        assert calls.counts["scale_"] == 0
        assert same(gradients(parameters), before)
        assert flags(scaler, optimizer) == 1.0
        scaler.step(optimizer)
        assert same(values(parameters), weights)
        scaler.update()
        assert scaler.get_scale() == SCALE / 2

    def test_numbers_stay_in_tensors(self):
        (mine, optimizer, scaler), (theirs, other, other_scaler) = both()
        with numbers_stay_in_tensors():
            found = unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
        expected = unscale_and_clip_grad_norm_(other_scaler, other, 0.5)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert all(ulps(*p) <= 1 for p in zip(gradients(mine), gradients(theirs), strict=True))

    def test_overflow_in_tensors_writes_nothing(self):
        (parameters, optimizer, scaler), _ = both()
        parameters[0].grad[0, 0] = math.nan
        before = gradients(parameters)
        with numbers_stay_in_tensors():
            unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
        assert same(gradients(parameters), before)
        assert flags(scaler, optimizer) == 1.0


class TestTraining:
    """200 steps, some of which overflow, as with the three calls."""

    @pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
    def test_same_as_the_three_calls(self, fused):
        def update(optimizer, scaler, max_norm):
            unscale_and_clip_grad_norm_(scaler, optimizer, max_norm)
            assert stage(scaler, optimizer) == "UNSCALED"
            scaler.step(optimizer)

        compare_200_steps(update, fused)


class TestParameters:
    def test_some_of_the_optimizer(self):
        (mine, optimizer, scaler), (theirs, other, other_scaler) = both()
        norm = unscale_and_clip_grad_norm_(scaler, optimizer, 0.5, parameters=mine[:2])
        expected = recipe(other_scaler, other, theirs[:2], 0.5)
        torch.testing.assert_close(norm, expected)
        assert all(ulps(*p) <= 1 for p in zip(gradients(mine), gradients(theirs), strict=True))

    def test_overflow_in_what_is_only_unscaled(self):
        (mine, optimizer, scaler), _ = both()
        mine[3].grad.fill_(math.inf)
        before = gradients(mine)
        norm = unscale_and_clip_grad_norm_(scaler, optimizer, 0.5, parameters=mine[:2])
        assert norm.isfinite()
        assert flags(scaler, optimizer) == 1.0
        assert same(gradients(mine), before)

    @pytest.mark.parametrize("norm_type", [2.0, 0.0, math.inf])
    def test_more_than_the_optimizer(self, norm_type):
        # The others count as unscaled, as after the unscale_ of their own optimizer.
        (mine, _, scaler), (theirs, _, other_scaler) = both()
        for parameters in (mine, theirs):
            scale_gradients(parameters[:1], 1.0 / SCALE)
        norm = unscale_and_clip_grad_norm_(
            scaler, sgd(mine[1:]), 0.5, norm_type, parameters=iter(mine)
        )
        expected = recipe(other_scaler, sgd(theirs[1:]), theirs, 0.5, norm_type)
        torch.testing.assert_close(norm, expected)
        assert all(ulps(*p) <= 1 for p in zip(gradients(mine), gradients(theirs), strict=True))

    def test_a_single_one_and_one_listed_twice(self):
        (mine, optimizer, scaler), (theirs, other, other_scaler) = both()
        unscale_and_clip_grad_norm_(scaler, optimizer, 0.5, parameters=[mine[1], mine[1]])
        unscale_and_clip_grad_norm_(other_scaler, other, 0.5, parameters=theirs[1])
        assert same(gradients(mine), gradients(theirs))

    def test_a_group_that_is_left_out(self):
        (mine, _, scaler), (theirs, other, other_scaler) = both()
        optimizer = sgd([{"params": mine[:1], "clip_grad": False}, {"params": mine[1:]}])
        norm = unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
        torch.testing.assert_close(norm, recipe(other_scaler, other, theirs[1:], 0.5))
        assert all(ulps(*p) <= 1 for p in zip(gradients(mine), gradients(theirs), strict=True))

    def test_parameters_without_gradients(self):
        (mine, optimizer, scaler), (theirs, other, other_scaler) = both()
        mine[0].grad = theirs[0].grad = None
        norm = unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
        torch.testing.assert_close(norm, recipe(other_scaler, other, theirs, 0.5))
        assert mine[0].grad is None

    def test_two_optimizers_with_one_norm(self):
        (mine, _, scaler), (theirs, _, other_scaler) = both()
        optimizers = [sgd(mine[:2]), torch.optim.Adam(mine[2:])]
        others = [sgd(theirs[:2]), torch.optim.Adam(theirs[2:])]
        norm = unscale_and_clip_grad_norm_(scaler, optimizers, 0.5)
        for other in others:
            other_scaler.unscale_(other)
        torch.testing.assert_close(norm, clip_grad_norm_(theirs, 0.5))
        assert all(ulps(*p) <= 1 for p in zip(gradients(mine), gradients(theirs), strict=True))
        assert [stage(scaler, optimizer) for optimizer in optimizers] == ["UNSCALED"] * 2

    def test_two_optimizers_one_after_the_other(self):
        (mine, _, scaler), (theirs, _, other_scaler) = both()
        # Kept, since a scaler knows an optimizer by its address.
        optimizers = [[sgd(parameters[:2]), sgd(parameters[2:])] for parameters in (mine, theirs)]
        for one, other in zip(*optimizers, strict=True):
            unscale_and_clip_grad_norm_(scaler, one, 0.5)
            recipe(other_scaler, other, other.param_groups[0]["params"], 0.5)
        assert all(ulps(*p) <= 1 for p in zip(gradients(mine), gradients(theirs), strict=True))

    def test_an_overflow_in_one_of_two_skips_both(self):
        (mine, _, scaler), _ = both()
        optimizers = [sgd(mine[:2]), sgd(mine[2:], fused=True)]
        mine[0].grad[0, 0] = math.inf
        before = values(mine)
        unscale_and_clip_grad_norm_(scaler, optimizers, 0.5)
        for optimizer in optimizers:
            scaler.step(optimizer)
        assert same(values(mine), before)

    def test_in_inference_mode_and_without_grad(self):
        (mine, optimizer, scaler), (theirs, other, other_scaler) = both()
        with torch.no_grad():
            norm = unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
        unscale_and_clip_grad_norm_(other_scaler, other, 0.5)
        assert not norm.requires_grad
        assert same(gradients(mine), gradients(theirs))


class Recording(torch.amp.GradScaler):
    """A trainer's scaler that allows float16 gradients."""

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        self.calls = getattr(self, "calls", 0) + 1
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


class TestScalersWithTheirOwnWay:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=ref.name_of)
    def test_of_a_class(self, dtype):
        mine = make_parameters(dtype)
        scale_gradients(mine, 8.0)
        theirs = copies(mine)
        scaler, other_scaler = (make_scaler(8.0, Recording) for _ in range(2))
        optimizer, other = sgd(mine), sgd(theirs)
        norm = unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
        torch.testing.assert_close(norm, recipe(other_scaler, other, theirs, 0.5))
        assert scaler.calls == 1
        assert same(gradients(mine), gradients(theirs))

    @pytest.mark.parametrize("name", ["unscale_", "_unscale_grads_"])
    def test_of_an_object(self, name):
        (mine, optimizer, scaler), (theirs, other, other_scaler) = both()
        called = []
        original = getattr(scaler, name)

        def own(*arguments):
            called.append(name)
            return original(*arguments)

        setattr(scaler, name, own)
        unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
        recipe(other_scaler, other, theirs, 0.5)
        assert called == [name]
        assert vars(scaler)[name] is own
        assert same(gradients(mine), gradients(theirs))

    def test_nothing_of_ours_is_left_on_a_plain_one(self):
        (_, optimizer, scaler), _ = both()
        before = set(vars(scaler))
        unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
        assert set(vars(scaler)) == before

    @pytest.mark.cpu_only
    def test_sharded(self):
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        with one_rank():
            import torch.distributed as dist

            mine = make_parameters()
            scale_gradients(mine)
            theirs = copies(mine)
            results = []
            for parameters, clip in ((mine, unscale_and_clip_grad_norm_), (theirs, None)):
                scaler = ShardedGradScaler("cpu", SCALE, process_group=dist.group.WORLD)
                scaler.scale(torch.ones(()))
                optimizer = sgd(parameters)
                if clip is not None:
                    results.append(clip(scaler, optimizer, 0.5))
                else:
                    results.append(recipe(scaler, optimizer, parameters, 0.5))
                scaler.step(optimizer)
                scaler.update()
            torch.testing.assert_close(*results)
            assert same(values(mine), values(theirs))


@pytest.mark.cpu_only
class TestDTensors:
    def test_same_as_plain_tensors(self):
        from torch.distributed.tensor import Shard, distribute_tensor

        with one_rank() as mesh:
            theirs = make_parameters(shapes=((4, 3), (5,)))
            scale_gradients(theirs)
            mine = []
            for parameter in theirs:
                whole = distribute_tensor(parameter.detach().clone(), mesh, [Shard(0)])
                mine.append(nn.Parameter(whole))
                mine[-1].grad = distribute_tensor(parameter.grad.clone(), mesh, [Shard(0)])
            optimizer, scaler = sgd(mine), make_scaler()
            norm = unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
            expected = recipe(make_scaler(), sgd(theirs), theirs, 0.5)
            assert type(norm) is torch.Tensor
            torch.testing.assert_close(norm, expected)
            for one, other in zip(mine, theirs, strict=True):
                torch.testing.assert_close(one.grad.full_tensor(), other.grad)
            mine[0].grad.mul_(math.inf)
            scaler.step(optimizer)
            scaler.update()
            unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
            assert flags(scaler, optimizer) == 1.0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gradients_on_two_devices():
    mine = [nn.Parameter(torch.ones(5, device=device)) for device in ("cuda", "cpu")]
    for index, parameter in enumerate(mine):
        parameter.grad = torch.full_like(parameter, SCALE * (index + 1))
    optimizer, scaler = sgd(mine), torch.amp.GradScaler("cuda", init_scale=SCALE)
    scaler.scale(torch.ones((), device="cuda"))
    norm = unscale_and_clip_grad_norm_(scaler, optimizer, 1.0)
    assert norm.item() == pytest.approx(5.0)
    assert [p.grad[0].item() for p in mine] == pytest.approx([0.2, 0.4])
    scaler.step(optimizer)
    scaler.update()


def test_it_is_public():
    assert "unscale_and_clip_grad_norm_" in gradclip_ext.__all__
