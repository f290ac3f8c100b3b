"""A small model with gradients, for the suites of clipper/ and norms/."""

from __future__ import annotations

import reference as ref
import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class Watching(TorchFunctionMode):
    """Observes every operation, so that nothing is read on the host and nothing runs natively."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def make_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    set_gradients(model, seed)
    return model


def set_gradients(model, seed=0, scale=1.0):
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = ref.random_gradient(parameter.shape, seed=100 * seed + index, scale=scale)


def gradients_of(model):
    return [parameter.grad for parameter in model.parameters()]


def clipped(gradients, coefficient):
    return [gradient.double() * coefficient for gradient in gradients]


def assert_gradients(model, expected):
    for gradient, other in zip(gradients_of(model), expected, strict=True):
        torch.testing.assert_close(gradient.double(), other, rtol=1e-6, atol=1e-12)
