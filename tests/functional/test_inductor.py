"""A compiled training step with torch's own compiler, Inductor: no copies, the same numbers.

Few tests, since each compiles C++.
"""

from __future__ import annotations

import functools
import math
import re

import pytest
import reference as ref
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import gradclip_ext

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def backward(model, step):
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(5, 6, generator=generator)).pow(2).sum().backward()


def compare(update_of, compiler, steps):
    """Train with the same update, compiled and not; max_norm and learning rate follow schedules."""
    norms, models = [], []
    for compile_update in (lambda update: update, compiler):
        model = network()
        update = compile_update(update_of(model))
        learning_rate = torch.tensor(0.0)
        for step in range(steps):
            model.zero_grad()
            backward(model, step)
            norms.append(update(1.0 + 0.25 * step, learning_rate.fill_(0.1 / (1 + step))).clone())
        models.append(model)
    for eager, compiled in zip(norms[:steps], norms[steps:], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0.0)
    for eager, compiled in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-8)


def update_by_hand(model):
    @torch.no_grad()
    def update(max_norm, learning_rate):
        norm = gradclip_ext.clip_grad_norm_(model.parameters(), max_norm)
        for parameter in model.parameters():
            parameter.sub_(learning_rate * parameter.grad)
        return norm

    return update


def test_two_graphs_for_twelve_steps():
    graphs = CompileCounterWithBackend("inductor")
    compare(update_by_hand, functools.partial(torch.compile, backend=graphs, fullgraph=True), 12)
    assert graphs.frame_count <= 2


def test_reduce_overhead_on_the_cpu():
    compiler = functools.partial(torch.compile, mode="reduce-overhead", fullgraph=True)
    compare(update_by_hand, compiler, 3)


def test_with_an_optimizer_of_torch():
    # Which breaks the graph at its own step.
    def update_of(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def update(max_norm, learning_rate):
            norm = gradclip_ext.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.param_groups[0]["lr"] = learning_rate
            optimizer.step()
            return norm

        return update

    compare(update_of, torch.compile, 3)


def buffers(code):
    """How many numbers each buffer holds that the compiled code allocates."""
    shapes = re.findall(r"empty_strided_cpu\(\(([^)]*)\)", code)
    return [math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in shapes]


@pytest.mark.parametrize("shared", [False, True], ids=["memory of their own", "one bucket"])
@pytest.mark.parametrize("finite", [False, True], ids=["any", "error_if_nonfinite"])
def test_no_gradient_is_copied(finite, shared):
    gradients = [ref.random_gradient((n,), seed=n) for n in (20, 7, 300)]
    if shared:
        gradients = list(torch.cat(gradients).split([20, 7, 300]))
    parameters = ref.parameters(gradients)
    before = [ref.widened(gradient) for gradient in gradients]

    def clip(parameters):
        return gradclip_ext.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=finite)

    norm, (code,) = run_and_get_code(torch.compile(clip, fullgraph=True), parameters)
    if finite and shared and not ref.WITHOUT_GRAPH_BREAKS:
        # Torch 2.6 copies the one gradient that is declared to be written.
        assert sorted(buffers(code))[-2:] == [1, 20]
    else:
        assert buffers(code) and set(buffers(code)) == {1}
    ref.assert_norm(norm, before, 2.0)
    coefficient = ref.reference_coefficient(1.0, ref.reference_norm(before, 2.0))
    for gradient, expected in zip(gradients, before, strict=True):
        ref.assert_scaled(gradient, expected, coefficient)


def test_values_in_one_bucket_are_limited():
    gradients = list(ref.random_gradient((327,), seed=1).split([20, 7, 300]))
    expected = [gradient.clone().clamp_(-0.5, 0.5) for gradient in gradients]
    parameters = ref.parameters(gradients)
    torch.compile(lambda ps: gradclip_ext.clip_grad_value_(ps, 0.5), fullgraph=True)(parameters)
    ref.assert_unchanged(gradients, expected)


def test_the_error_is_raised_and_nothing_changed():
    parameters = ref.parameters([torch.ones(3), torch.tensor([[1.0, math.nan]])])
    before = [p.grad.clone() for p in parameters]

    def measure(parameters):
        gradients = [p.grad for p in parameters]
        gradclip_ext.get_total_norm(gradients, error_if_nonfinite=True)
        gradients[0].mul_(2.0)

    with pytest.raises(RuntimeError, match=r"is that of tensors\[1\] of shape \(1, 2\)\."):
        torch.compile(measure, fullgraph=True)(parameters)
    for parameter, gradient in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0, equal_nan=True)


def test_gradients_that_the_graph_computes():
    weights = [ref.random_gradient((40,), seed=1), ref.random_gradient((3, 4), seed=2)]

    def norm_of(one, other):
        return gradclip_ext.get_total_norm([one * 2.0, (other * 3.0).t()])

    norm = torch.compile(norm_of, fullgraph=True)(*weights)
    ref.assert_norm(norm, [weights[0] * 2.0, weights[1] * 3.0], 2.0)


@pytest.mark.skipif(not ref.WITHOUT_GRAPH_BREAKS, reason="cannot multiply complex tensors in place")
def test_complex_gradients():
    gradients = [ref.random_gradient((50,), torch.complex64, 1), ref.random_gradient((9,), seed=2)]
    parameters = ref.parameters(gradients)
    before = [ref.widened(gradient) for gradient in gradients]
    norm = torch.compile(lambda ps: gradclip_ext.clip_grad_norm_(ps, 1.0), fullgraph=True)(
        parameters
    )
    ref.assert_norm(norm, before, 2.0)
    coefficient = ref.reference_coefficient(1.0, ref.reference_norm(before, 2.0))
    for gradient, expected in zip(gradients, before, strict=True):
        ref.assert_scaled(gradient, expected, coefficient)


@pytest.mark.skipif(not ref.WITHOUT_GRAPH_BREAKS, reason="cannot compile backward")
def test_with_compiled_autograd():
    def train(model, inputs, max_norm):
        model(inputs).pow(2).sum().backward()
        return gradclip_ext.clip_grad_norm_(model.parameters(), max_norm)

    eager, compiled = network(), network()
    inputs = torch.randn(5, 6)
    expected = train(eager, inputs, 1.0)
    with torch._dynamo.config.patch(compiled_autograd=True):
        norm = torch.compile(train, backend="aot_eager")(compiled, inputs, 1.0)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0.0)
    for one, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-8)
