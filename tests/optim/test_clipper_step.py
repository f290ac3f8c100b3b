"""GradClipper.step does what clip_ and a step do, reports and counts the same."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from scaling import (
    SCALE,
    Calls,
    copies,
    flags,
    gradients,
    make_parameters,
    make_scaler,
    numbers_stay_in_tensors,
    same,
    scale_gradients,
    stage,
    ulps,
    values,
)
from torch.optim import SGD, AdamW, RMSprop

from gradclip_ext import AGC, AdaGC, AutoClip, GradClipper, TimesLimit, ZClip, _ops

# Counts passes that are made where the host knows the coefficient.
pytestmark = pytest.mark.cpu_only

LR = 0.1
ONE_COEFFICIENT = {
    "number": lambda: 0.5,
    "inf": lambda: math.inf,
    "AutoClip": lambda: AutoClip(20.0),
    "ZClip": lambda: ZClip(warmup_steps=2, z_threshold=0.1),
}
SEVERAL = {"AdaGC": lambda: AdaGC(warmup_steps=1), "AGC": lambda: AGC(0.01)}


def adamw(parameters, **settings):
    return AdamW(parameters, lr=LR, **{"fused": True, **settings})


def refresh(mine, theirs, seed, scale=1.0, value=None, factor=1.0):
    fresh = make_parameters(mine[0].dtype, seed, [p.shape for p in mine])
    if value is not None:
        fresh[1].grad[3] = value
    for parameter, other, source in zip(mine, theirs, fresh, strict=True):
        parameter.grad = source.grad * factor * scale
        other.grad = source.grad * factor * scale


def assert_close(mine, theirs, with_gradients=True):
    for one, other in zip(mine, theirs, strict=True):
        if with_gradients:
            assert ulps(one.grad, other.grad) <= 1
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * LR)


def assert_same_reports(one, other):
    found, expected = one.report(), other.report()
    assert found.names == expected.names
    for name in ("norms", "limits"):
        wanted = pytest.approx(getattr(expected, name), rel=1e-6, nan_ok=True)
        assert getattr(found, name) == wanted
    for name in ("total_norm", "coefficient"):
        wanted = pytest.approx(getattr(expected, name), rel=1e-6, nan_ok=True)
        assert getattr(found, name) == wanted
    for name in ("steps", "clipped_steps", "nonfinite_steps", "skipped_steps"):
        assert getattr(found, name) == getattr(expected, name)
    assert one.found_inf.item() == other.found_inf.item()


def no_trace(optimizer):
    return not {"grad_scale", "found_inf"} & set(vars(optimizer))


class TestOneCoefficient:
    @pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
    @pytest.mark.parametrize("rule", ONE_COEFFICIENT.values(), ids=ONE_COEFFICIENT)
    def test_is_handed_over(self, rule, scaled, monkeypatch):
        mine = make_parameters()
        theirs = copies(mine)
        optimizer, other = adamw(mine), adamw(theirs)
        clipper, other_clipper = GradClipper(optimizer, rule()), GradClipper(other, rule())
        scaler, other_scaler = make_scaler(), make_scaler()
        for seed in range(8):
            # The fourth overflows, and the last is much larger than the others.
            value = math.inf if scaled and seed == 3 else None
            factor = 20.0 if seed == 7 else 1.0
            refresh(mine, theirs, seed, scaler.get_scale() if scaled else 1.0, value, factor)
            with monkeypatch.context() as patch:
                calls = Calls(patch)
                norm = clipper.step(optimizer, scaler if scaled else None)
            assert calls.counts == {"grad_norms": 1, "scale_": 0}
            if scaled:
                other_scaler.unscale_(other)
            expected = other_clipper.clip_()
            torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0, equal_nan=True)
            if scaled:
                other_scaler.step(other)
                for one in (scaler, other_scaler):
                    one.update()
                assert scaler.state_dict() == other_scaler.state_dict()
            else:
                other.step()
            assert_close(mine, theirs, with_gradients=value is None)
            assert_same_reports(clipper, other_clipper)
            assert no_trace(optimizer)
        assert clipper.report().clipped_steps >= (0 if rule() == math.inf else 1)

    def test_a_weight_decay_is_added_in_the_pass_that_measures(self, monkeypatch):
        mine = make_parameters()
        theirs = copies(mine)
        clipper = GradClipper(mine, 0.5, weight_decay=0.1)
        calls = Calls(monkeypatch)
        clipper.step(adamw(mine))
        assert calls.counts == {"grad_norms": 1, "scale_": 0}
        GradClipper(theirs, 0.5, weight_decay=0.1).clip_()
        adamw(theirs).step()
        assert_close(mine, theirs)

    def test_several_optimizers(self, monkeypatch):
        mine = make_parameters()
        theirs = copies(mine)
        optimizers = [adamw(mine[:2]), RMSprop(mine[2:], lr=LR)]
        calls = Calls(monkeypatch)
        GradClipper(optimizers, 0.5).step(optimizers)
        assert calls.counts == {"grad_norms": 1, "scale_": 1}
        GradClipper(theirs, 0.5).clip_()
        adamw(theirs[:2]).step()
        RMSprop(theirs[2:], lr=LR).step()
        assert_close(mine, theirs)

    def test_numbers_in_tensors(self, monkeypatch):
        mine = make_parameters()
        theirs = copies(mine)
        monkeypatch.setattr(_ops, "known", lambda number: number)
        optimizer = adamw(mine)
        clipper = GradClipper(optimizer, AutoClip(20.0), nonfinite="skip")
        other = adamw(theirs)
        other_clipper = GradClipper(other, AutoClip(20.0), nonfinite="skip")
        for seed in range(4):
            value = math.nan if seed == 2 else None
            refresh(mine, theirs, seed, value=value)
            clipper.step(optimizer)
            other_clipper.clip_()
            other.found_inf = other_clipper.found_inf
            other.step()
            assert_close(mine, theirs, with_gradients=value is None)
            assert_same_reports(clipper, other_clipper)
            assert no_trace(optimizer)


class TestTheOrdinaryWay:
    """Where one factor is not all there is to do."""

    def both(self, mine, theirs, make, settings, scaler=None, other_scaler=None):
        optimizer, other = make(mine), make(theirs)
        rule = settings.pop("rule")
        clipper = GradClipper(optimizer, rule(), **settings)
        other_clipper = GradClipper(other, rule(), **settings)
        for seed in range(3):
            refresh(mine, theirs, seed, SCALE if scaler else 1.0)
            norm = clipper.step(optimizer, scaler)
            if scaler:
                other_scaler.unscale_(other)
            assert norm.item() == pytest.approx(other_clipper.clip_().item(), rel=1e-6)
            if scaler:
                other_scaler.step(other)
                scaler.update()
                other_scaler.update()
            else:
                other.step()
            assert_close(mine, theirs)
            assert_same_reports(clipper, other_clipper)

    @pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
    @pytest.mark.parametrize("rule", SEVERAL.values(), ids=SEVERAL)
    def test_rules_with_several_coefficients(self, rule, scaled):
        mine = make_parameters()
        scalers = [make_scaler(), make_scaler()] if scaled else []
        self.both(mine, copies(mine), adamw, {"rule": rule}, *scalers)

    @pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
    @pytest.mark.parametrize(
        "settings",
        [
            {"clip_value": 0.05},
            {"weight_decay": 0.1},
            {"weight_decay": 0.1, "nonfinite": "skip"},
            {"include": lambda name, parameter: parameter.dim() > 1},
        ],
        ids=["clip_value", "weight_decay", "late weight_decay", "include"],
    )
    def test_other_settings(self, settings, scaled):
        mine = make_parameters()
        scalers = [make_scaler(), make_scaler()] if scaled else []
        self.both(mine, copies(mine), adamw, {"rule": lambda: 0.5, **settings}, *scalers)

    @pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
    def test_a_threshold_for_each_group(self, scaled):
        def make(parameters):
            return adamw([{"params": parameters[:2]}, {"params": parameters[2:]}])

        mine = make_parameters()
        scalers = [make_scaler(), make_scaler()] if scaled else []
        self.both(mine, copies(mine), make, {"rule": lambda: [0.5, AutoClip(20.0)]}, *scalers)

    @pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
    def test_a_group_that_is_left_out(self, scaled):
        def make(parameters):
            spared = {"params": parameters[:2], "clip_grad": False}
            return adamw([spared, {"params": parameters[2:]}])

        mine = make_parameters()
        scalers = [make_scaler(), make_scaler()] if scaled else []
        self.both(mine, copies(mine), make, {"rule": lambda: 0.5}, *scalers)

    def test_plain_optimizers(self):
        mine = make_parameters()
        make = functools.partial(RMSprop, lr=LR)
        self.both(mine, copies(mine), make, {"rule": lambda: 0.5})

    def test_a_clipper_of_more_than_the_optimizer(self, monkeypatch):
        mine = make_parameters()
        theirs = copies(mine)
        calls = Calls(monkeypatch)
        GradClipper(mine, 0.5).step(adamw(mine[:2]))
        assert calls.counts["scale_"] == 1
        GradClipper(theirs, 0.5).clip_()
        adamw(theirs[:2]).step()
        assert_close(mine, theirs)


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
class TestNonfinite:
    @pytest.mark.parametrize("make", [adamw, RMSprop], ids=["fused", "plain"])
    @pytest.mark.parametrize("policy", ["skip", "propagate", "zero"])
    def test_policies(self, policy, make, scaled):
        mine = make_parameters()
        mine[1].grad[3] = math.nan
        theirs = copies(mine)
        optimizer, other = make(mine), make(theirs)
        clipper = GradClipper(optimizer, 0.5, nonfinite=policy)
        other_clipper = GradClipper(other, 0.5, nonfinite=policy)
        scaler = make_scaler() if scaled else None
        if scaled:
            scale_gradients(mine)
        before, unclipped = values(mine), gradients(mine)
        called = []
        optimizer.register_step_post_hook(lambda *_: called.append(True))
        assert clipper.step(optimizer, scaler).isnan()
        other_clipper.clip_()
        if scaled or policy == "skip":
            assert called == [] and same(values(mine), before)
        else:
            other.step()
            for one, another in zip(mine, theirs, strict=True):
                torch.testing.assert_close(one, another, equal_nan=True)
        if policy == "zero":
            assert all(not gradient.any() for gradient in gradients(mine))
        if policy == "skip":
            assert same(gradients(mine), unclipped)
        assert_same_reports(clipper, other_clipper)
        if scaled:
            assert flags(scaler, optimizer) == 1.0
            assert stage(scaler, optimizer) == "STEPPED"
            scaler.update()
            assert scaler.get_scale() == SCALE / 2

    def test_raise_changes_nothing(self, scaled):
        mine = make_parameters()
        mine[1].grad[3] = math.nan
        optimizer = adamw(mine)
        clipper = GradClipper(optimizer, AutoClip(50.0), nonfinite="raise")
        scaler = make_scaler() if scaled else None
        before, weights = gradients(mine), values(mine)
        with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
            clipper.step(optimizer, scaler)
        assert same(gradients(mine), before) and same(values(mine), weights)
        assert clipper.state_dict()["steps"] == 0 and no_trace(optimizer)
        if scaled:
            assert stage(scaler, optimizer) == "READY"

    @pytest.mark.parametrize("make", [adamw, RMSprop], ids=["fused", "plain"])
    @pytest.mark.parametrize("known", [True, False], ids=["known", "in tensors"])
    def test_a_spike_is_skipped_and_no_overflow(self, known, make, scaled, monkeypatch):
        if not known:
            monkeypatch.setattr(_ops, "known", lambda number: number)
        mine = make_parameters()
        optimizer = make(mine)
        clipper = GradClipper(optimizer, 0.5, skip_above=TimesLimit(100.0))
        scaler = make_scaler() if scaled else None
        scale = SCALE if scaled else 1.0
        scale_gradients(mine, scale)
        clipper.step(optimizer, scaler)
        if scaled:
            scaler.update()
        refresh(mine, copies(mine), 1, scale * 1e4)
        # For the scaler they are unscaled afterwards.
        before = [gradient / scale for gradient in gradients(mine)]
        weights = values(mine)
        clipper.step(optimizer, scaler)
        assert same(gradients(mine), before) and same(values(mine), weights)
        assert clipper.report().skipped_steps == 1
        assert clipper.found_inf.item() == 1.0
        if scaled:
            assert flags(scaler, optimizer) == 0.0
            scaler.update()
            assert scaler.get_scale() == SCALE

    def test_an_infinite_norm_of_finite_float64(self, scaled):
        mine = make_parameters(torch.float64)
        mine[1].grad[3] = 1e300
        weights, optimizer = values(mine), SGD(mine, lr=LR)
        scaler = make_scaler(1.0) if scaled else None
        clipper = GradClipper(optimizer, 0.5, nonfinite="skip")
        assert clipper.step(optimizer, scaler).item() == math.inf
        assert same(values(mine), weights)
        if scaled:
            assert flags(scaler, optimizer) == 0.0


class TestErrors:
    def test_a_scaler_that_is_already_used(self):
        mine = make_parameters()
        optimizer, scaler = adamw(mine), make_scaler()
        clipper = GradClipper(optimizer, AutoClip(50.0))
        scaler.unscale_(optimizer)
        before, weights = gradients(mine), values(mine)
        with pytest.raises(RuntimeError, match="already been called on this optimizer"):
            clipper.step(optimizer, scaler)
        assert same(gradients(mine), before) and same(values(mine), weights)
        assert clipper.state_dict()["steps"] == 0

    def test_arguments(self):
        mine = make_parameters()
        clipper = GradClipper(mine, 0.5)
        with pytest.raises(TypeError) as caught:
            clipper.step(mine[0])
        assert str(caught.value) == (
            "GradClipper.step: optimizer has to be a torch.optim.Optimizer, found a Parameter"
        )
        with pytest.raises(TypeError, match=r"^GradClipper.step: scaler has to be a torch.amp"):
            clipper.step(adamw(mine), 3)
        assert clipper.state_dict()["steps"] == 0

    def test_with_a_disabled_scaler_and_one_of_its_own_way(self):
        for scaler in (torch.amp.GradScaler(enabled=False), make_scaler(1.0)):
            called = []
            if scaler.is_enabled():
                scaler.unscale_ = functools.partial(_counted, called, scaler.unscale_)
            mine = make_parameters()
            theirs = copies(mine)
            GradClipper(mine, 0.5).step(adamw(mine), scaler)
            GradClipper(theirs, 0.5).clip_()
            adamw(theirs).step()
            assert_close(mine, theirs)
            assert len(called) == scaler.is_enabled()


def _counted(called, function, *arguments):
    called.append(True)
    return function(*arguments)


def test_nothing_is_read_on_the_host():
    mine = make_parameters()
    optimizer = adamw(mine)
    clipper = GradClipper(optimizer, 0.5, nonfinite="skip")
    from gradclip_ext._clipper_step import ClipperStep

    with numbers_stay_in_tensors():
        together = ClipperStep(optimizer, None, clipper._settings, clipper._groups)
        with together.unscaled() as inverse:
            step = clipper._decided(inverse)
            together.write(step)
        clipper._count(step)
    together.take()
    assert clipper.report().clipped_steps == 1
