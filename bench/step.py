"""Measures the share of a training step that clipping takes, with torch's function and with ours.

    python bench/step.py
    python bench/step.py --updates resnet50 gpt2     # the update alone; --device cuda on a GPU

Three models are trained on the text of the demo: its character RNN with plain SGD, a two-layer LSTM
and a small transformer, both with Adam. The two functions take turns in the steps of one training,
so that both clip the same kind of gradients under the same load. The gain depends on the share: a
model that computes for long between two calls gains little.

With --updates nothing is trained: gradients of a model's shapes are unscaled, clipped and stepped
by the fused AdamW, in the ways that updates.py lists, with and without a scaler.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import updates
from clocks import quantiles
from implementations import OURS, REFERENCE
from report import Table, default_path, environment, save
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import gradclip_ext

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from char_rnn_model import (
    BATCH_SIZE,
    LEARNING_RATE,
    SEQUENCE_LENGTH,
    VOCABULARY,
    CharacterRNN,
    encode,
    read_text,
    sequential_batches,
)

CLIP_FUNCTIONS: dict[str, Callable[[list[nn.Parameter], float], Tensor]] = {
    REFERENCE: torch.nn.utils.clip_grad_norm_,
    OURS: gradclip_ext.clip_grad_norm_,
}
CHARACTERS = 3000
WARM_UP_STEPS = 5


class StatelessRNN(nn.Module):
    """The demo's network, starting every batch from a state of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.network = CharacterRNN(512, torch.Generator().manual_seed(0))

    def forward(self, characters: Tensor) -> Tensor:
        """From (batch, sequence) to logits of shape (batch, sequence, vocabulary)."""
        state = self.network.initial_state(len(characters))
        return self.network(characters, state)[0].transpose(0, 1)


class LSTM(nn.Module):
    """Two layers of 256 units."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(VOCABULARY), 64)
        self.layers = nn.LSTM(64, 256, num_layers=2, batch_first=True)
        self.output = nn.Linear(256, len(VOCABULARY))

    def forward(self, characters: Tensor) -> Tensor:
        return self.output(self.layers(self.embedding(characters))[0])


class Transformer(nn.Module):
    """Four causal layers of width 128."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(VOCABULARY), 128)
        self.position = nn.Parameter(torch.zeros(SEQUENCE_LENGTH, 128))
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4)
        self.output = nn.Linear(128, len(VOCABULARY))
        mask = nn.Transformer.generate_square_subsequent_mask(SEQUENCE_LENGTH)
        self.register_buffer("mask", mask)

    def forward(self, characters: Tensor) -> Tensor:
        embedded = self.embedding(characters) + self.position
        return self.output(self.layers(embedded, mask=self.mask, is_causal=True))


@dataclass(frozen=True)
class Training:
    """A model, its optimizer, and the norm to clip to."""

    model: Callable[[], nn.Module]
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    max_norm: float


TRAININGS = {
    "char-RNN": Training(
        StatelessRNN, lambda parameters: torch.optim.SGD(parameters, LEARNING_RATE), 1.0
    ),
    "2-layer LSTM": Training(LSTM, lambda parameters: torch.optim.Adam(parameters, 2e-3), 0.25),
    "transformer": Training(
        Transformer, lambda parameters: torch.optim.Adam(parameters, 1e-3), 0.25
    ),
}


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Yields inputs and targets of shape (batch, sequence), endlessly."""
    generator = torch.Generator().manual_seed(0)
    for inputs, targets, _ in sequential_batches(encode(read_text(CHARACTERS)), generator):
        yield inputs.contiguous(), targets.contiguous()


def row_of(name: str, steps: int) -> dict[str, Any]:
    """Trains for this many steps with each function."""
    training = TRAININGS[name]
    torch.manual_seed(0)
    model = training.model()
    parameters = list(model.parameters())
    optimizer = training.optimizer(parameters)
    data = batches()
    step_seconds: dict[str, list[float]] = {function: [] for function in CLIP_FUNCTIONS}
    clip_seconds: dict[str, list[float]] = {function: [] for function in CLIP_FUNCTIONS}
    clipped = dict.fromkeys(CLIP_FUNCTIONS, 0)
    losses = []

    total = WARM_UP_STEPS + steps
    for step in tqdm(range(total), desc=name, leave=False, disable=None):
        # They also take turns in going first.
        order = list(CLIP_FUNCTIONS)[:: -1 if step % 2 else 1]
        for function in order:
            inputs, targets = next(data)
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            loss.backward()
            before_clip = time.perf_counter()
            norm = CLIP_FUNCTIONS[function](parameters, training.max_norm)
            after_clip = time.perf_counter()
            optimizer.step()
            end = time.perf_counter()
            losses.append(loss.item())
            if step >= WARM_UP_STEPS:
                step_seconds[function].append(end - start)
                clip_seconds[function].append(after_clip - before_clip)
                clipped[function] += int(norm.item() > training.max_norm)

    row: dict[str, Any] = {
        "model": name,
        "tensors": len(parameters),
        "elements": sum(parameter.numel() for parameter in parameters),
        "batch": [BATCH_SIZE, SEQUENCE_LENGTH],
        "max_norm": training.max_norm,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "implementations": {},
    }
    for function in CLIP_FUNCTIONS:
        step_median = statistics.median(step_seconds[function])
        row["implementations"][function] = {
            "step": quantiles(step_seconds[function]),
            "clip": quantiles(clip_seconds[function]),
            "share": statistics.median(clip_seconds[function]) / step_median,
            "clipped_share": clipped[function] / steps,
        }
    clip = {function: row["implementations"][function]["clip"] for function in CLIP_FUNCTIONS}
    row["clip_ratio"] = clip[REFERENCE]["median_us"] / clip[OURS]["median_us"]
    # Computed from one median of everything but clipping, which is the same for both: the noise of
    # whole steps exceeds the time of clipping.
    rest = statistics.median(
        whole - part
        for function in CLIP_FUNCTIONS
        for whole, part in zip(step_seconds[function], clip_seconds[function], strict=True)
    )
    row["rest_of_step_us"] = rest * 1e6
    row["step_ratio"] = (row["rest_of_step_us"] + clip[REFERENCE]["median_us"]) / (
        row["rest_of_step_us"] + clip[OURS]["median_us"]
    )
    return row


COLUMNS = {
    "model": -12,
    "tensors": 7,
    "elements": 9,
    "step ms": 8,
    "torch clip us": 13,
    "share": 6,
    "ours clip us": 12,
    "share ": 6,
    "clip torch/ours": 15,
    "step torch/ours": 15,
    "clipped": 7,
}


def line_of(table: Table, row: dict[str, Any]) -> str:
    reference, ours = row["implementations"][REFERENCE], row["implementations"][OURS]
    return table.line(
        [
            row["model"],
            str(row["tensors"]),
            str(row["elements"]),
            f"{ours['step']['median_us'] / 1e3:.2f}",
            f"{reference['clip']['median_us']:.1f}",
            f"{reference['share']:.2%}",
            f"{ours['clip']['median_us']:.1f}",
            f"{ours['share']:.2%}",
            f"{row['clip_ratio']:.2f}",
            f"{row['step_ratio']:.3f}",
            f"{ours['clipped_share']:.0%}",
        ]
    )


def time_updates(options: argparse.Namespace) -> int:
    device = options.device or torch.device("cpu")
    facts = environment(device)
    path = options.output or default_path(facts, "step", "updates")
    table = Table(updates.COLUMNS)
    tqdm.write(table.head())
    rows, ratios = [], {}
    for name in options.updates:
        found = updates.rows_of(name, device, options.seconds)
        for line in updates.lines_of(table, found):
            tqdm.write(line)
        ratios[name] = updates.ratios_of(found)
        for what, ratio in ratios[name].items():
            tqdm.write(f"{name}: {what}: {ratio:.2f}")
        rows += found
    save({**facts, "seconds": options.seconds, "rows": rows, "ratios": ratios}, path)
    tqdm.write(f"\nData: {path}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument(
        "--updates",
        nargs="+",
        choices=updates.SHAPES,
        help="time the update alone, of these shapes",
    )
    parser.add_argument("--device", type=torch.device, help="of --updates (default: cpu)")
    parser.add_argument("--seconds", type=float, default=45.0, help="per shape of --updates")
    parser.add_argument("--steps", type=int, default=200, help="per function")
    parser.add_argument("--quick", action="store_const", const=5, dest="steps", help="5 steps")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument(
        "--output", type=Path, help="JSON file (default: named after the run, in bench/results)"
    )
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps has to be at least 2")
    torch.set_num_threads(options.threads)
    if options.updates:
        return time_updates(options)
    facts = environment(torch.device("cpu"))
    path = options.output or default_path(facts, "step")
    table = Table(COLUMNS)
    tqdm.write(table.head())
    rows = []
    for name in options.models:
        rows.append(row_of(name, options.steps))
        tqdm.write(line_of(table, rows[-1]))
    save({**facts, "steps": options.steps, "rows": rows}, path)
    tqdm.write(f"\nData: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
