"""Models with gradients that a GradScaler has scaled, for the suites of amp/ and optim/."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from gradclip_ext import _C, _ops

SHAPES = ((7, 5), (13,), (3, 4, 5), ())
SCALE = 1024.0


def make_parameters(dtype=torch.float32, seed=0, shapes=SHAPES):
    """Parameters with gradients."""
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device()

    def random(shape):
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    parameters = []
    for shape in shapes:
        parameters.append(nn.Parameter(random(shape)))
        parameters[-1].grad = random(shape)
    return parameters


def copies(parameters):
    """Parameters with the same values and gradients."""
    result = []
    for parameter in parameters:
        result.append(nn.Parameter(parameter.detach().clone()))
        if parameter.grad is not None:
            result[-1].grad = parameter.grad.detach().clone()
    return result


def make_scaler(init_scale=SCALE, cls=torch.amp.GradScaler, **settings):
    """A scaler that has scaled a loss."""
    scaler = cls(torch.get_default_device().type, init_scale=init_scale, **settings)
    scaler.scale(torch.ones(()))
    return scaler


def scale_gradients(parameters, scale=SCALE):
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(scale)


def gradients(parameters):
    return [None if p.grad is None else p.grad.detach().clone() for p in parameters]


def values(parameters):
    return [parameter.detach().clone() for parameter in parameters]


def same(ones, others):
    """Whether two lists of tensors, or Nones, hold the same bits."""
    return len(ones) == len(others) and all(
        (one is None and other is None)
        or (one is not None and other is not None and torch.equal(bits(one), bits(other)))
        for one, other in zip(ones, others, strict=True)
    )


def bits(tensor: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


def ulps(one: Tensor, other: Tensor) -> float:
    """The largest distance of two tensors without NaN in units in the last place."""
    if one.numel() == 0:
        return 0.0

    def rank(tensor):
        whole = bits(tensor).to(torch.int64)
        lowest = -(2 ** (8 * tensor.element_size() - 1))
        return torch.where(whole < 0, lowest - whole, whole)

    return float((rank(one) - rank(other)).abs().max())


def stage(scaler, optimizer):
    return scaler._per_optimizer_states[id(optimizer)]["stage"].name


def flags(scaler, optimizer):
    recorded = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return sum(flag.item() for flag in recorded.values())


def is_known(norm: Tensor) -> bool:
    """Whether the host may read it; not so on a GPU, the emulated one included."""
    return not isinstance(_ops.known(norm.double()), Tensor)


class Calls:
    """How often each native pass over gradients has run."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.counts = {"grad_norms": 0, "scale_": 0}
        for name in self.counts:
            patch.setattr(_C, name, self._counted(name, getattr(_C, name)))

    def _counted(self, name, function):
        def counted(*arguments):
            result = function(*arguments)
            self.counts[name] += result is not None
            return result

        return counted


@contextlib.contextmanager
def numbers_stay_in_tensors() -> Iterator[None]:
    """As on a GPU: the host knows no number, and reading one in Python is an error.

    Only the engine reads the coefficient, where the gradients are.
    """
    read, scale_ = torch.Tensor.item, _C.scale_

    def refuse(*_):
        raise AssertionError("a number was read on the host")

    def scale_on_device(parameters, coefficient):
        is_tensor = isinstance(coefficient, torch.Tensor)
        return scale_(parameters, read(coefficient) if is_tensor else coefficient)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ops, "known", lambda number: number)
        patch.setattr(_C, "scale_", scale_on_device)
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, refuse)
        yield


@contextlib.contextmanager
def one_rank():
    """A device mesh of this process alone."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def compare_200_steps(update, fused):
    """Trains with ``update(optimizer, scaler, max_norm)`` and beside it with torch's three calls.

    Some steps overflow. Scale, growth tracker, stages and skipped steps have to be the same, and
    parameters within 1e-6.
    """

    def three_calls(optimizer, scaler, max_norm):
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm)
        assert stage(scaler, optimizer) == "UNSCALED"
        scaler.step(optimizer)

    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, fused=fused) for m in models]
    settings = {"init_scale": 2.0**126, "growth_interval": 3, "growth_factor": 4.0}
    scalers = [make_scaler(**settings) for _ in models]
    pairs = list(zip(scalers, optimizers, strict=True))
    skipped = 0
    for step in range(200):
        inputs, targets = torch.randn(8, 6), torch.randn(8, 2)
        for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean() * (1.0 + 50.0 * (step % 7 == 0))
            scaler.scale(loss).backward()
        update(optimizers[0], scalers[0], 0.1)
        three_calls(optimizers[1], scalers[1], 0.1)
        assert [stage(*pair) for pair in pairs] == ["STEPPED"] * 2
        found = [flags(*pair) for pair in pairs]
        assert found[0] == found[1]
        skipped += int(found[0])
        for scaler in scalers:
            scaler.update()
        assert scalers[0].state_dict() == scalers[1].state_dict()
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert 10 < skipped < 150
    steps = [int(next(iter(optimizer.state.values()))["step"]) for optimizer in optimizers]
    assert steps == [200 - skipped] * 2
