"""What scalers and optimizers that are not torch's own, or shared, make of the hand-over."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from gradclip_ext import AdaGC, GradClipper, clip_and_step, unscale_and_clip_grad_norm_

pytestmark = pytest.mark.cpu_only

SCALE = 16.0


def made(gradient=160.0, optimizer=torch.optim.SGD, **options):
    """A parameter of 4 zeros whose scaled gradient is a constant, and its optimizer."""
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), gradient)
    options = {"lr": 0.1, "fused": True, **options}
    return parameter, optimizer([parameter], **options)


def made_scaler(cls=torch.amp.GradScaler):
    scaler = cls("cpu", init_scale=SCALE)
    scaler.scale(torch.zeros(()))
    return scaler


class OwnUnscale(torch.amp.GradScaler):
    def unscale_(self, optimizer):
        super().unscale_(optimizer)


def by_clip_and_step(parameters, optimizers, scaler):
    clip_and_step(optimizers, 1.0, scaler=scaler)


def by_unscale_and_clip(parameters, optimizers, scaler):
    unscale_and_clip_grad_norm_(scaler, optimizers, 1.0)
    for optimizer in optimizers:
        scaler.step(optimizer)


def by_clipper(rule=lambda: 1.0, **settings):
    def call(parameters, optimizers, scaler):
        GradClipper(parameters, rule(), **settings).step(optimizers, scaler)

    return call


CALLS = {
    "clip_and_step": by_clip_and_step,
    "unscale_and_clip_grad_norm_": by_unscale_and_clip,
    "a clipper": by_clipper(),
    "a clipper with weight decay": by_clipper(weight_decay=0.1),
    "a clipper with clip_value": by_clipper(clip_value=0.1),
    "a clipper that skips": by_clipper(nonfinite="skip", weight_decay=0.1),
    "a clipper with a rule for each": by_clipper(AdaGC, nonfinite="skip"),
}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("cls", [torch.amp.GradScaler, OwnUnscale], ids=["torch's", "own unscale_"])
@pytest.mark.parametrize("name", CALLS)
def test_an_overflow_in_one_optimizer_skips_all(name, cls, bad):
    scaler = made_scaler(cls)
    (one, its), (other, others) = made(), made(bad)
    CALLS[name]([one, other], [its, others], scaler)
    assert one.tolist() == other.tolist() == [0.0] * 4
    scaler.update()
    assert scaler.get_scale() == SCALE / 2


def test_a_clipper_skips_for_a_gradient_that_is_not_stepped():
    scaler = made_scaler()
    (parameter, optimizer), (other, _) = made(), made(float("nan"))
    clipper = GradClipper([parameter, other], 1.0, nonfinite="skip")
    clipper.step(optimizer, scaler)
    assert parameter.tolist() == [0.0] * 4
    assert clipper.report().skipped_steps == 1
    scaler.update()
    # The scaler's own gradients were finite.
    assert scaler.get_scale() == SCALE


def test_a_spike_that_is_skipped_leaves_unscaled_gradients():
    scaler = made_scaler()
    parameter, optimizer = made()
    GradClipper([parameter], 1.0, skip_above=5.0).step(optimizer, scaler)
    assert parameter.tolist() == [0.0] * 4
    assert parameter.grad.tolist() == [10.0] * 4


@pytest.fixture
def patched(monkeypatch):
    """Replaces a method of torch's class by a function of this module; returns how often it ran."""

    def patch(name, replacement):
        calls = []
        original = getattr(torch.amp.GradScaler, name)

        def method(self, *arguments, **options):
            calls.append(name)
            return replacement(original, self, *arguments, **options)

        monkeypatch.setattr(torch.amp.GradScaler, name, method)
        return calls

    return patch


@pytest.mark.parametrize("name", ["clip_and_step", "unscale_and_clip_grad_norm_"])
def test_torchs_own_class_may_be_patched_to_allow_float16(name, patched):
    calls = patched(
        "_unscale_grads_", lambda original, self, o, i, f, _: original(self, o, i, f, True)
    )
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    parameter.grad = torch.full((4,), 160.0, dtype=torch.float16)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    if name == "clip_and_step":
        clip_and_step(optimizer, 1e9, scaler=made_scaler())
        assert parameter.tolist() == [-10.0] * 4
    else:
        unscale_and_clip_grad_norm_(made_scaler(), optimizer, 1e9)
    assert parameter.grad.tolist() == [10.0] * 4
    assert len(calls) == 1


def test_a_patched_step_that_drops_grad_scale(patched):
    def step(original, self, optimizer):
        optimizer.grad_scale = None
        return original(self, optimizer)

    patched("step", step)
    parameter, optimizer = made()
    clip_and_step(optimizer, 1.0, scaler=made_scaler())
    # Norm 1 in four elements.
    assert parameter.tolist() == pytest.approx([-0.05] * 4, rel=1e-5)


class OwnOptimizer(torch.optim.Optimizer):
    """Keeps to what GradScaler documents: reads both attributes in its step."""

    _step_supports_amp_scaling = True

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        if self.found_inf.item():
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                scale = 1.0 if self.grad_scale is None else self.grad_scale
                parameter -= group["lr"] * parameter.grad / scale


@pytest.mark.parametrize("gradient, expected", [(160.0, -0.05), (float("inf"), 0.0)])
def test_an_optimizer_that_reads_the_attributes_itself(gradient, expected):
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), gradient)
    clip_and_step(OwnOptimizer([parameter]), 1.0, scaler=made_scaler())
    assert parameter.tolist() == pytest.approx([expected] * 4, rel=1e-5)


def test_a_scaler_shared_by_threads():
    scaler, wrong, kept = made_scaler(), [], []

    def work():
        for _ in range(100):
            parameter, optimizer = made()
            # So that no other optimizer gets its address, by which the scaler knows it.
            kept.append(optimizer)
            norm = clip_and_step(optimizer, 100.0, scaler=scaler)
            if norm.item() != 20.0 or parameter.grad[0].item() != 10.0:
                wrong.append((norm, parameter.grad))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(kept) == 400


def test_ones_own_grad_scale_is_gone_after_every_step_of_a_scaler():
    scaler = made_scaler()
    parameter, optimizer = made(momentum=0.9)
    optimizer.grad_scale = torch.tensor(2.0)
    clip_and_step(optimizer, 1.0, scaler=scaler)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    optimizer.grad_scale = torch.tensor(2.0)
    parameter.grad.fill_(float("inf"))
    scaler.update()
    clip_and_step(optimizer, 1.0, scaler=scaler)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("scheduled", [True, False], ids=["with scheduler", "without"])
def test_a_step_that_belongs_to_another_optimizer(scheduled):
    parameter, optimizer = made()
    if scheduled:
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    else:
        optimizer.step = optimizer.step
    wrapper = object.__new__(torch.optim.SGD)
    vars(wrapper).update(vars(optimizer))
    clip_and_step(wrapper, 1.0)
    assert parameter.tolist() == pytest.approx([-0.05] * 4, rel=1e-5)


def test_a_wrapper_with_slots():
    class Slotted:
        __slots__ = ("inner",)

        def __init__(self, inner):
            self.inner = inner

        @property
        def param_groups(self):
            return self.inner.param_groups

        def step(self):
            self.inner.step()

    parameter, optimizer = made()
    clip_and_step(Slotted(optimizer), 1.0)
    assert parameter.tolist() == pytest.approx([-0.05] * 4, rel=1e-5)


class TestErrorsWhereTheScalerUnscales:
    """A clipper that does more than one coefficient leaves it to the scaler."""

    def failed(self, parameters, optimizers, error, match):
        scaler = made_scaler()
        clipper = GradClipper(parameters, 1.0, clip_value=0.5)
        before = [parameter.grad.clone() for parameter in parameters]
        records = {key: dict(state) for key, state in scaler._per_optimizer_states.items()}
        with pytest.raises(error, match=match):
            clipper.step(optimizers, scaler)
        assert all(map(torch.equal, before, [parameter.grad for parameter in parameters]))
        assert scaler._per_optimizer_states == records
        return scaler

    def test_a_gradient_that_cannot_be_written(self):
        one, other = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
        one.grad, other.grad = torch.full((4,), 160.0), torch.full((1,), 160.0).expand(4)
        optimizer = torch.optim.SGD([one, other], lr=0.1)
        self.failed([one, other], optimizer, RuntimeError, "more than one element")

    def test_float16_in_the_second(self):
        (one, its), other = made(), nn.Parameter(torch.zeros(4, dtype=torch.float16))
        other.grad = torch.full((4,), 160.0, dtype=torch.float16)
        others = torch.optim.SGD([other], lr=0.1)
        self.failed([one, other], [its, others], ValueError, "FP16")

    def test_the_second_unscaled_already(self):
        scaler = made_scaler()
        (one, its), (other, others) = made(), made()
        scaler.unscale_(others)
        clipper = GradClipper([one, other], 1.0, clip_value=0.5)
        with pytest.raises(RuntimeError, match="already been called"):
            clipper.step([its, others], scaler)
        assert one.grad.tolist() == [160.0] * 4 and other.grad.tolist() == [10.0] * 4
        # Not taken for unscaled.
        scaler.unscale_(its)
        assert one.grad.tolist() == [10.0] * 4


@pytest.mark.parametrize("name", ["clip_and_step", "a clipper with clip_value"])
def test_an_overflow_never_reaches_what_a_wrapper_steps(name):
    # It says that it reads the flag, from what it wraps, which does not get the flag.
    class Wrapper:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, attribute):
            return getattr(self.inner, attribute)

        def step(self):
            self.inner.step()

    parameter, optimizer = made(float("nan"))
    CALLS[name]([parameter], [Wrapper(optimizer)], made_scaler(OwnUnscale))
    assert parameter.tolist() == [0.0] * 4
