"""Train a classifier of handwritten digits with mixed precision, clipped in four ways.

The 1797 digits of scikit-learn, which come with the package, are learned by a small convolutional
network in bfloat16 autocast with a GradScaler. The learning rate is so high that training needs
clipping. Four runs start from the same network and see the same batches:

    no clipping          scaler.step
    torch's recipe       scaler.unscale_, torch.nn.utils.clip_grad_norm_, scaler.step
    unscale and clip     gradclip_ext.unscale_and_clip_grad_norm_, scaler.step
    clip and step        gradclip_ext.clip_and_step

The last three take the same steps, so their curves lie on one another but for roundings to bfloat16
that a last bit has turned. The scale grows until steps overflow; each skips the same ones.

    pip install matplotlib scikit-learn tqdm
    python examples/amp_train.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional
from torch.optim import Optimizer
from tqdm import tqdm

from gradclip_ext import clip_and_step, unscale_and_clip_grad_norm_

BATCH_SIZE = 64
# Of the sum over a batch.
LEARNING_RATE = 0.2 / BATCH_SIZE
MAX_NORM = 0.05 * BATCH_SIZE
MOMENTUM = 0.9
HELD_OUT = 297
# Near the end of the range, and growing quickly, so that some steps overflow.
INITIAL_SCALE = 2.0**118
GROWTH_INTERVAL = 20
# Window of the moving average of the losses.
SMOOTHED_STEPS = 15
# From the Okabe-Ito palette, which is safe for the colour-blind; drawn from thick to thin, so that
# curves which lie on one another can all be seen.
STYLES = {
    "no clipping": {"color": "#D55E00", "linewidth": 1.5},
    "torch's recipe": {"color": "#56B4E9", "linewidth": 6.0},
    "unscale and clip": {"color": "#F0E442", "linewidth": 3.0},
    "clip and step": {"color": "#000000", "linewidth": 1.0},
}

# Clips, if at all, and steps.
Update = Callable[[GradScaler, Optimizer, list[nn.Parameter]], object]


def without_clipping(scaler: GradScaler, optimizer: Optimizer, _: list[nn.Parameter]) -> None:
    scaler.step(optimizer)


def recipe(scaler: GradScaler, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
    scaler.step(optimizer)


def unscale_and_clip(scaler: GradScaler, optimizer: Optimizer, _: list[nn.Parameter]) -> None:
    unscale_and_clip_grad_norm_(scaler, optimizer, MAX_NORM)
    scaler.step(optimizer)


def in_the_step(scaler: GradScaler, optimizer: Optimizer, _: list[nn.Parameter]) -> None:
    clip_and_step(optimizer, MAX_NORM, scaler=scaler)


WAYS: dict[str, Update] = {
    "no clipping": without_clipping,
    "torch's recipe": recipe,
    "unscale and clip": unscale_and_clip,
    "clip and step": in_the_step,
}


@dataclass
class Run:
    """What a training run gave."""

    name: str
    losses: list[float] = field(default_factory=list)
    update_seconds: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    accuracy: float = 0.0
    parameters: list[Tensor] = field(default_factory=list)


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """All images, shuffled: (1797, 1, 8, 8), of mean 0 and variance 1, and their classes."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1)
    images = (images - images.mean()) / images.std()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order], torch.from_numpy(data.target)[order]


def make_model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def train(name: str, steps: int, seed: int) -> Run:
    """Trains a new network in one of the ways."""
    images, classes = digits(seed)
    learned = len(images) - HELD_OUT
    model = make_model(seed)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, LEARNING_RATE, momentum=MOMENTUM, fused=True)
    scaler = GradScaler("cpu", init_scale=INITIAL_SCALE, growth_interval=GROWTH_INTERVAL)
    generator = torch.Generator().manual_seed(seed)
    run = Run(name)
    # disable=None: a bar on a terminal, nothing if the output is redirected.
    for step in tqdm(range(steps), desc=name.ljust(16), leave=False, disable=None):
        batch = torch.randint(learned, (BATCH_SIZE,), generator=generator)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(images[batch])
        loss = functional.cross_entropy(logits.float(), classes[batch], reduction="sum")
        scaler.scale(loss).backward()

        start, scale = time.perf_counter(), scaler.get_scale()
        WAYS[name](scaler, optimizer, parameters)
        run.update_seconds.append(time.perf_counter() - start)
        scaler.update()
        if scaler.get_scale() < scale:
            run.skipped.append(step)
        run.losses.append(loss.item() / BATCH_SIZE)
    with torch.no_grad():
        found = model(images[learned:]).argmax(1)
    run.accuracy = (found == classes[learned:]).double().mean().item()
    run.parameters = [parameter.detach() for parameter in parameters]
    return run


def largest_difference(one: Run, other: Run) -> float:
    """Between the parameters after two runs."""
    pairs = zip(one.parameters, other.parameters, strict=True)
    return max((mine - theirs).abs().max().item() for mine, theirs in pairs)


def summary(runs: Sequence[Run]) -> str:
    """The table of the runs; differences are those from torch's recipe."""
    (reference,) = (run for run in runs if run.name == "torch's recipe")
    titles = ("", "final loss", "accuracy", "skipped", "update us", "parameters off by")
    rows = [titles]
    for run in runs:
        recent = run.losses[-SMOOTHED_STEPS:]
        rows.append(
            (
                run.name,
                f"{statistics.fmean(recent):.4f}",
                f"{run.accuracy:.1%}",
                f"{len(run.skipped)} of {len(run.losses)}",
                f"{statistics.median(run.update_seconds) * 1e6:.0f}",
                f"{largest_difference(run, reference):.1e}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def save_figure(runs: Sequence[Run], path: Path) -> None:
    """Plots the smoothed loss of each run."""
    # Not pyplot, which may try to open a window.
    figure = Figure(figsize=(9, 5), layout="constrained")
    panel = figure.subplots()
    for run in runs:
        smoothed = [
            statistics.fmean(run.losses[max(0, end - SMOOTHED_STEPS) : end])
            for end in range(1, len(run.losses) + 1)
        ]
        label = f"{run.name}, accuracy {run.accuracy:.1%}"
        panel.plot(range(1, len(smoothed) + 1), smoothed, label=label, **STYLES[run.name])
    panel.set_yscale("log")
    panel.set_xlabel("training step")
    panel.set_title(
        f"Cross-entropy of a batch, mean of {SMOOTHED_STEPS} (log scale)", loc="left", fontsize=11
    )
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="per run (default: 300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path("build/amp_train.png"), help="where the figure goes"
    )
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps has to be at least 1")
    runs = [train(name, options.steps, options.seed) for name in WAYS]
    print(summary(runs))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_figure(runs, options.output)
    print(f"\nFigure: {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
