"""No device sync: nothing that is computed on a GPU is read on the host."""

from __future__ import annotations

import functools

import pytest
import torch
from scaling import make_parameters, make_scaler
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, Adam, AdamW

from gradclip_ext import _ops, clip_and_step, unscale_and_clip_grad_norm_
from gradclip_ext._ops import fused

pytestmark = pytest.mark.cpu_only

# The kernels of SGD and Adagrad do not say what they give for fake tensors.
FUSED = {
    "AdamW": AdamW,
    "Adam": functools.partial(Adam, amsgrad=True, capturable=True),
}


class TestOnFakeGpu:
    """Tensors on a GPU without values: reading a number raises, as does mixing devices."""

    @pytest.fixture(autouse=True)
    def fake(self, monkeypatch):
        # A fake tensor is not plain, and the engine cannot multiply it; all else is the same.
        def scale_(parameters, coefficient, caller):
            for parameter in parameters:
                parameter.grad.mul_(coefficient)

        monkeypatch.setattr(fused, "obstacle", lambda *_: None)
        monkeypatch.setattr(_ops, "scale_", scale_)
        with FakeTensorMode():
            yield

    @staticmethod
    def parameters():
        result = []
        for dtype in (torch.float32, torch.bfloat16):
            result.append(nn.Parameter(torch.empty(4, 3, device="cuda", dtype=dtype)))
            result[-1].grad = torch.empty(4, 3, device="cuda", dtype=dtype)
        return result

    @staticmethod
    def scaler():
        # Its scale is where the loss is.
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones((), device="cuda"))
        return scaler

    def test_reading_a_number_raises(self):
        with pytest.raises(Exception, match="local_scalar_dense"):
            torch.empty((), device="cuda").item()

    @pytest.mark.parametrize("norm_type", [2.0, 3.0, 0.0])
    def test_unscale_and_clip(self, norm_type):
        parameters, scaler = self.parameters(), self.scaler()
        spared = {"params": parameters[1:], "clip_grad": False}
        for optimizer in (
            SGD(parameters, lr=0.1),
            SGD([{"params": parameters[:1]}, spared], lr=0.1),
        ):
            norm = unscale_and_clip_grad_norm_(scaler, optimizer, 1.0, norm_type)
            assert norm.device.type == "cuda" and norm.shape == ()
            scaler.update()
        unscale_and_clip_grad_norm_(
            scaler, SGD(parameters[:1]), 1.0, norm_type, parameters=parameters
        )

    @pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
    def test_clip_and_step(self, make):
        optimizer, scaler = make(self.parameters(), fused=True), self.scaler()
        for _ in range(2):
            clip_and_step(optimizer, 1.0)
            clip_and_step(optimizer, torch.ones((), device="cuda"), skip_nonfinite=True)
            clip_and_step(optimizer, 1.0, scaler=scaler)
            scaler.update()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_torch_sees_no_synchronization(make):
    with torch.device("cuda"):
        parameters = make_parameters()
        optimizer, scaler = make(parameters, fused=True), make_scaler()
        clip_and_step(optimizer, 0.5)
        torch.cuda.set_sync_debug_mode("error")
        try:
            clip_and_step(optimizer, 0.5, skip_nonfinite=True)
            clip_and_step(optimizer, 0.5, scaler=scaler)
            unscale_and_clip_grad_norm_(make_scaler(), SGD(parameters, lr=0.1), 0.5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
