"""CUDA graphs: a capture forbids a device sync, and a replay finds only what is kept on the GPU."""

from __future__ import annotations

import gc
import math

import pytest
import reference as ref
import torch
from on_gpu import ONLY_ON_A_GPU, captured, run_in_a_new_process
from torch import nn

import gradclip_ext
from gradclip_ext import GradClipper, _ops, grad_norms

pytestmark = ONLY_ON_A_GPU


@pytest.mark.parametrize("size", [1000, 1_000_000], ids=["one block", "many blocks"])
def test_replays_with_new_gradients(size):
    gradient = torch.ones(size, device="cuda")
    max_norm = torch.tensor(1.0, device="cuda")
    parameters = ref.parameters([gradient])
    gradclip_ext.clip_grad_norm_(parameters, max_norm)
    graph, norm = captured(lambda: gradclip_ext.clip_grad_norm_(parameters, max_norm))
    for value, threshold in [(2.0, 1.0), (3.0, 2.0), (1e-9, 1.0), (5.0, 0.5)]:
        gradient.fill_(value)
        max_norm.fill_(threshold)
        graph.replay()
        expected = value * math.sqrt(size)
        assert norm.item() == pytest.approx(expected, rel=1e-6)
        coefficient = ref.reference_coefficient(threshold, expected)
        assert gradient[-1].item() == pytest.approx(value * coefficient, rel=1e-6)


@pytest.mark.parametrize("name", ["get_total_norm", "clip_grads_with_norm_", "clip_grad_value_"])
def test_the_others_can_be_captured(name):
    gradient = torch.ones(1_000_000, device="cuda")
    norm = torch.tensor(1000.0, device="cuda")
    parameter = ref.parameter(gradient)
    calls = {
        "get_total_norm": lambda: gradclip_ext.get_total_norm([gradient]),
        "clip_grads_with_norm_": lambda: gradclip_ext.clip_grads_with_norm_(parameter, 1.0, norm),
        "clip_grad_value_": lambda: gradclip_ext.clip_grad_value_(parameter, 0.5),
    }
    calls[name]()
    graph, result = captured(calls[name])
    gradient.fill_(3.0)
    graph.replay()
    torch.cuda.synchronize()
    if name == "get_total_norm":
        assert result.item() == 3000.0
    else:
        expected = 3.0 / (1000.0 + 1e-6) if name == "clip_grads_with_norm_" else 0.5
        assert gradient[123].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [1000, 1_000_000], ids=["one block", "many blocks"])
def test_first_call_of_a_process(size):
    # Kernels are loaded, and the device is asked for its properties, while torch captures.
    run_in_a_new_process(f"""
import math
import torch
import gradclip_ext

gradient = torch.ones({size}, device="cuda")
parameter = torch.nn.Parameter(torch.zeros_like(gradient))
parameter.grad = gradient
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    norm = gradclip_ext.clip_grad_norm_([parameter], 1.0)
for value in (2.0, 3.0):
    gradient.fill_(value)
    graph.replay()
    expected = value * math.sqrt({size})
    assert math.isclose(norm.item(), expected, rel_tol=1e-6), (norm.item(), expected)
    found = gradient[-1].item()
    assert math.isclose(found, 1.0 / math.sqrt({size}), rel_tol=1e-6), found
print("done")
""")


class Limits:
    """A rule with a limit of its own for each parameter."""

    per_parameter = True
    epsilon = 0.0

    def __init__(self, limits):
        self.values = limits

    def limits(self, total, norms):
        return self.values

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def parameters_some_of_them_frozen(size):
    """Seven parameters, of which the third has no gradient and the fifth an empty one."""
    gradients = [torch.ones(size + i, device="cuda") for i in range(7)]
    gradients[2], gradients[4] = None, torch.ones(0, 3, device="cuda")
    return ref.parameters(gradients), [0, 1, 3, 5, 6]


def fill(parameters, filled, value):
    """Gives each gradient equal elements; returns the norm of each, 0 for those without any."""
    norms = [0.0] * len(parameters)
    for i in filled:
        parameters[i].grad.fill_(value + i)
        norms[i] = (value + i) * math.sqrt(parameters[i].grad.numel())
    return norms


def write_over_freed_host_memory():
    gc.collect()
    junk = [torch.full((n,), -7, dtype=torch.int64) for n in range(1, 33) for _ in range(50)]
    junk += [torch.full((n,), math.nan) for n in range(1, 33) for _ in range(50)]
    del junk


def assert_scaled_by(parameters, filled, value, coefficients):
    for i in filled:
        expected = (value + i) * coefficients[i]
        torch.testing.assert_close(
            parameters[i].grad, torch.full_like(parameters[i].grad, expected), rtol=1e-6, atol=0
        )


by_size = pytest.mark.parametrize("size", [100, 300_000], ids=["small", "large"])


@by_size
def test_clip_grad_norm_with_frozen_parameters(size):
    parameters, filled = parameters_some_of_them_frozen(size)
    gradclip_ext.clip_grad_norm_(parameters, 1.0)
    graph, norm = captured(lambda: gradclip_ext.clip_grad_norm_(parameters, 1.0))
    for value in (2.0, 5.0):
        norms = fill(parameters, filled, value)
        write_over_freed_host_memory()
        graph.replay()
        total = math.hypot(*norms)
        assert norm.item() == pytest.approx(total, rel=1e-6)
        coefficient = ref.reference_coefficient(1.0, total)
        assert_scaled_by(parameters, filled, value, [coefficient] * len(parameters))


@by_size
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf], ids=lambda p: f"L{p:g}")
def test_grad_norms_with_frozen_parameters(norm_type, size):
    parameters, filled = parameters_some_of_them_frozen(size)
    grad_norms(parameters, norm_type)
    graph, measured = captured(lambda: grad_norms(parameters, norm_type))
    for value in (2.0, 5.0):
        fill(parameters, filled, value)
        write_over_freed_host_memory()
        graph.replay()
        torch.cuda.synchronize()
        present = [parameters[i].grad for i in filled]
        expected = [0.0] * len(parameters)
        for i in filled:
            expected[i] = ref.reference_norm([parameters[i].grad], norm_type)
        assert measured.norms.tolist() == pytest.approx(expected, rel=1e-6)
        total = ref.reference_norm(present, norm_type)
        assert measured.total.item() == pytest.approx(total, rel=1e-6)


@by_size
def test_a_coefficient_for_each_with_frozen_parameters(size):
    parameters, filled = parameters_some_of_them_frozen(size)
    coefficients = torch.ones(7, dtype=torch.float64, device="cuda")
    caller = _ops.Caller("scale_each_")
    _ops.scale_each_(parameters, coefficients, caller)
    graph, _ = captured(lambda: _ops.scale_each_(parameters, coefficients, caller))
    for value in (2.0, 5.0):
        fill(parameters, filled, value)
        # Also of those without elements, which nothing may be multiplied by.
        numbers = [0.5, 1.0, 100.0, 0.25, 200.0, 0.0, 3.0]
        coefficients.copy_(torch.tensor(numbers, dtype=torch.float64))
        write_over_freed_host_memory()
        graph.replay()
        torch.cuda.synchronize()
        assert_scaled_by(parameters, filled, value, numbers)


@by_size
def test_a_rule_for_each_parameter_with_frozen_parameters(size):
    parameters, filled = parameters_some_of_them_frozen(size)
    limits = [1.0, math.inf, 5.0, 2.0, 7.0, 0.5, 1.5]
    rule = Limits(torch.tensor(limits, dtype=torch.float64, device="cuda"))
    clipper = GradClipper(parameters, rule)
    clipper.clip_()
    graph, _ = captured(clipper.clip_)
    for value in (2.0, 5.0):
        norms = fill(parameters, filled, value)
        write_over_freed_host_memory()
        graph.replay()
        torch.cuda.synchronize()
        coefficients = [
            min(1.0, limit / norm) if norm else 1.0
            for limit, norm in zip(limits, norms, strict=True)
        ]
        assert_scaled_by(parameters, filled, value, coefficients)


def test_a_clipper_with_frozen_parameters():
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300)).cuda()
    model[0].requires_grad_(False)
    for parameter in model[1].parameters():
        parameter.grad = torch.ones_like(parameter)
    clipper = GradClipper(model, 1.0)
    clipper.clip_()
    graph, norm = captured(clipper.clip_)
    for value in (2.0, 5.0):
        model[1].weight.grad.fill_(value)
        model[1].bias.grad.fill_(value)
        write_over_freed_host_memory()
        graph.replay()
        total = value * math.sqrt(300 * 301)
        assert norm.item() == pytest.approx(total, rel=1e-6)
        coefficient = ref.reference_coefficient(1.0, total)
        assert model[1].bias.grad[7].item() == pytest.approx(value * coefficient, rel=1e-6)
        report = clipper.report()
        assert report.total_norm == pytest.approx(total, rel=1e-6)
        expected = [0.0, 0.0, value * 300.0, value * math.sqrt(300)]
        assert report.norms == pytest.approx(expected, rel=1e-6)
