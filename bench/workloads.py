"""Lists of gradients with the parameter shapes of real models.

Shapes are in the order of `model.parameters()`. They are written down here, so that the models'
libraries need not be installed; a test checks them against the published counts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Standard deviation of the gradients. Their squares barely fit into float16.
SIGMA = 0.01
# Standard deviation of the parameters where their values matter: that of GPT-2's initialization.
PARAMETER_SIGMA = 0.02

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """A list of gradients to clip."""

    name: str
    about: str
    shapes: Sequence[Shape]
    # The only dtype in which the workload makes sense, or "mixed"; None if the run chooses.
    dtype: str | None = None
    # Where a run includes the workload by default.
    devices: tuple[str, ...] = ("cpu", "cuda")
    # One per tensor if the dtype is "mixed".
    dtypes: Sequence[str] = ()

    @property
    def elements(self) -> int:
        """The number of parameters of the model."""
        return sum(map(math.prod, self.shapes))


def lstm() -> list[Shape]:
    return [(1024, 28), (1024, 256), (1024,), (1024,), (10, 256), (10,)]


def mlp() -> list[Shape]:
    return [(512, 784), (512,), (512, 512), (512,), (10, 512), (10,)]


def resnet50() -> list[Shape]:
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            outputs = 4 * width
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1)]
            if block == 0:
                convolutions.append((outputs, inputs, 1, 1))
            for convolution in convolutions:
                shapes += normalized(convolution)
            inputs = outputs
    return [*shapes, (1000, 2048), (1000,)]


# Input channels, kernel size, expanded channels, output channels, squeeze and excitation.
MOBILENET_V3_LARGE = (
    (16, 3, 16, 16, False),
    (16, 3, 64, 24, False),
    (24, 3, 72, 24, False),
    (24, 5, 72, 40, True),
    (40, 5, 120, 40, True),
    (40, 5, 120, 40, True),
    (40, 3, 240, 80, False),
    (80, 3, 200, 80, False),
    (80, 3, 184, 80, False),
    (80, 3, 184, 80, False),
    (80, 3, 480, 112, True),
    (112, 3, 672, 112, True),
    (112, 5, 672, 160, True),
    (160, 5, 960, 160, True),
    (160, 5, 960, 160, True),
)


def mobilenet_v3() -> list[Shape]:
    shapes = normalized((16, 3, 3, 3))
    for inputs, kernel, expanded, outputs, squeezes in MOBILENET_V3_LARGE:
        if expanded != inputs:
            shapes += normalized((expanded, inputs, 1, 1))
        shapes += normalized((expanded, 1, kernel, kernel))
        if squeezes:
            squeezed = multiple_of_8(expanded // 4)
            shapes += [(squeezed, expanded, 1, 1), (squeezed,)]
            shapes += [(expanded, squeezed, 1, 1), (expanded,)]
        shapes += normalized((outputs, expanded, 1, 1))
    return [*shapes, *normalized((960, 160, 1, 1)), (1280, 960), (1280,), (1000, 1280), (1000,)]


def normalized(convolution: Shape) -> list[Shape]:
    """A convolution without bias and its batch normalization."""
    return [convolution, (convolution[0],), (convolution[0],)]


def multiple_of_8(channels: int) -> int:
    """Rounds as the MobileNets do: to the nearest multiple, but never down by more than 10 %."""
    rounded = max(8, (channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def vit_b() -> list[Shape]:
    width = 768
    block: list[Shape] = [
        *[(width,), (width,)],
        *[(3 * width, width), (3 * width,), (width, width), (width,)],
        *[(width,), (width,)],
        *[(4 * width, width), (4 * width,), (width, 4 * width), (width,)],
    ]
    embedding: list[Shape] = [(1, 1, width), (width, 3, 16, 16), (width,), (1, 197, width)]
    return [*embedding, *block * 12, (width,), (width,), (1000, width), (1000,)]


def gpt2() -> list[Shape]:
    width = 768
    block: list[Shape] = [
        *[(width,), (width,)],
        *[(width, 3 * width), (3 * width,), (width, width), (width,)],
        *[(width,), (width,)],
        *[(width, 4 * width), (4 * width,), (4 * width, width), (width,)],
    ]
    return [(50257, width), (1024, width), *block * 12, (width,), (width,)]


def llama3_8b() -> list[Shape]:
    width, keys, hidden, vocabulary = 4096, 1024, 14336, 128256
    block: list[Shape] = [
        *[(width, width), (keys, width), (keys, width), (width, width)],
        *[(hidden, width), (hidden, width), (width, hidden)],
        *[(width,), (width,)],
    ]
    return [(vocabulary, width), *block * 32, (width,), (vocabulary, width)]


# 4.5 million elements; some sizes are not divisible by any vector length.
MIXED_CYCLE: list[Shape] = [
    *[(1024, 1024), (1000, 1000), (768, 1024), (512, 1024), (700, 700)],
    *[(512, 512), (300, 700), (256, 512), (64, 371), (371, 64)],
]


# They alternate within a cycle, and for the same matrix from cycle to cycle.
MIXED_DTYPES = [
    ("bfloat16", "float32")[(place + cycle) % 2]
    for cycle in range(50)
    for place in range(len(MIXED_CYCLE))
]


def mixed(divisor: int) -> list[Shape]:
    """500 matrices with their sides divided."""
    return [(rows // divisor, columns // divisor) for rows, columns in MIXED_CYCLE] * 50


# From the fewest to the most elements.
WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in [
        Workload("one_scalar", "One 0-dim tensor: the fixed cost of a call", [()]),
        Workload("many_small_10", "10 tensors of 8 elements", [(8,)] * 10),
        Workload("many_small_100", "100 tensors of 8 elements", [(8,)] * 100),
        Workload("many_small", "1000 tensors of 8 elements", [(8,)] * 1000),
        Workload("small", "10 linear layers, 64 to 64", [(64, 64), (64,)] * 10),
        Workload("lstm", "One LSTM layer, 28 inputs, hidden 256, and 10 classes", lstm()),
        Workload("mlp", "Linear layers 784, 512, 512, 10", mlp()),
        Workload("1000x1000", "1000 tensors of 1000 elements", [(1000,)] * 1000),
        Workload(
            "mobilenet_v3",
            "Howard et al., Searching for MobileNetV3 (2019), large",
            mobilenet_v3(),
        ),
        Workload(
            "mixed_500_small",
            "mixed_500 with sides four times shorter",
            mixed(4),
            "mixed",
            ("cpu",),
            MIXED_DTYPES,
        ),
        Workload(
            "resnet50",
            "He et al., Deep Residual Learning for Image Recognition (2015), ResNet-50",
            resnet50(),
        ),
        Workload("one_huge", "One matrix of 64 Mi elements", [(8192, 8192)]),
        Workload("vit_b", "Dosovitskiy et al., An Image is Worth 16x16 Words (2020)", vit_b()),
        Workload(
            "gpt2",
            "Radford et al., Language Models are Unsupervised Multitask Learners (2019), 124M",
            gpt2(),
        ),
        Workload(
            "mixed_500",
            "500 matrices, bfloat16 and float32",
            mixed(1),
            "mixed",
            ("cuda",),
            MIXED_DTYPES,
        ),
        Workload(
            "one_1536m",
            "One tensor of 1.536 G elements, as measured in NeMo Automodel's pull request 3685",
            [(1_536_000_000,)],
            "bfloat16",
            ("cuda",),
        ),
        Workload(
            "llama3_8b",
            "Grattafiori et al., The Llama 3 Herd of Models (2024), 8B",
            llama3_8b(),
            "bfloat16",
            ("cuda",),
        ),
    ]
}


class Gradients:
    """Parameters whose gradients can be restored, and their norm in float64."""

    def __init__(self, workload: Workload, dtype: str, device: torch.device) -> None:
        """Takes "mixed" as the dtype of a workload that sets one per tensor."""
        shapes = workload.shapes
        dtypes = [DTYPES[name] for name in workload.dtypes or [dtype] * len(shapes)]
        sizes = [math.prod(s) * d.itemsize for s, d in zip(shapes, dtypes, strict=True)]
        self.bytes = sum(sizes)
        self.elements = workload.elements

        generator = torch.Generator(device).manual_seed(0)
        self.originals: list[torch.Tensor] = []
        self.parameters: list[torch.nn.Parameter] = []
        squares = []
        for shape, d in zip(shapes, dtypes, strict=True):
            original = torch.randn(shape, generator=generator, device=device).mul_(SIGMA).to(d)
            squares.append(original.double().square().sum())
            # Parameter values are never read, so all elements share the memory of one.
            parameter = torch.nn.Parameter(torch.zeros((), dtype=d, device=device).expand(shape))
            parameter.grad = original.clone()
            self.originals.append(original)
            self.parameters.append(parameter)
        self.gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.norm = math.sqrt(math.fsum(square.item() for square in squares))

        # As many bytes in one contiguous buffer, for the roofline. Two float32 of 0.01 read as one
        # float64 are 5e-19: neither is infinite, NaN or a denormal, which may take longer.
        self.flat = torch.full((2 * math.ceil(self.bytes / 8),), SIGMA, device=device)
        self.flat_as_float64 = self.flat.view(torch.float64)
        # Restored as the gradients are, tensor by tensor, since what restores a buffer decides what
        # of it is in cache. On CUDA caches are emptied before each call, so a fill will do.
        self.flat_pieces: list[torch.Tensor] = []
        if device.type == "cpu":
            ends = [end // 4 for end in itertools.accumulate(sizes)]
            self.flat_pieces = list(self.flat.tensor_split(ends[:-1]))
            self.flat_originals = list(self.flat.clone().tensor_split(ends[:-1]))

    def restore(self) -> None:
        torch._foreach_copy_(self.gradients, self.originals)

    def restore_flat(self) -> None:
        if self.flat_pieces:
            torch._foreach_copy_(self.flat_pieces, self.flat_originals)
        else:
            self.refill_flat()

    def refill_flat(self) -> None:
        self.flat.fill_(SIGMA)


class Model:
    """Parameters with values, in float32, whose gradients can be restored."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: tuple[int, ...], sigma: float) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(sigma)

        shapes = workload.shapes
        self.parameters = [torch.nn.Parameter(normal(shape, PARAMETER_SIGMA)) for shape in shapes]
        self.originals = [normal(shape, SIGMA) for shape in shapes]
        self.gradients = [torch.empty_like(original) for original in self.originals]
        self._finish()

    def in_float64(self) -> Model:
        """The same numbers in float64."""
        copy = Model.__new__(Model)
        copy.parameters = [torch.nn.Parameter(p.detach().double()) for p in self.parameters]
        # Already rounded to float32, so the values are the same and one copy will do.
        copy.originals = self.originals
        copy.gradients = [torch.empty_like(p) for p in copy.parameters]
        copy._finish()
        return copy

    def _finish(self) -> None:
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        squares = [original.double().square().sum().item() for original in self.originals]
        self.norms = [math.sqrt(square) for square in squares]
        self.norm = math.sqrt(math.fsum(squares))
        self.restore()

    def restore(self) -> None:
        torch._foreach_copy_(self.gradients, self.originals)
