"""Accelerate's own clipping, under the patch."""

from __future__ import annotations

import pytest
import torch
import trainers
from accelerate import Accelerator
from accelerate.state import AcceleratorState


def train(mixed_precision="no", norm=None, value=None, batches=trainers.STEPS, accumulate=1):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=accumulate
    )
    model = trainers.make_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    losses = []
    for inputs, targets in trainers.make_batches(batches):
        with accelerator.accumulate(model):
            loss = trainers.loss_of(model(inputs), targets)
            losses.append(loss.item())
            accelerator.backward(loss)
            if accelerator.sync_gradients and norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), norm)
            if accelerator.sync_gradients and value is not None:
                accelerator.clip_grad_value_(model.parameters(), value)
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize(
    "clipping, name",
    [({"norm": 0.5}, "clip_grad_norm_"), ({"value": 0.01}, "clip_grad_value_")],
    ids=["norm", "value"],
)
def test_accelerator(clipping, name, mixed_precision):
    trainers.assert_same_under_patch(
        lambda: train(mixed_precision, **clipping),
        {f"gradclip_ext::{name}": trainers.STEPS},
        train(mixed_precision),
    )


def test_accelerator_that_accumulates():
    trainers.assert_same_under_patch(
        lambda: train(norm=0.5, batches=8, accumulate=4), {"gradclip_ext::clip_grad_norm_": 2}
    )
