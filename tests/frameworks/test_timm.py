"""The clipping of timm, under the patch."""

from __future__ import annotations

import copy
import functools

import pytest
import timm.optim
import torch
import trainers
from timm.utils import NativeScaler, dispatch_clip_grad


@functools.cache
def model_to_copy():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=3, img_size=32, in_chans=1)


def train(precision, mode=None, limit=None, scaler=None):
    model = copy.deepcopy(model_to_copy())
    optimizer = timm.optim.create_optimizer_v2(model, "sgd", lr=0.1)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(trainers.STEPS):
        inputs = torch.randn(2, 1, 32, 32, generator=generator)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            outputs = model(inputs)
        loss = torch.nn.functional.cross_entropy(outputs.float(), torch.tensor([0, 2]))
        losses.append(loss.item())
        if scaler is not None:
            scaler(loss, optimizer, limit, mode, model.parameters())
            continue
        loss.backward()
        if mode is not None:
            dispatch_clip_grad(model.parameters(), limit, mode)
        optimizer.step()
    return losses


each_mode = pytest.mark.parametrize(
    "mode, limit, name", [("norm", 0.1, "clip_grad_norm_"), ("value", 1e-3, "clip_grad_value_")]
)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@each_mode
def test_dispatch_clip_grad(mode, limit, name, precision):
    trainers.assert_same_under_patch(
        lambda: train(precision, mode, limit),
        {f"gradclip_ext::{name}": trainers.STEPS},
        train(precision),
    )


@each_mode
def test_native_scaler(mode, limit, name):
    trainers.assert_same_under_patch(
        lambda: train("float32", mode, limit, NativeScaler(device="cpu")),
        {f"gradclip_ext::{name}": trainers.STEPS},
        train("float32"),
    )


def test_its_agc_is_left_alone():
    trainers.assert_same_under_patch(lambda: train("float32", "agc", 0.01), {})
