"""Clipping by a rule where Accelerate clips."""

from __future__ import annotations

import pytest
import torch
import trainers
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from gradclip_ext import AutoClip
from gradclip_ext.integrations.accelerate import GradClipping


def make(clipping=None, make_model=trainers.make_model, optimizer=None, **options):
    accelerator = Accelerator(cpu=True, **options)
    model = make_model()
    optimizer = {"lr": 0.05, **(optimizer or {})}
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), **optimizer))
    if clipping is not None:
        clipping.attach(accelerator, model, optimizer)
    return accelerator, model, optimizer


def train(accelerator, model, optimizer, batches, max_norm=0.5):
    losses = []
    for inputs, targets in batches:
        with accelerator.accumulate(model):
            loss = trainers.loss_of(model(inputs), targets)
            losses.append(loss.item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_losses_are_those_of_its_own_clipping(mixed_precision):
    batches = trainers.make_batches()
    expected = train(*make(mixed_precision=mixed_precision), batches)
    # The largest norm of the call is not used.
    clipping = GradClipping(0.5)
    losses = train(*make(clipping, mixed_precision=mixed_precision), batches, max_norm=1e9)
    torch.testing.assert_close(
        torch.tensor(losses), torch.tensor(expected), rtol=trainers.SAME, atol=0.0
    )
    assert clipping.clipper.report().steps == trainers.STEPS


def test_it_clips_natively_once_a_step():
    found = trainers.ranges_in(lambda: train(*make(GradClipping(0.5)), trainers.make_batches()))
    assert found == dict.fromkeys(
        ["gradclip_ext::grad_norms", "gradclip_ext::scale_"], trainers.STEPS
    )


def test_the_norm_is_returned_and_reported():
    clipping = GradClipping(0.5)
    accelerator, model, _ = make(clipping)
    inputs, targets = trainers.make_batches()[0]
    accelerator.backward(trainers.loss_of(model(inputs), targets))
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    metrics = clipping.metrics()
    assert metrics["gradients/total_norm"] == norm.item()
    assert metrics["gradients/norm/2.weight"] > 0.0


class TestAccumulation:
    def test_clips_once(self):
        clipping = GradClipping(0.5)
        train(*make(clipping, gradient_accumulation_steps=4), trainers.make_batches(8))
        assert clipping.clipper.report().steps == 2

    def test_called_in_between(self):
        accelerator, model, _ = make(GradClipping(0.5), gradient_accumulation_steps=4)
        inputs, targets = trainers.make_batches()[0]
        with pytest.raises(RuntimeError) as error, accelerator.accumulate(model):
            accelerator.backward(trainers.loss_of(model(inputs), targets))
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
        assert str(error.value) == (
            "Accelerator.clip_grad_norm_: called while gradients are accumulated, expected only "
            "where accelerator.sync_gradients is True"
        )


@pytest.fixture
def scaled():
    """An accelerator as it is with float16 on a GPU: with a scaler for its optimizers."""
    clipping = GradClipping(AutoClip())
    accelerator, model, optimizer = make()
    accelerator.scaler = optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    optimizer.__setstate__({"scaler": accelerator.scaler})
    clipping.attach(accelerator, model, optimizer)
    return clipping, accelerator, model, optimizer


class TestScaler:
    def test_gradients_are_unscaled_before(self, scaled):
        clipping, *training = scaled
        losses = train(*training, trainers.make_batches())
        plain = GradClipping(AutoClip())
        expected = train(*make(plain), trainers.make_batches())
        assert losses == pytest.approx(expected, rel=trainers.SAME)
        assert clipping.metrics() == pytest.approx(plain.metrics(), rel=1e-6)

    def test_an_overflow(self, scaled):
        clipping, accelerator, model, optimizer = scaled
        before = [parameter.detach().clone() for parameter in model.parameters()]
        inputs, targets = trainers.make_batches()[0]
        train(accelerator, model, optimizer, [(inputs, targets * torch.inf)])
        assert all(map(torch.equal, model.parameters(), before))
        assert optimizer.step_was_skipped
        assert accelerator.scaler.get_scale() == 512.0
        assert clipping.clipper.state_dict()["rules"][0]["count"].item() == 0


def test_a_step_that_is_skipped():
    clipping = GradClipping(1e-3, skip_above=1e-2)
    accelerator, model, optimizer = make(clipping, optimizer={"weight_decay": 0.1})
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(accelerator, model, optimizer, trainers.make_batches())
    assert clipping.clipper.report().skipped_steps == trainers.STEPS
    assert all(map(torch.equal, model.parameters(), before))


class TestSeveral:
    def test_models_with_their_own_clipping_and_one_without(self):
        accelerator = Accelerator(cpu=True)
        models = [nn.Linear(trainers.SIZE, 1) for _ in range(3)]
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
        models, optimizers = (list(accelerator.prepare(*both)) for both in (models, optimizers))
        clippings = [GradClipping(0.5), GradClipping(0.25)]
        for clipping, model, optimizer in zip(clippings, models, optimizers, strict=False):
            clipping.attach(accelerator, model, optimizer)
        inputs, targets = trainers.make_batches()[0]
        norms = []
        for model in models:
            accelerator.backward(trainers.loss_of(model(inputs), targets))
            accelerator.clip_grad_norm_(model.parameters(), 0.125)
            gradients = [parameter.grad for parameter in model.parameters()]
            norms.append(torch.nn.utils.get_total_norm(gradients).item())
        assert norms == pytest.approx([0.5, 0.25, 0.125], rel=1e-5)
        assert [clipping.clipper.report().steps for clipping in clippings] == [1, 1]

    def test_a_part_of_the_parameters(self):
        accelerator, model, _ = make(GradClipping(0.5))
        inputs, targets = trainers.make_batches()[0]
        accelerator.backward(trainers.loss_of(model(inputs), targets))
        before = [parameter.grad.clone() for parameter in model.parameters()]
        with pytest.raises(ValueError) as error:
            accelerator.clip_grad_norm_(model[0].parameters(), 0.5)
        assert str(error.value) == (
            "Accelerator.clip_grad_norm_: called for 2 of 6 parameters that GradClipping clips by "
            "their common norm, expected all or none"
        )
        assert all(map(torch.equal, before, [p.grad for p in model.parameters()]))


def test_other_accelerators_are_left_alone():
    make(GradClipping(0.5))
    assert "clip_grad_norm_" not in vars(Accelerator(cpu=True))


class TestCheckpoints:
    def test_resumed_as_if_never_stopped(self, tmp_path):
        batches = trainers.make_batches()
        whole = GradClipping(AutoClip(percentile=50))
        losses = train(*make(whole), batches)
        stopped = GradClipping(AutoClip(percentile=50))
        accelerator, *training = make(stopped)
        train(accelerator, *training, batches[:3])
        accelerator.save_state(tmp_path)
        callback = GradClipping(AutoClip(percentile=50))
        accelerator, *training = make(callback)
        accelerator.load_state(tmp_path)
        assert train(accelerator, *training, batches[3:]) == losses[3:]
        assert callback.metrics() == whole.metrics()

    def test_of_another_rule(self, tmp_path):
        accelerator, *_ = make(GradClipping(AutoClip()))
        accelerator.save_state(tmp_path)
        accelerator, *_ = make(GradClipping(0.5))
        with pytest.raises(ValueError, match="that of other rules"):
            accelerator.load_state(tmp_path)


def test_attached_twice():
    clipping = GradClipping(0.5)
    accelerator, model, optimizer = make(clipping)
    with pytest.raises(ValueError) as error:
        clipping.attach(accelerator, model, optimizer)
    assert str(error.value) == ("GradClipping: attached already; make another for each optimizer")


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "XLA", "FSDP"])
def test_gradients_that_only_its_own_clipping_sees(kind, monkeypatch):
    accelerator, model, optimizer = make()
    monkeypatch.setitem(accelerator.state._shared_state, "distributed_type", DistributedType[kind])
    monkeypatch.setitem(accelerator.state._shared_state, "is_fsdp2", False)
    with pytest.raises(ValueError) as error:
        GradClipping(0.5).attach(accelerator, model, optimizer)
    assert str(error.value) == (
        f"GradClipping: {kind} keeps gradients where only its own clipping sees them; set the "
        "largest norm there"
    )
    assert "clip_grad_norm_" not in vars(accelerator)


def test_bad_arguments():
    with pytest.raises(TypeError) as error:
        GradClipping(limit=1.0)
    assert str(error.value) == "GradClipping: got an unexpected keyword argument 'limit'"
