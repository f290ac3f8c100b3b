"""A training step that torch.compile makes one graph of, and CUDA graphs of that."""

from __future__ import annotations

import math

import pytest
import reference as ref
import torch
from on_gpu import ONLY_ON_A_GPU, captured, gradients_of, kernels_of

import gradclip_ext

pytestmark = [*ONLY_ON_A_GPU, pytest.mark.filterwarnings("ignore")]

SHAPES = [(64, 3, 7, 7), (64,), (), (0, 5), (1000, 300)]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def clip(parameters, max_norm):
    return gradclip_ext.clip_grad_norm_(parameters, max_norm)


def check_clipped(gradients, before, norm, max_norm):
    ref.assert_norm(norm, before, 2.0)
    coefficient = ref.reference_coefficient(max_norm, ref.reference_norm(before, 2.0))
    for gradient, expected in zip(gradients, before, strict=True):
        ref.assert_scaled(gradient, expected, coefficient)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ref.name_of)
def test_values(dtype, mode):
    gradients = gradients_of(SHAPES, dtype)
    parameters = ref.parameters(gradients)
    step = torch.compile(clip, fullgraph=True, mode=mode)
    # The first calls warm up and record; the number changes, and the gradients do.
    for i, max_norm in enumerate([1.0, 1.5, 2.0, 1e9, 0.5, 0.25]):
        for gradient, fresh in zip(gradients, gradients_of(SHAPES, dtype, 1 + i), strict=True):
            gradient.copy_(fresh)
        before = [ref.widened(gradient) for gradient in gradients]
        check_clipped(gradients, before, step(parameters, max_norm), max_norm)


def test_our_kernels_run():
    parameters = ref.parameters(gradients_of(SHAPES))
    step = torch.compile(clip, fullgraph=True)
    names = [name for name in kernels_of(lambda: step(parameters, 1.0)) if "gradclip" in name]
    # Those that measure and finish the norm, and one that scales.
    assert len(names) == 3


def test_without_device_sync():
    parameters = ref.parameters(gradients_of(SHAPES))
    step = torch.compile(clip, fullgraph=True)
    step(parameters, 1.0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = step(parameters, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm.isfinite()


def test_a_whole_step_in_one_cuda_graph():
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 50, device="cuda")
    inputs = torch.randn(40, 300, device="cuda")
    max_norm = torch.tensor(1.0, device="cuda")

    @torch.compile(fullgraph=True)
    @torch.no_grad()
    def update():
        norm = gradclip_ext.clip_grad_norm_(model.parameters(), max_norm)
        for parameter in model.parameters():
            parameter.sub_(0.1 * parameter.grad)
        return norm

    def train():
        model(inputs).pow(2).sum().backward()
        return update()

    # torch asks for a few steps on another stream before the one that is captured.
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad()
            train()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad()
    graph, norm = captured(train)
    for threshold in (1.0, 0.125, 1e9):
        max_norm.fill_(threshold)
        before = [p.detach().double() for p in model.parameters()]
        graph.replay()
        gradients = [p.grad.double() for p in model.parameters()]
        length = math.sqrt(sum(g.square().sum().item() for g in gradients))
        assert length == pytest.approx(min(threshold, norm.item()), rel=1e-4)
        for parameter, old, gradient in zip(model.parameters(), before, gradients, strict=True):
            torch.testing.assert_close(
                parameter.double(), old - 0.1 * gradient, rtol=1e-5, atol=1e-6
            )


def test_error_if_nonfinite_waits_and_changes_nothing():
    gradients = gradients_of(SHAPES)
    gradients[1][3] = math.nan
    parameters = ref.parameters(gradients)
    before = [gradient.clone() for gradient in gradients]
    step = torch.compile(
        lambda ps: gradclip_ext.clip_grad_norm_(ps, 1.0, error_if_nonfinite=True), fullgraph=True
    )
    with pytest.raises(RuntimeError, match=r"parameters\[1\]\.grad of shape \(64,\)"):
        step(parameters)
    for gradient, expected in zip(gradients, before, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)
