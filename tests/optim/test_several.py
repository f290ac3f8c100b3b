"""clip_and_step with several optimizers or groups, closures, attributes of the user, and errors."""

from __future__ import annotations

import math

import pytest
import torch
from scaling import (
    Calls,
    copies,
    flags,
    gradients,
    make_parameters,
    make_scaler,
    same,
    scale_gradients,
    stage,
    ulps,
    values,
)
from torch import nn
from torch.optim import SGD, AdamW, RMSprop

from gradclip_ext import clip_and_step, clip_grad_norm_

# Counts passes that are made where the host knows the coefficient.
pytestmark = pytest.mark.cpu_only

LR = 0.1
MAX_NORM = 0.5


def adamw(parameters, **settings):
    return AdamW(parameters, lr=LR, **{"fused": True, **settings})


def assert_close(mine, theirs):
    for one, other in zip(mine, theirs, strict=True):
        assert ulps(one.grad, other.grad) <= 1
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * LR)


def no_trace(optimizer):
    return not {"grad_scale", "found_inf"} & set(vars(optimizer))


class TestSeveralOptimizers:
    """One norm, and each takes it as it can."""

    @pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
    def test_a_fused_and_a_plain_one(self, scaled, monkeypatch):
        mine = make_parameters()
        theirs = copies(mine)
        scaler = make_scaler() if scaled else None
        if scaled:
            scale_gradients(mine)
        optimizers = [adamw(mine[:2]), RMSprop(mine[2:], lr=LR)]
        calls = Calls(monkeypatch)
        norm = clip_and_step(optimizers, MAX_NORM, scaler=scaler)
        assert calls.counts == {"grad_norms": 1, "scale_": 1}
        torch.testing.assert_close(norm, clip_grad_norm_(theirs, MAX_NORM), rtol=2e-7, atol=0)
        adamw(theirs[:2]).step()
        RMSprop(theirs[2:], lr=LR).step()
        assert_close(mine, theirs)
        assert all(map(no_trace, optimizers))
        if scaled:
            assert [stage(scaler, optimizer) for optimizer in optimizers] == ["STEPPED"] * 2

    def test_two_fused_ones(self, monkeypatch):
        mine = make_parameters()
        theirs = copies(mine)
        calls = Calls(monkeypatch)
        clip_and_step((adamw(mine[:2]), SGD(mine[2:], lr=LR, fused=True)), MAX_NORM)
        assert calls.counts == {"grad_norms": 1, "scale_": 0}
        clip_grad_norm_(theirs, MAX_NORM)
        adamw(theirs[:2]).step()
        SGD(theirs[2:], lr=LR).step()
        assert_close(mine, theirs)

    def test_that_share_a_parameter(self, monkeypatch):
        # Each step would divide its gradient.
        mine = make_parameters()
        theirs = copies(mine)
        calls = Calls(monkeypatch)
        norm = clip_and_step([adamw(mine), SGD(mine[:1], lr=LR, fused=True)], MAX_NORM)
        assert calls.counts == {"grad_norms": 1, "scale_": 1}
        assert norm.item() == clip_grad_norm_(theirs, MAX_NORM).item()
        adamw(theirs).step()
        SGD(theirs[:1], lr=LR).step()
        assert_close(mine, theirs)

    def test_that_share_the_memory_of_a_gradient(self, monkeypatch):
        mine = make_parameters(shapes=((8,), (8,)))
        mine[0].grad = mine[1].grad
        calls = Calls(monkeypatch)
        clip_and_step([adamw(mine[:1]), adamw(mine[1:])], MAX_NORM)
        assert calls.counts["scale_"] == 1

    def test_an_overflow_in_one_skips_all(self):
        mine = make_parameters()
        scale_gradients(mine)
        mine[0].grad[0, 0] = math.nan
        before, weights, scaler = gradients(mine), values(mine), make_scaler()
        optimizers = [adamw(mine[:2]), RMSprop(mine[2:], lr=LR)]
        clip_and_step(optimizers, MAX_NORM, scaler=scaler)
        assert same(gradients(mine), before) and same(values(mine), weights)
        assert [flags(scaler, optimizer) for optimizer in optimizers] == [1.0, 1.0]
        assert [stage(scaler, optimizer) for optimizer in optimizers] == ["STEPPED"] * 2

    def test_one_without_gradients(self):
        mine = make_parameters()
        theirs = copies(mine)
        clip_and_step([adamw([nn.Parameter(torch.ones(2))]), adamw(mine)], MAX_NORM)
        clip_grad_norm_(theirs, MAX_NORM)
        adamw(theirs).step()
        assert_close(mine, theirs)


class TestGroups:
    def test_each_with_its_own_settings(self, monkeypatch):
        def make(parameters):
            slow = {"params": parameters[2:], "lr": LR / 10, "weight_decay": 0.3}
            return adamw([{"params": parameters[:2], "betas": (0.5, 0.6)}, slow])

        mine = make_parameters()
        theirs = copies(mine)
        calls = Calls(monkeypatch)
        clip_and_step(make(mine), MAX_NORM)
        assert calls.counts["scale_"] == 0
        clip_grad_norm_(theirs, MAX_NORM)
        make(theirs).step()
        assert_close(mine, theirs)

    @pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
    def test_one_that_is_left_out(self, scaled, monkeypatch):
        mine = make_parameters()
        theirs = copies(mine)
        scaler = make_scaler() if scaled else None
        if scaled:
            scale_gradients(mine)
        optimizer = adamw([{"params": mine[:2], "clip_grad": False}, {"params": mine[2:]}])
        calls = Calls(monkeypatch)
        norm = clip_and_step(optimizer, MAX_NORM, scaler=scaler)
        # One grad_scale for both is not possible.
        assert calls.counts["scale_"] == (2 if scaled else 1)
        torch.testing.assert_close(norm, clip_grad_norm_(theirs[2:], MAX_NORM), rtol=2e-7, atol=0)
        adamw(theirs).step()
        assert_close(mine, theirs)

    def test_one_that_is_left_out_where_nothing_is_clipped(self, monkeypatch):
        mine = make_parameters()
        theirs = copies(mine)
        scale_gradients(mine)
        optimizer = adamw([{"params": mine[:2], "clip_grad": False}, {"params": mine[2:]}])
        calls = Calls(monkeypatch)
        clip_and_step(optimizer, 1e6, scaler=make_scaler())
        # All are unscaled alike.
        assert calls.counts["scale_"] == 0
        adamw(theirs).step()
        assert_close(mine, theirs)

    def test_an_overflow_in_one_that_is_left_out(self):
        mine = make_parameters()
        scale_gradients(mine)
        mine[0].grad[0, 0] = math.inf
        weights, scaler = values(mine), make_scaler()
        optimizer = adamw([{"params": mine[:2], "clip_grad": False}, {"params": mine[2:]}])
        assert clip_and_step(optimizer, MAX_NORM, scaler=scaler).isfinite()
        assert same(values(mine), weights)
        assert flags(scaler, optimizer) == 1.0


class TestClosure:
    def test_it_runs_first_and_once_with_gradients_enabled(self):
        weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        optimizer, order = SGD([weight], lr=1.0, fused=True), []
        optimizer.register_step_post_hook(lambda *_: order.append("step"))

        def closure():
            order.append("closure")
            optimizer.zero_grad()
            loss = weight.square().sum() / 2
            loss.backward()
            losses.append(loss.item())
            return loss

        losses = []
        with torch.no_grad():
            norm = clip_and_step(optimizer, 1.0, closure=closure)
        assert order == ["closure", "step"]
        assert losses == [12.5]
        assert norm.item() == 5.0
        torch.testing.assert_close(weight.data, torch.tensor([2.4, 3.2]))

    def test_with_a_scaler_it_is_refused_in_torchs_words(self):
        mine = make_parameters()
        optimizer, scaler, called = adamw(mine), make_scaler(), []
        with pytest.raises(RuntimeError) as torchs:
            make_scaler().step(optimizer, closure=lambda: None)
        with pytest.raises(RuntimeError) as caught:
            clip_and_step(optimizer, 1.0, scaler=scaler, closure=lambda: called.append(True))
        assert str(caught.value) == str(torchs.value)
        assert called == []

    def test_a_disabled_scaler_takes_one(self):
        mine, called = make_parameters(), []
        disabled = torch.amp.GradScaler(enabled=False)
        clip_and_step(adamw(mine), 1.0, scaler=disabled, closure=lambda: called.append(True))
        assert called == [True]


class TestAttributesOfTheUser:
    @pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
    def test_grad_scale_is_multiplied(self, scaled):
        mine = make_parameters()
        theirs = copies(mine)
        optimizer, other = adamw(mine), adamw(theirs)
        own = torch.tensor([4.0])
        optimizer.grad_scale, other.grad_scale = own, own.clone()
        scaler = make_scaler() if scaled else None
        if scaled:
            scale_gradients(mine)
        clip_and_step(optimizer, MAX_NORM, scaler=scaler)
        clip_grad_norm_(theirs, MAX_NORM)
        other.step()
        assert_close(mine, theirs)
        # GradScaler.step deletes it; what would be put back would scale the next step again.
        assert vars(optimizer).get("grad_scale") is (None if scaled else own)
        assert own.tolist() == [4.0]

    def test_grad_scale_whose_product_is_out_of_range(self, monkeypatch):
        mine = [nn.Parameter(torch.ones(2))]
        mine[0].grad = torch.tensor([3e10, 4e10])
        theirs = copies(mine)
        optimizer, other = (SGD(p, lr=LR, fused=True) for p in (mine, theirs))
        optimizer.grad_scale = other.grad_scale = torch.tensor(1e35)
        calls = Calls(monkeypatch)
        clip_and_step(optimizer, MAX_NORM)
        assert calls.counts["scale_"] == 1
        clip_grad_norm_(theirs, MAX_NORM)
        other.step()
        assert same(gradients(mine), gradients(theirs))

    def test_found_inf_still_skips(self):
        mine = make_parameters()
        weights, optimizer = values(mine), adamw(mine)
        own = optimizer.found_inf = torch.ones(())
        clip_and_step(optimizer, MAX_NORM)
        assert same(values(mine), weights)
        assert optimizer.found_inf is own

    @pytest.mark.parametrize("own", [0.0, 1.0])
    def test_found_inf_and_a_flag_of_ours(self, own, monkeypatch):
        from gradclip_ext import _ops

        monkeypatch.setattr(_ops, "known", lambda number: number)
        mine = make_parameters()
        weights, optimizer = values(mine), adamw(mine)
        flag = optimizer.found_inf = torch.tensor(own)
        clip_and_step(optimizer, MAX_NORM, skip_nonfinite=True)
        assert same(values(mine), weights) == (own == 1.0)
        assert optimizer.found_inf is flag

    def test_a_plain_optimizer_with_grad_scale_fails_as_in_torch(self):
        mine = make_parameters()
        optimizer = AdamW(mine, fused=False)
        optimizer.grad_scale = torch.ones(())
        weights = values(mine)
        with pytest.raises(AssertionError):
            clip_and_step(optimizer, MAX_NORM)
        assert same(values(mine), weights)


class TestErrors:
    @pytest.mark.parametrize("own", [False, True], ids=["none", "own"])
    @pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
    def test_in_the_step_leave_the_attributes_as_found(self, scaled, own):
        mine = make_parameters()
        optimizer, scaler = adamw(mine), make_scaler() if scaled else None
        before = {}
        if own:
            before = {"grad_scale": torch.tensor(2.0), "found_inf": torch.tensor(0.0)}
            vars(optimizer).update(before)

        def fails(*_):
            assert "grad_scale" in vars(optimizer)
            raise KeyError("of a hook")

        optimizer.register_step_post_hook(fails)
        with pytest.raises(KeyError, match="of a hook"):
            clip_and_step(optimizer, MAX_NORM, scaler=scaler)
        found = {k: v for k, v in vars(optimizer).items() if k in ("grad_scale", "found_inf")}
        assert found.keys() == before.keys()
        assert all(found[name] is before[name] for name in before)

    def test_in_the_closure(self):
        mine = make_parameters()
        before, optimizer = gradients(mine), adamw(mine)

        def closure():
            raise KeyError("of the closure")

        with pytest.raises(KeyError):
            clip_and_step(optimizer, MAX_NORM, closure=closure)
        assert same(gradients(mine), before) and no_trace(optimizer)

    @pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
    def test_a_gradient_that_cannot_be_written(self, scaled):
        mine = make_parameters()
        mine[1].grad = torch.ones(()).expand(13)
        before, weights = gradients(mine), values(mine)
        scaler = make_scaler() if scaled else None
        optimizers = [adamw(mine[2:]), adamw(mine[:2])]
        with pytest.raises(RuntimeError, match=r"clip_and_step: .* single memory location"):
            clip_and_step(optimizers, MAX_NORM, scaler=scaler)
        assert same(gradients(mine), before) and same(values(mine), weights)
        if scaled:
            assert [stage(scaler, optimizer) for optimizer in optimizers] == ["READY"] * 2

    @pytest.mark.parametrize(
        "arguments, settings, kind, text",
        [
            (
                ("parameters", 1.0),
                {},
                TypeError,
                "optimizer[0] has to be a torch.optim.Optimizer, found a Parameter",
            ),
            (
                ("scaler", 1.0),
                {},
                TypeError,
                "optimizer has to be a torch.optim.Optimizer, found a GradScaler; the scaler goes "
                "to the argument of that name",
            ),
            (
                ("optimizer", -1.0),
                {},
                ValueError,
                "max_norm has to be a number that is not negative, found -1.0",
            ),
            (
                ("optimizer", 1.0),
                {"scaler": 2},
                TypeError,
                "scaler has to be a torch.amp.GradScaler, found 2 (int)",
            ),
            (
                ("optimizer", 1.0),
                {"closure": 2},
                TypeError,
                "closure has to be a function without arguments, found 2 (int)",
            ),
            (
                ("optimizer", 1.0),
                {"skip_nonfinite": "yes"},
                TypeError,
                "skip_nonfinite has to be True or False, found 'yes' (str)",
            ),
        ],
    )
    def test_arguments(self, arguments, settings, kind, text):
        mine = make_parameters()
        what = {"parameters": mine, "optimizer": adamw(mine), "scaler": make_scaler()}
        before, weights = gradients(mine), values(mine)
        with pytest.raises(kind) as caught:
            clip_and_step(what[arguments[0]], *arguments[1:], **settings)
        assert str(caught.value) == f"clip_and_step: {text}"
        assert same(gradients(mine), before) and same(values(mine), weights)

    def test_an_optimizer_without_gradients(self):
        optimizer = adamw([nn.Parameter(torch.ones(2))])
        norm = clip_and_step(optimizer, MAX_NORM)
        assert norm.item() == 0.0 and norm.dtype == torch.float32
