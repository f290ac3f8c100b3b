"""Lightning's own clipping, under the patch."""

from __future__ import annotations

import lightning
import pytest
import torch
import trainers
from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from gradclip_ext import patch


class Module(lightning.LightningModule):
    def __init__(self, optimizer=torch.optim.SGD):
        super().__init__()
        self.model = trainers.make_model()
        self.losses = []
        self.optimizer = optimizer

    def training_step(self, batch, index):
        inputs, targets = batch
        loss = trainers.loss_of(self.model(inputs), targets)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.05)


def train(batches=trainers.STEPS, **options):
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    data = DataLoader(trainers.make_batches(batches), batch_size=None)
    trainer.fit(module, data)
    return module.losses


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "algorithm, limit, name",
    [("norm", 0.5, "clip_grad_norm_"), ("value", 0.01, "clip_grad_value_")],
)
def test_trainer(algorithm, limit, name, precision):
    def run():
        return train(
            precision=precision, gradient_clip_val=limit, gradient_clip_algorithm=algorithm
        )

    trainers.assert_same_under_patch(
        run, {f"gradclip_ext::{name}": trainers.STEPS}, train(precision=precision)
    )


def test_trainer_clips_only_where_it_steps():
    def run():
        return train(batches=8, accumulate_grad_batches=4, gradient_clip_val=0.5)

    trainers.assert_same_under_patch(run, {"gradclip_ext::clip_grad_norm_": 2})


def fabric_train(precision, **clipping):
    fabric = Fabric(accelerator="cpu", precision=precision)
    model = trainers.make_model()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05))
    losses = []
    for inputs, targets in trainers.make_batches():
        optimizer.zero_grad()
        loss = trainers.loss_of(model(inputs), targets)
        losses.append(loss.item())
        fabric.backward(loss)
        if clipping:
            fabric.clip_gradients(model, optimizer, **clipping)
        optimizer.step()
    return losses


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "clipping, name",
    [
        ({"max_norm": 0.5}, "clip_grad_norm_"),
        ({"max_norm": 0.5, "norm_type": "inf"}, "clip_grad_norm_"),
        ({"clip_val": 0.01}, "clip_grad_value_"),
    ],
    ids=["norm", "inf", "value"],
)
def test_fabric(clipping, name, precision):
    trainers.assert_same_under_patch(
        lambda: fabric_train(precision, **clipping),
        {f"gradclip_ext::{name}": trainers.STEPS},
        fabric_train(precision),
    )


def test_fabric_refuses_a_norm_that_is_not_finite():
    fabric = Fabric(accelerator="cpu")
    model = trainers.make_model()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.01))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.module[2].bias.grad[0] = torch.nan
    with pytest.raises(RuntimeError, match="non-finite, so it cannot be clipped"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    with patch(), pytest.raises(RuntimeError) as error:
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    assert "The total norm of order 2.0 for gradients from `parameters` is non-finite" in str(
        error.value
    )
    assert "The first of 1 non-finite gradients (out of 6)" in str(error.value)
    assert model.module[0].weight.grad.eq(1.0).all()
