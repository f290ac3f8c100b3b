"""For the suites of frameworks/: a small model to train, and what a training did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradclip_ext import patch

STEPS = 6
SIZE = 16
# Losses of a training with and without this package, relative: the same, but for the last bits
# of a norm.
SAME = 2e-6


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 1))


def make_batches(count: int = STEPS, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets that are far enough off for gradients to be clipped."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, size, SIZE, generator=generator)
    targets = 5.0 * torch.randn(count, size, 1, generator=generator)
    return list(zip(inputs, targets, strict=True))


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs.float(), targets)


def ranges_in(run: Callable[[], object]) -> Counter[str]:
    """The profiler ranges that this package opens, and torch's norms, and how often."""
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        run()
    # Clipping that is left to torch opens a range of this package too, with others inside.
    names = ("gradclip_ext::", "aten::_foreach_norm")
    return Counter(event.name for event in profiler.events() if event.name.startswith(names))


def assert_same_under_patch(
    train: Callable[[], list[float]], ranges: dict[str, int], unclipped: list[float] | None = None
) -> None:
    """The losses are the same with torch's functions and with ours, which ran as often as told.

    Args:
        train: trains from the same start and gives the losses.
        ranges: the profiler ranges, and how often each is opened.
        unclipped: the losses without clipping, which has to make a difference.
    """
    expected = train()
    losses: list[float] = []
    with patch():
        found = ranges_in(lambda: losses.extend(train()))
    assert len(expected) >= STEPS
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=SAME, atol=0.0)
    assert found == ranges
    if unclipped is not None:
        difference = (torch.tensor(unclipped) - torch.tensor(expected)).abs()
        assert difference[1:].min() > 1e-3
