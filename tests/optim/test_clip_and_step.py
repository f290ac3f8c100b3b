"""clip_and_step does what clipping and a step do, and leaves no trace on the optimizer."""

from __future__ import annotations

import functools
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
    is_known,
    make_parameters,
    make_scaler,
    numbers_stay_in_tensors,
    same,
    scale_gradients,
    stage,
    ulps,
    values,
)
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from gradclip_ext import clip_and_step, clip_grad_norm_

LR = 0.1
MAX_NORM = 0.5
FUSED = {
    "AdamW": functools.partial(AdamW, lr=LR),
    "AdamW, amsgrad": functools.partial(AdamW, lr=LR, amsgrad=True),
    "AdamW, maximize": functools.partial(AdamW, lr=LR, maximize=True),
    "AdamW, capturable": functools.partial(AdamW, lr=LR, capturable=True),
    "AdamW, tensor lr": lambda p, **settings: AdamW(p, lr=torch.tensor(LR), **settings),
    "Adam, decay": functools.partial(Adam, lr=LR, weight_decay=0.1),
    "SGD": functools.partial(SGD, lr=LR),
    "SGD, momentum": functools.partial(SGD, lr=LR, momentum=0.9),
    "SGD, nesterov": functools.partial(SGD, lr=LR, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD, maximize": functools.partial(SGD, lr=LR, momentum=0.9, maximize=True),
    "Adagrad": functools.partial(Adagrad, lr=LR, lr_decay=0.1),
}
by_fused = pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)


def adamw(parameters, **settings):
    return AdamW(parameters, lr=LR, **{"fused": True, **settings})


def refresh(parameters, others, seed, scale=1.0, factor=1.0):
    """New gradients for both, those of the first multiplied by a scale."""
    fresh = make_parameters(parameters[0].dtype, seed, [p.shape for p in parameters])
    for parameter, other, source in zip(parameters, others, fresh, strict=True):
        parameter.grad = source.grad * factor * scale
        other.grad = source.grad * factor


def assert_close(mine, theirs, lrs=1e-5):
    for one, other in zip(mine, theirs, strict=True):
        assert ulps(one.grad, other.grad) <= 1
        torch.testing.assert_close(one, other, rtol=0, atol=lrs * LR)


def no_trace(optimizer):
    return not {"grad_scale", "found_inf"} & set(vars(optimizer))


@by_fused
class TestEveryFusedOptimizer:
    @pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
    def test_five_steps(self, make, scaled, monkeypatch):
        mine = make_parameters()
        theirs = copies(mine)
        optimizer, other = make(mine, fused=True), make(theirs, fused=True)
        scaler = make_scaler() if scaled else None
        for step in range(5):
            # The third is not clipped.
            factor = 1e-3 if step == 2 else 1.0
            refresh(mine, theirs, step, SCALE if scaled else 1.0, factor)
            with monkeypatch.context() as patch:
                calls = Calls(patch)
                norm = clip_and_step(optimizer, MAX_NORM, scaler=scaler)
            assert calls.counts["grad_norms"] == 1
            if is_known(norm):
                # On a GPU, what multiplies by 1 unless the coefficient is very small.
                assert calls.counts["scale_"] == 0
            expected = clip_grad_norm_(theirs, MAX_NORM)
            torch.testing.assert_close(norm, expected, rtol=2e-7, atol=0)
            other.step()
            assert_close(mine, theirs)
            assert no_trace(optimizer)
            if scaled:
                scaler.update()

    @pytest.mark.cpu_only
    def test_on_a_device_without_waiting(self, make):
        mine = make_parameters()
        theirs = copies(mine)
        optimizer, other = make(mine, fused=True), make(theirs, fused=True)
        for seed in range(3):
            refresh(mine, theirs, seed)
            before = gradients(mine)
            # The step itself reads numbers where they are, here on the CPU.
            with numbers_stay_in_tensors():
                steps = _steps_of(optimizer, MAX_NORM, skips=seed > 0)
            assert same(gradients(mine), before)
            steps.take()
            clip_grad_norm_(theirs, MAX_NORM)
            other.step()
            assert_close(mine, theirs)
            assert no_trace(optimizer)

    @pytest.mark.cpu_only
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_overflow_with_a_scaler_skips(self, make, value):
        mine = make_parameters()
        scale_gradients(mine)
        mine[1].grad[3] = value
        before, weights = gradients(mine), values(mine)
        optimizer, scaler = make(mine, fused=True), make_scaler()
        # Not every version of torch says so of Adagrad.
        supports = getattr(optimizer, "_step_supports_amp_scaling", None)
        called = []
        optimizer.register_step_post_hook(lambda *_: called.append(True))
        norm = clip_and_step(optimizer, MAX_NORM, scaler=scaler)
        assert not norm.isfinite()
        assert called == []
        assert same(gradients(mine), before) and same(values(mine), weights)
        assert stage(scaler, optimizer) == "STEPPED" and flags(scaler, optimizer) == 1.0
        assert no_trace(optimizer)
        assert getattr(optimizer, "_step_supports_amp_scaling", None) == supports
        scaler.update()
        assert scaler.get_scale() == SCALE / 2
        # No uninitialized momentum, no counted step.
        theirs = copies(mine)
        other = make(theirs, fused=True)
        refresh(mine, theirs, 1, SCALE / 2)
        clip_and_step(optimizer, MAX_NORM, scaler=scaler)
        clip_grad_norm_(theirs, MAX_NORM)
        other.step()
        assert_close(mine, theirs)


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ref.name_of)
    @pytest.mark.parametrize("cls", [AdamW, Adam, SGD, Adagrad])
    def test_16_bits(self, cls, dtype, monkeypatch):
        mine = make_parameters(dtype)
        theirs = copies(mine)
        optimizer, other = cls(mine, lr=LR, fused=True), cls(theirs, lr=LR, fused=True)
        for seed in range(3):
            refresh(mine, theirs, seed)
            with monkeypatch.context() as patch:
                calls = Calls(patch)
                norm = clip_and_step(optimizer, MAX_NORM)
            assert calls.counts["scale_"] == 0 or not is_known(norm)
            assert norm.dtype == dtype
            assert norm.item() == clip_grad_norm_(theirs, MAX_NORM).item()
            other.step()
            for one, another in zip(mine, theirs, strict=True):
                assert ulps(one.grad, another.grad) <= 1
                # The kernel steps with the gradient that it has not rounded yet.
                torch.testing.assert_close(one, another, rtol=0, atol=LR)

    def test_two_dtypes(self):
        mine = make_parameters() + make_parameters(torch.bfloat16)
        theirs = copies(mine)
        optimizer = adamw([{"params": mine[:4]}, {"params": mine[4:]}])
        assert clip_and_step(optimizer, MAX_NORM).item() == clip_grad_norm_(theirs, MAX_NORM).item()
        adamw([{"params": theirs[:4]}, {"params": theirs[4:]}]).step()
        assert_close(mine[:4], theirs[:4])
        assert_close(mine[4:], theirs[4:], lrs=1.0)

    def test_float16_with_a_scaler_is_refused_in_torchs_words(self):
        mine = make_parameters(torch.float16)
        before, optimizer, scaler = gradients(mine), adamw(mine), make_scaler()
        with pytest.raises(ValueError, match=r"^Attempting to unscale FP16 gradients.$"):
            clip_and_step(optimizer, MAX_NORM, scaler=scaler)
        assert same(gradients(mine), before) and stage(scaler, optimizer) == "READY"


@pytest.mark.cpu_only
class TestCoefficient:
    def test_one_sets_nothing(self, monkeypatch):
        mine = make_parameters()
        optimizer, seen = adamw(mine), []
        optimizer.register_step_post_hook(lambda *_: seen.append(no_trace(optimizer)))
        before = gradients(mine)
        calls = Calls(monkeypatch)
        clip_and_step(optimizer, 1e6)
        assert seen == [True]
        assert calls.counts == {"grad_norms": 1, "scale_": 0}
        assert same(gradients(mine), before)

    @pytest.mark.parametrize("cls", [RMSprop, AdamW])
    def test_one_of_an_optimizer_of_any_kind_writes_nothing(self, cls, monkeypatch):
        mine = make_parameters()
        before, calls = gradients(mine), Calls(monkeypatch)
        clip_and_step(cls(mine, lr=LR), 1e6)
        assert calls.counts == {"grad_norms": 1, "scale_": 0}
        assert same(gradients(mine), before)

    @pytest.mark.parametrize("on_device", [False, True], ids=["known", "in tensors"])
    @pytest.mark.parametrize("max_norm", [1e-36, 1e-39, 1e-44, 0.0])
    def test_too_small_for_a_float32(self, max_norm, on_device, monkeypatch):
        # The reciprocal would be infinite, and every gradient 0.
        mine = [nn.Parameter(torch.ones(3))]
        mine[0].grad = torch.tensor([3e15, -4e15, 0.0])
        theirs = copies(mine)
        optimizer = SGD(mine, lr=LR, fused=True)
        if on_device:
            # Before the step, in which the CPU reads its numbers.
            with numbers_stay_in_tensors():
                steps = _steps_of(optimizer, max_norm)
            steps.take()
        else:
            clip_and_step(optimizer, max_norm)
        clip_grad_norm_(theirs, max_norm)
        assert same(gradients(mine), gradients(theirs))

    def test_a_small_one_that_a_float32_holds(self):
        mine = [nn.Parameter(torch.ones(3))]
        mine[0].grad = torch.tensor([3e5, -4e5, 0.0])
        theirs = copies(mine)
        clip_and_step(SGD(mine, lr=LR, fused=True), 1e-20)
        clip_grad_norm_(theirs, 1e-20)
        assert ulps(mine[0].grad, theirs[0].grad) <= 1
        assert mine[0].grad[0].item() > 0.0

    def test_max_norm_in_a_tensor_and_other_norms(self):
        for norm_type in (1.0, math.inf, 3.0):
            mine = make_parameters()
            theirs = copies(mine)
            clip_and_step(adamw(mine), torch.tensor(MAX_NORM), norm_type)
            clip_grad_norm_(theirs, MAX_NORM, norm_type)
            adamw(theirs).step()
            for one, other in zip(mine, theirs, strict=True):
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=0)
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6)

    def test_random_coefficients_to_one_ulp(self):
        generator = torch.Generator("cpu").manual_seed(0)
        for seed in range(30):
            mine = make_parameters(seed=seed)
            theirs = copies(mine)
            max_norm = 10.0 ** (torch.rand((), generator=generator, device="cpu").item() * 12 - 11)
            clip_and_step(SGD(mine, lr=LR, fused=True), max_norm)
            clip_grad_norm_(theirs, max_norm)
            SGD(theirs, lr=LR, fused=True).step()
            assert_close(mine, theirs)


def _steps_of(optimizer, max_norm, skips=False):
    """The steps as clip_and_step prepares them, before they are taken."""
    from gradclip_ext import _handover, _measured, _ops, _owners

    owners = _owners.read_owners([optimizer], "test")
    caller = _ops.Caller("test")
    with torch.no_grad():
        measured = _measured.measure([(owners[0].clipped, 1.0)], 2.0, caller)
        coefficient = _ops.norm_coefficient(max_norm, measured.norm)
        if skips:
            skips = _ops.isfinite(measured.norm) ^ True
        return _handover.Steps(owners, _handover.Factors(coefficient, skips=skips), caller)


@pytest.mark.cpu_only
class TestNonfinite:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("make", [adamw, RMSprop], ids=["fused", "plain"])
    def test_without_a_scaler_as_torch(self, make, value):
        mine = make_parameters()
        mine[1].grad[3] = value
        theirs = copies(mine)
        clip_and_step(make(mine), MAX_NORM)
        clip_grad_norm_(theirs, MAX_NORM)
        make(theirs).step()
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad, equal_nan=True)
            torch.testing.assert_close(one, other, equal_nan=True)

    @pytest.mark.parametrize("make", [adamw, RMSprop], ids=["fused", "plain"])
    def test_known_and_skipped_calls_no_step(self, make):
        mine = make_parameters()
        mine[1].grad[3] = math.nan
        before, weights = gradients(mine), values(mine)
        optimizer, called = make(mine), []
        optimizer.register_step_post_hook(lambda *_: called.append(True))
        assert clip_and_step(optimizer, MAX_NORM, skip_nonfinite=True).isnan()
        assert called == [] and len(optimizer.state) == 0
        assert same(gradients(mine), before) and same(values(mine), weights)

    @pytest.mark.parametrize("make", [adamw, functools.partial(SGD, lr=LR, fused=True)])
    def test_on_a_device_by_found_inf(self, make):
        mine = make_parameters()
        mine[1].grad[3] = math.nan
        before, weights = gradients(mine), values(mine)
        optimizer = make(mine)
        with numbers_stay_in_tensors():
            steps = _steps_of(optimizer, MAX_NORM, skips=True)
        found = []
        optimizer.register_step_post_hook(lambda *_: found.append(optimizer.found_inf.clone()))
        steps.take()
        assert found[0].item() == 1.0 and found[0].dtype == torch.float32
        assert same(gradients(mine), before) and same(values(mine), weights)
        assert no_trace(optimizer)

    def test_the_first_step_of_momentum_reads_the_flag_once(self):
        # torch would keep momentum buffers that nothing was ever written to.
        mine = make_parameters()
        optimizer = SGD(mine, lr=LR, momentum=0.9, fused=True)
        mine[1].grad[3] = math.nan
        with numbers_stay_in_tensors(), pytest.raises(AssertionError, match="read on the host"):
            _steps_of(optimizer, MAX_NORM, skips=True)
        with pytest.MonkeyPatch.context() as patch:
            from gradclip_ext import _ops

            patch.setattr(_ops, "known", lambda number: number)
            clip_and_step(optimizer, MAX_NORM, skip_nonfinite=True)
            assert len(optimizer.state) == 0
            refresh(mine, copies(mine), 1)
            clip_and_step(optimizer, MAX_NORM, skip_nonfinite=True)
        assert all("momentum_buffer" in optimizer.state[p] for p in mine)
        with numbers_stay_in_tensors():
            _steps_of(optimizer, MAX_NORM, skips=True)

    def test_the_first_step_of_momentum_with_a_scaler(self, monkeypatch):
        from gradclip_ext import _ops

        monkeypatch.setattr(_ops, "known", lambda number: number)
        mine = make_parameters()
        mine[1].grad[3] = math.inf
        optimizer, scaler = SGD(mine, lr=LR, momentum=0.9, fused=True), make_scaler()
        clip_and_step(optimizer, MAX_NORM, scaler=scaler)
        assert len(optimizer.state) == 0 and stage(scaler, optimizer) == "STEPPED"
        assert optimizer._step_supports_amp_scaling

    def test_a_plain_optimizer_on_a_device_reads_the_flag(self):
        mine = make_parameters()
        with numbers_stay_in_tensors(), pytest.raises(AssertionError, match="read on the host"):
            _steps_of(RMSprop(mine), MAX_NORM, skips=True)

    def test_with_a_scaler_of_which_the_host_knows_no_number(self):
        from gradclip_ext import _ops

        for value, skipped in ((1.0, False), (math.inf, True)):
            mine = make_parameters()
            mine[1].grad[3] = value
            theirs = copies(mine)
            scale_gradients(mine)
            weights = values(mine)
            optimizer, scaler = adamw(mine), make_scaler()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_ops, "known", lambda number: number)
                clip_and_step(optimizer, MAX_NORM, scaler=scaler)
            assert flags(scaler, optimizer) == float(skipped)
            assert no_trace(optimizer)
            if skipped:
                assert same(values(mine), weights)
            else:
                clip_grad_norm_(theirs, MAX_NORM)
                adamw(theirs).step()
                assert_close(mine, theirs)


class TestScaler:
    """With a GradScaler: as unscale_, clip_grad_norm_ and step."""

    @pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
    def test_200_steps_with_overflows(self, fused):
        def update(optimizer, scaler, max_norm):
            clip_and_step(optimizer, max_norm, scaler=scaler)

        compare_200_steps(update, fused)

    def test_in_the_step_gradients_are_unscaled_and_clipped_at_once(self):
        mine = make_parameters()
        scale_gradients(mine)
        optimizer, scaler, seen = adamw(mine), make_scaler(), []

        def hook(*_):
            seen.append((stage(scaler, optimizer), optimizer.grad_scale, optimizer.found_inf))

        optimizer.register_step_post_hook(hook)
        norm = clip_and_step(optimizer, MAX_NORM, scaler=scaler)
        found_stage, grad_scale, found_inf = seen[0]
        assert found_stage == "UNSCALED"
        assert grad_scale.item() == pytest.approx(SCALE * norm.item() / MAX_NORM, rel=1e-5)
        assert grad_scale.dtype == torch.float32 and grad_scale.shape == ()
        assert found_inf.item() == 0.0

    def test_a_scale_that_is_all_there_is_to_do(self):
        mine = make_parameters()
        theirs = copies(mine)
        scale_gradients(mine)
        clip_and_step(adamw(mine), math.inf, scaler=make_scaler())
        adamw(theirs).step()
        assert_close(mine, theirs)

    @pytest.mark.parametrize("name", ["unscale_", "_unscale_grads_"])
    def test_one_that_unscales_in_its_own_way(self, name):
        mine = make_parameters()
        theirs = copies(mine)
        scale_gradients(mine)
        optimizer, scaler = adamw(mine), make_scaler()
        called, original = [], getattr(scaler, name)
        setattr(scaler, name, lambda *arguments: [called.append(name), original(*arguments)][1])
        clip_and_step(optimizer, MAX_NORM, scaler=scaler)
        clip_grad_norm_(theirs, MAX_NORM)
        adamw(theirs).step()
        assert called == [name]
        assert_close(mine, theirs)

    def test_disabled_is_none(self):
        mine = make_parameters()
        theirs = copies(mine)
        clip_and_step(adamw(mine), MAX_NORM, scaler=torch.amp.GradScaler(enabled=False))
        clip_and_step(adamw(theirs), MAX_NORM)
        assert same(values(mine), values(theirs))

    @pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
    def test_no_gradients(self, fused):
        mine = [nn.Parameter(torch.ones(3))]
        optimizer, scaler = AdamW(mine, fused=fused), make_scaler()
        if fused:
            # As torch, which has nothing to step and says so only in update().
            assert clip_and_step(optimizer, MAX_NORM, scaler=scaler).item() == 0.0
            with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
                scaler.update()
            return
        with pytest.raises(AssertionError) as caught:
            clip_and_step(optimizer, MAX_NORM, scaler=scaler)
        assert str(caught.value) == (
            "No inf checks were recorded for this optimizer. clip_and_step: optimizer has to have "
            "gradients for the scaler, found none"
        )
        assert stage(scaler, optimizer) == "READY"

    def test_the_second_has_no_gradients_and_the_first_is_not_stepped(self):
        mine = make_parameters()
        scale_gradients(mine)
        before, weights, scaler = gradients(mine), values(mine), make_scaler()
        optimizers = [adamw(mine), SGD([nn.Parameter(torch.ones(3))])]
        with pytest.raises(AssertionError, match=r"optimizer\[1\] has to have gradients"):
            clip_and_step(optimizers, MAX_NORM, scaler=scaler)
        assert same(gradients(mine), before) and same(values(mine), weights)
        assert stage(scaler, optimizers[0]) == "READY"

    def test_already_unscaled(self):
        mine = make_parameters()
        optimizer, scaler = adamw(mine), make_scaler()
        scaler.unscale_(optimizer)
        before, weights = gradients(mine), values(mine)
        with pytest.raises(RuntimeError, match=r"^unscale_\(\) has already been called on this"):
            clip_and_step(optimizer, MAX_NORM, scaler=scaler)
        assert same(gradients(mine), before) and same(values(mine), weights)
        assert stage(scaler, optimizer) == "UNSCALED" and no_trace(optimizer)
