"""Gradient lists with the parameter shapes of real models.

Shapes are generated from each architecture's published layout; the counts are asserted, so that a
slip shows at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Shapes = list[tuple[int, ...]]


def lstm() -> Shapes:
    """One LSTM layer (28 inputs, hidden 256) and a classifier for 10 classes."""
    return [(1024, 28), (1024, 256), (1024,), (1024,), (10, 256), (10,)]


def small() -> Shapes:
    """Ten small linear layers, 64 to 64."""
    return [(64, 64), (64,)] * 10


def thousand() -> Shapes:
    """A thousand tensors of a thousand elements."""
    return [(1000,)] * 1000


def resnet50() -> Shapes:
    """He et al., "Deep Residual Learning for Image Recognition" (2015), ResNet-50."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            outputs = 4 * width
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1)]
            if block == 0:
                convolutions.append((outputs, inputs, 1, 1))
            for convolution in convolutions:
                shapes += [convolution, (convolution[0],), (convolution[0],)]
            inputs = outputs
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> Shapes:
    """Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), 124 M."""
    width = 768
    block: Shapes = [
        *[(width,), (width,)],
        *[(width, 3 * width), (3 * width,), (width, width), (width,)],
        *[(width,), (width,)],
        *[(width, 4 * width), (4 * width,), (4 * width, width), (width,)],
    ]
    return [(50257, width), (1024, width), *block * 12, (width,), (width,)]


WORKLOADS: dict[str, Callable[[], Shapes]] = {
    "lstm": lstm,
    "small": small,
    "1000x1000": thousand,
    "resnet50": resnet50,
    "gpt2": gpt2,
}

_COUNTS = {
    "lstm": (6, 295_434),
    "small": (20, 41_600),
    "1000x1000": (1000, 1_000_000),
    "resnet50": (161, 25_557_032),
    "gpt2": (148, 124_439_808),
}

for _name, _make in WORKLOADS.items():
    _shapes = _make()
    assert (len(_shapes), sum(map(math.prod, _shapes))) == _COUNTS[_name], _name
