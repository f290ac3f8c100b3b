"""Clipping and stepping at once, with the optimizers that frameworks wrap theirs in."""

from __future__ import annotations

import lightning
import pytest
import torch
import trainers
from accelerate import Accelerator
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch.utils.data import DataLoader

from gradclip_ext import AdaGC, GradClipper, clip_and_step

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "fused SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
}


def batches():
    """The last one has a gradient that is not finite."""
    *good, (inputs, targets) = trainers.make_batches()
    return [*good, (inputs, targets * torch.inf)]


def plainly(make_optimizer, step):
    model = trainers.make_model()
    optimizer = make_optimizer(model.parameters())
    for inputs, targets in batches():
        optimizer.zero_grad()
        trainers.loss_of(model(inputs), targets).backward()
        step(optimizer)
    return model


def in_fabric(make_optimizer, step):
    fabric = Fabric(accelerator="cpu")
    model = trainers.make_model()
    model, optimizer = fabric.setup(model, make_optimizer(model.parameters()))
    for inputs, targets in batches():
        optimizer.zero_grad()
        fabric.backward(trainers.loss_of(model(inputs), targets))
        step(optimizer)
    return model.module


def in_accelerate(make_optimizer, step):
    accelerator = Accelerator(cpu=True)
    model = trainers.make_model()
    model, optimizer = accelerator.prepare(model, make_optimizer(model.parameters()))
    for inputs, targets in batches():
        optimizer.zero_grad()
        accelerator.backward(trainers.loss_of(model(inputs), targets))
        step(optimizer)
    return model


class Module(lightning.LightningModule):
    def __init__(self, make_optimizer, step):
        super().__init__()
        self.automatic_optimization = False
        self.model = trainers.make_model()
        self.make_optimizer = make_optimizer
        self.step = step

    def training_step(self, batch, index):
        inputs, targets = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(trainers.loss_of(self.model(inputs), targets))
        self.step(optimizer)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def in_lightning(make_optimizer, step):
    module = Module(make_optimizer, step)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches(), batch_size=None))
    assert trainer.global_step in (trainers.STEPS, trainers.STEPS - 1)
    return module.model


def by_hand(optimizer):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if torch.nn.utils.clip_grad_norm_(parameters, 0.5).isfinite():
        optimizer.step()


def by_clip_and_step(optimizer):
    clip_and_step(optimizer, 0.5, skip_nonfinite=True)


def by_clipper(optimizer):
    GradClipper(optimizer, 0.5, nonfinite="skip").step(optimizer)


@pytest.mark.parametrize("train", [in_fabric, in_accelerate, in_lightning])
@pytest.mark.parametrize("step", [by_clip_and_step, by_clipper])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_model_is_that_of_clipping_by_hand(name, step, train):
    expected = plainly(OPTIMIZERS[name], by_hand)
    for steps in (by_hand, step):
        model = train(OPTIMIZERS[name], steps)
        for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("train", [in_fabric, in_accelerate, in_lightning])
def test_a_rule_for_each_parameter(train):
    def step(optimizer):
        # The same clipper in each step.
        clipper = clippers.setdefault("one", GradClipper(optimizer, AdaGC(), nonfinite="skip"))
        clipper.step(optimizer)

    models = []
    for train_in in (plainly, train):
        clippers = {}
        models.append(train_in(OPTIMIZERS["fused SGD"], step))
        report = clippers["one"].report()
        assert (report.steps, report.skipped_steps) == (trainers.STEPS, 1)
    for parameter, other in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaler_of_fabric_with_the_optimizer_inside(name):
    """Which it steps with its scaler by itself."""

    def train(step):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        fabric = Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler))
        model = trainers.make_model()
        model, optimizer = fabric.setup(model, OPTIMIZERS[name](model.parameters()))
        for inputs, targets in batches():
            optimizer.zero_grad()
            fabric.backward(trainers.loss_of(model(inputs), targets))
            step(fabric, model, optimizer.optimizer, scaler)
            scaler.update()
        return model.module, scaler.get_scale()

    def recipe(fabric, model, optimizer, scaler):
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)

    def ours(fabric, model, optimizer, scaler):
        clip_and_step(optimizer, 0.5, scaler=scaler)

    expected, scale = train(recipe)
    model, found = train(ours)
    assert found == scale == 128.0
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-6)
