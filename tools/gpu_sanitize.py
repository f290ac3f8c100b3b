"""Runs every kernel on small lists and checks all values: for compute-sanitizer, see gpu_check.sh.

    python tools/gpu_sanitize.py [--device cuda]

Prints a line for each wrong result, and then exits with 1. Memory is filled on the host and copied,
so that initcheck knows it to be initialized whatever kernels it watches. There is a NaN before and
after each gradient: a kernel that reads it finds no norm, and one that writes it is found out.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gradclip_ext

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CLIP_FACTOR, EPS, WEIGHT_DECAY, CLIP_VALUE = 0.5, 1e-3, 0.25, 0.75
# Relative accuracy before a result is rounded. In float32, sums are taken in short chains.
EXACTLY, IN_FLOAT64, IN_FLOAT32 = 0.0, 1e-13, 1e-6
# Long units are left to torch, whose sums in float32 may be off by more.
BY_TORCH = 1e-5


class Case(NamedTuple):
    """A list of gradients; their dtypes take turns."""

    sizes: Sequence[int]
    dtypes: Sequence[torch.dtype] = DTYPES
    layout: str = "alone"
    scale: float = 1.0


ONE_BLOCK, TWO_LAUNCHES = (5, 33, 1000, 0, 77, 1), (100_000, 3, 40_000, 70_001, 9)
CASES = {
    **{f"one block, {dtype}": Case(ONE_BLOCK, [dtype]) for dtype in DTYPES},
    **{f"two launches, {dtype}": Case(TWO_LAUNCHES, [dtype]) for dtype in DTYPES},
    "one block, all dtypes": Case(ONE_BLOCK),
    "two launches, all dtypes": Case(TWO_LAUNCHES),
    # More partial sums than a block has threads.
    "hundreds of blocks": Case([1_500_001, 1_500_003], DTYPES[:2]),
    # Their squares overflow in float32: the sums are taken again in float64.
    "huge values": Case(TWO_LAUNCHES, DTYPES[:2], scale=1e25),
    # A table of each size, and more tensors than the largest holds.
    **{f"{n} tensors": Case([37, 61] * (n // 2), layout="packed") for n in (20, 100, 300, 1700)},
    "rows": Case([5 * 1000, 5 * 7, 5 * 20_000, 5 * 31], layout="rows"),
    "transposed": Case([5 * 1000, 5 * 7, 5 * 20_000, 5 * 31], layout="transposed"),
    # Left to torch's operations: all, or every other one.
    "gaps": Case([1000, 20_001, 33, 5], layout="gaps"),
    "some gaps": Case([1000, 20_001, 33, 5, 17, 64], DTYPES[:3], layout="some gaps"),
}


class Place(NamedTuple):
    """Where in the storages a tensor lies."""

    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Memory:
    """Storages on the host that hold the tensors of a case, and NaN between them."""

    def __init__(self, case: Case, seed: int) -> None:
        self.storages: list[Tensor] = []
        self.places: list[Place] = []
        numels: list[int] = []
        dtypes: list[torch.dtype] = []
        for i, size in enumerate(case.sizes):
            dtype = case.dtypes[i % len(case.dtypes)]
            if case.layout != "packed" or dtype not in dtypes:
                dtypes.append(dtype)
                numels.append(1)
            storage = len(dtypes) - 1 if case.layout != "packed" else dtypes.index(dtype)
            shape, stride = layout_of(size, case.layout, i)
            self.places.append(Place(storage, shape, stride, numels[storage]))
            numels[storage] += size * max(1, min(stride, default=1)) + 1
        generator = torch.Generator().manual_seed(seed)
        for numel, dtype in zip(numels, dtypes, strict=True):
            self.storages.append(torch.full((numel,), math.nan, dtype=dtype))
        for view in self.views(self.storages):
            view.copy_(torch.randn(view.shape, generator=generator).mul_(case.scale))
        # What they hold, in float64.
        self.values = [view.double() for view in self.views(self.storages)]

    def views(self, storages: Sequence[Tensor]) -> list[Tensor]:
        """The tensors, in the storages given, which are copies of those on the host."""
        return [
            storages[place.storage].as_strided(place.shape, place.stride, place.offset)
            for place in self.places
        ]


def layout_of(size: int, layout: str, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and stride."""
    if layout == "rows":
        return (size // 5, 5), (5, 1)
    if layout == "transposed":
        return (5, size // 5), (1, 5)
    if layout == "gaps" or (layout == "some gaps" and index % 2 == 1):
        return (size,), (2,)
    return ((size,), (1,)) if size != 1 else ((), ())


class Run:
    """One operation on a case: its parameters, and what is wrong with the results."""

    def __init__(self, memory: Memory, weights: Memory, device: torch.device) -> None:
        self.device, self.memory = device, memory
        self.storages = [storage.to(device, copy=True) for storage in self.memory.storages]
        self.gradients = self.memory.views(self.storages)
        weights_on_device = [storage.to(device, copy=True) for storage in weights.storages]
        self.parameters = list(map(torch.nn.Parameter, weights.views(weights_on_device)))
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        # In float64, on the host.
        self.before, self.weights = memory.values, weights.values
        self.problems: list[str] = []

    def expect_norms(self, found: Tensor, expected: Sequence[float], accuracy: float) -> None:
        """Norms that were measured with this relative accuracy, then rounded to their dtype."""
        wanted = torch.tensor(expected, dtype=torch.float64)
        error = (found.cpu().double().reshape(-1) - wanted).abs()
        if not bool((error <= (torch.finfo(found.dtype).eps + accuracy) * wanted).all()):
            worst = int((error / wanted).nan_to_num(nan=math.inf).argmax())
            self.problems.append(
                f"norm {worst}: expected {expected[worst]}, found {found.reshape(-1)[worst].item()}"
            )

    def expect_gradients(self, expected: Sequence[Tensor], accuracy: float) -> None:
        """Gradients scaled with this relative accuracy, then rounded, or exact if that is 0.

        Also that nothing between them was written.
        """
        after = [storage.cpu() for storage in self.storages]
        for i, (found, wanted) in enumerate(zip(self.memory.views(after), expected, strict=True)):
            if found.numel() == 0:
                continue
            relative = accuracy and 2 * torch.finfo(found.dtype).eps + accuracy
            error = (found.double() - wanted).abs().nan_to_num(nan=math.inf)
            if error.max().item() > relative * wanted.abs().max().item():
                worst = int(error.argmax())
                self.problems.append(
                    f"gradient {i} of {found.dtype}, element {worst}: expected "
                    f"{wanted.reshape(-1)[worst].item()}, found {found.reshape(-1)[worst].item()}"
                )
        for i, (stored, now) in enumerate(zip(self.memory.storages, after, strict=True)):
            if not torch.equal(stored.isnan(), now.isnan()):
                self.problems.append(f"storage {i} has changed between the gradients")


def norm_of(tensors: Sequence[Tensor], norm_type: float) -> float:
    """The norm of float64 tensors on the host, of all together."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if norm_type == math.inf:
        return flat.abs().max().item() if flat.numel() else 0.0
    return flat.abs().sum().item() if norm_type == 1.0 else math.sqrt(flat.square().sum().item())


def scaled(tensors: Sequence[Tensor], max_norm: float, norm: float) -> list[Tensor]:
    coefficient = min(1.0, max_norm / (norm + 1e-6))
    return [tensor * coefficient for tensor in tensors]


def clip(norm_type: float, dtype: torch.dtype | None, run: Run) -> None:
    norm = norm_of(run.before, norm_type)
    found = gradclip_ext.clip_grad_norm_(run.parameters, norm / 2, norm_type, dtype=dtype)
    accuracy = IN_FLOAT64 if dtype == torch.float64 else IN_FLOAT32
    run.expect_norms(found, [norm], accuracy)
    run.expect_gradients(scaled(run.before, norm / 2, norm), accuracy)


def clip_quietly(run: Run) -> None:
    norm = norm_of(run.before, 2.0)
    run.expect_norms(gradclip_ext.clip_grad_norm_(run.parameters, 2 * norm), [norm], IN_FLOAT32)
    run.expect_gradients(run.before, EXACTLY)


def clip_and_look(run: Run) -> None:
    """The host waits for the norm."""
    norm = norm_of(run.before, 1.0)
    found = gradclip_ext.clip_grad_norm_(
        run.parameters, norm / 2, 1.0, error_if_nonfinite=True, dtype=torch.float32
    )
    run.expect_norms(found, [norm], IN_FLOAT32)
    run.expect_gradients(scaled(run.before, norm / 2, norm), IN_FLOAT32)


def clip_one_twice(run: Run) -> None:
    norm = norm_of([run.before[0], *run.before], 2.0)
    found = gradclip_ext.clip_grad_norm_([run.parameters[0], *run.parameters], norm / 2)
    run.expect_norms(found, [norm], IN_FLOAT32)
    once = scaled(run.before, norm / 2, norm)
    run.expect_gradients([*scaled(once[:1], norm / 2, norm), *once[1:]], IN_FLOAT32)


def clip_by_tensors(run: Run) -> None:
    norm = norm_of(run.before, 2.0)
    total_norm = torch.tensor(norm, dtype=torch.float64).to(run.device)
    max_norm = torch.tensor(norm / 2, dtype=torch.float32)
    gradclip_ext.clip_grads_with_norm_(run.parameters, max_norm.to(run.device), total_norm)
    run.expect_gradients(scaled(run.before, max_norm.item(), norm), IN_FLOAT32)


def clip_value(run: Run) -> None:
    gradclip_ext.clip_grad_value_(run.parameters, CLIP_VALUE)
    run.expect_gradients([b.clamp(-CLIP_VALUE, CLIP_VALUE) for b in run.before], EXACTLY)


def measure(norm_type: float, run: Run) -> None:
    found = gradclip_ext.get_total_norm(run.gradients, norm_type, dtype=torch.float32)
    run.expect_norms(found, [norm_of(run.before, norm_type)], IN_FLOAT32)
    run.expect_gradients(run.before, EXACTLY)


def measure_each(norm_type: float, run: Run) -> None:
    found = gradclip_ext.grad_norms(run.parameters, norm_type)
    run.expect_norms(found.total, [norm_of(run.before, norm_type)], IN_FLOAT32)
    run.expect_norms(found.norms, [norm_of([b], norm_type) for b in run.before], IN_FLOAT32)
    run.expect_gradients(run.before, EXACTLY)


class HalfOfEveryOther:
    """A rule that gives every other parameter half of its norm as limit."""

    per_parameter = True
    epsilon = 0.0

    def limits(self, total: Tensor, norms: Tensor) -> Tensor:
        factors = torch.full((len(norms),), math.inf, dtype=torch.float64)
        factors[::2] = 0.5
        limits = norms * factors.to(norms.device)
        return limits.nan_to_num(nan=math.inf, posinf=math.inf)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def scale_each(run: Run) -> None:
    clipper = gradclip_ext.GradClipper(run.parameters, HalfOfEveryOther())
    run.expect_norms(clipper.clip_(), [norm_of(run.before, 2.0)], IN_FLOAT32)
    expected = [b * 0.5 if i % 2 == 0 else b for i, b in enumerate(run.before)]
    run.expect_gradients(expected, IN_FLOAT32)


def decayed(run: Run) -> list[Tensor]:
    sums = [b + WEIGHT_DECAY * w for b, w in zip(run.before, run.weights, strict=True)]
    # They are rounded before they are measured.
    return [s.to(g.dtype).double() for s, g in zip(sums, run.gradients, strict=True)]


def add_weight_decay(run: Run) -> None:
    gradclip_ext.add_weight_decay_(run.parameters, WEIGHT_DECAY)
    run.expect_gradients(decayed(run), IN_FLOAT32)


def decay_and_clip(run: Run) -> None:
    norm = norm_of(decayed(run), 2.0)
    clipper = gradclip_ext.GradClipper(run.parameters, norm / 2, weight_decay=WEIGHT_DECAY)
    run.expect_norms(clipper.clip_(), [norm], IN_FLOAT32)
    run.expect_gradients(scaled(decayed(run), norm / 2, norm), IN_FLOAT32)


def clip_rows(run: Run) -> None:
    gradclip_ext.adaptive_clip_grad_(run.parameters, CLIP_FACTOR, EPS)
    expected = []
    for before, weight in zip(run.before, run.weights, strict=True):
        rows = before.reshape(len(before) if before.dim() > 1 else 1, -1)
        norms = rows.norm(dim=1, keepdim=True)
        limits = CLIP_FACTOR * weight.reshape(rows.shape).norm(dim=1, keepdim=True).clamp(min=EPS)
        coefficients = torch.where(norms > limits, limits / norms.clamp(min=1e-6), 1.0)
        expected.append((rows * coefficients).reshape(before.shape))
    run.expect_gradients(expected, BY_TORCH)


OPERATIONS: dict[str, Callable[[Run], None]] = {
    "clip, L2": functools.partial(clip, 2.0, None),
    **{
        f"clip, {name}, {dtype}": functools.partial(clip, norm_type, dtype)
        for name, norm_type in (("L1", 1.0), ("L2", 2.0), ("inf", math.inf))
        for dtype in (torch.float32, torch.float64)
    },
    "clip quietly": clip_quietly,
    "clip and look": clip_and_look,
    "clip one twice": clip_one_twice,
    "clip by tensors": clip_by_tensors,
    "clip values": clip_value,
    **{f"measure, {order}": functools.partial(measure, order) for order in (1.0, 2.0, math.inf)},
    **{
        f"measure each, {order}": functools.partial(measure_each, order)
        for order in (1.0, 2.0, math.inf)
    },
    "scale each": scale_each,
    "add weight decay": add_weight_decay,
    "decay and clip": decay_and_clip,
    "clip rows": clip_rows,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", type=torch.device)
    device = parser.parse_args(arguments).device
    wrong = 0
    for case_name, case in CASES.items():
        memory, weights = Memory(case, seed=0), Memory(case, seed=1)
        for name, operation in OPERATIONS.items():
            run = Run(memory, weights, device)
            operation(run)
            wrong += len(run.problems)
            for problem in run.problems[:3]:
                print(f"{case_name}: {name}: {problem}")
        # Shows how far a run came that is stopped.
        print(f"{case_name}: done", flush=True)
    print(f"{wrong} results are wrong" if wrong else "all values correct")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
