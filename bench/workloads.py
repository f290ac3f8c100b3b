"""Lists of gradients with the parameter shapes of real models, read from shapes/*.json."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

SHAPES_FOLDER = Path(__file__).resolve().parent / "shapes"

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Standard deviation of the gradients. Their squares fit into float16, although barely.
SIGMA = 0.01
# That of the parameters where their values matter, as of GPT-2's initial ones.
PARAMETER_SIGMA = 0.02


@dataclass(frozen=True)
class Workload:
    """The content of one file in shapes/."""

    name: str
    about: str
    dtype: str | None
    devices: tuple[str, ...]
    # Shape and, where the file says which, dtype.
    tensors: tuple[tuple[tuple[int, ...], str | None], ...]

    @property
    def elements(self) -> int:
        """The number of parameters of the model."""
        return sum(math.prod(shape) for shape, _ in self.tensors)


def read(path: Path) -> Workload:
    content = json.loads(path.read_text())
    tensors = tuple(
        (tuple(entry["shape"]), entry.get("dtype"))
        for entry in content["tensors"]
        for _ in range(entry["count"])
    )
    return Workload(
        path.stem, content["about"], content["dtype"], tuple(content["devices"]), tensors
    )


# From the fewest to the most elements.
WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in sorted(map(read, SHAPES_FOLDER.glob("*.json")), key=lambda w: w.elements)
}


class Gradients:
    """Parameters whose gradients can be restored, and the float64 truth about these."""

    def __init__(self, workload: Workload, dtype: str, device: torch.device) -> None:
        """Takes "mixed" as dtype for a workload that says the dtype of each tensor."""
        dtypes = [DTYPES[own or dtype] for _, own in workload.tensors]
        shapes = [shape for shape, _ in workload.tensors]
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
            # Nobody reads a parameter, so all its elements share the memory of one.
            parameter = torch.nn.Parameter(torch.zeros((), dtype=d, device=device).expand(shape))
            parameter.grad = original.clone()
            self.originals.append(original)
            self.parameters.append(parameter)
        self.gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.norm = math.sqrt(math.fsum(square.item() for square in squares))

        # The same number of bytes in one piece, for the limits. Two float32 of 0.01 are, read as
        # one float64, 5e-19: neither is an infinity, a NaN or a denormal that would cost time.
        self.flat = torch.full((2 * math.ceil(self.bytes / 8),), SIGMA, device=device)
        self.flat_as_float64 = self.flat.view(torch.float64)

    def restore(self) -> None:
        torch._foreach_copy_(self.gradients, self.originals)

    def restore_flat(self) -> None:
        self.flat.fill_(SIGMA)


class Model:
    """Parameters of some size in float32, and gradients that can be restored."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: tuple[int, ...], sigma: float) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(sigma)

        shapes = [shape for shape, _ in workload.tensors]
        self.parameters = [torch.nn.Parameter(normal(shape, PARAMETER_SIGMA)) for shape in shapes]
        self.originals = [normal(shape, SIGMA) for shape in shapes]
        self.gradients = [torch.empty_like(original) for original in self.originals]
        self._finish()

    def in_float64(self) -> Model:
        """The same numbers in float64."""
        copy = Model.__new__(Model)
        copy.parameters = [torch.nn.Parameter(p.detach().double()) for p in self.parameters]
        # Rounded already, and so the same; they need not be kept twice.
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
