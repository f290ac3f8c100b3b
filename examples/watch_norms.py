"""Watch the gradient norm of every layer while a deep network is trained.

A plain network of 12 layers, without normalization or skip connections, learns a function of two
terms. Now and then a batch is broken: its inputs are ten times too large, which so deep a network
amplifies to gradients hundreds of times larger than usual. It is trained twice, with the same
initialization and the same batches: without clipping, and with AutoClip, which chooses the
threshold by itself. A GradClipper measures in both runs.

    pip install matplotlib tqdm
    python examples/watch_norms.py

A report is available as a flat dict, as loggers expect. For TensorBoard, then for W&B:

    for name, value in clipper.report().as_dict().items():
        writer.add_scalar(name, value, step)

    wandb.log(clipper.report().as_dict(), step=step)
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from gradclip_ext import AutoClip, ClipReport, GradClipper

INPUTS = 8
HIDDEN = 64
LAYERS = 12
BATCH_SIZE = 64
LEARNING_RATE = 0.03
# Learning rate warm-up, without which the very first step may make training diverge.
WARM_UP_STEPS = 50
MOMENTUM = 0.9
BROKEN_SHARE = 0.02
BROKEN_SCALE = 10.0
HELD_OUT = 1000
# AutoClip's paper uses 10, which clips most steps and learns as well. With the median fewer steps
# are clipped, so that the figure shows which.
PERCENTILE = 50.0

# Window of the moving share of clipped steps.
SMOOTHED_STEPS = 25
# From the Okabe-Ito palette, which is safe for the colour-blind.
VERMILION, SKY_BLUE, BLACK = "#D55E00", "#56B4E9", "#000000"


@dataclass
class Run:
    """The measurements of a training run."""

    name: str
    reports: list[ClipReport] = field(default_factory=list)
    broken_steps: list[int] = field(default_factory=list)
    first_loss: float = math.nan
    final_loss: float = math.nan

    @property
    def total_norms(self) -> list[float]:
        """The total norm before clipping, for each step."""
        return [report.total_norm for report in self.reports]

    @property
    def clipped(self) -> list[bool]:
        """Whether each step was clipped; reports hold cumulative counts."""
        counts = [0, *(report.clipped_steps for report in self.reports)]
        return [now > before for before, now in itertools.pairwise(counts)]

    @property
    def first_nonfinite_step(self) -> int | None:
        """The first step with a non-finite gradient norm, counting from 1."""
        for report in self.reports:
            if report.nonfinite_steps:
                return report.steps
        return None


def target(inputs: Tensor) -> Tensor:
    """The function to learn: from (batch, inputs) to (batch, 1), with variance 1.5."""
    return torch.sin(2 * inputs[:, :1]) + inputs[:, 1:2] * inputs[:, 2:3]


def make_model(generator: torch.Generator) -> nn.Sequential:
    """A plain deep network with He initialization, its layers named from layer01 on."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number in range(1, LAYERS + 1):
        layer = nn.Linear(INPUTS if number == 1 else HIDDEN, 1 if number == LAYERS else HIDDEN)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)
        layers[f"layer{number:02}"] = layer
        if number < LAYERS:
            layers[f"relu{number:02}"] = nn.ReLU()
    return nn.Sequential(layers)


@torch.no_grad()
def held_out_loss(model: nn.Module, seed: int) -> float:
    """The mean squared error on held-out inputs, none of them broken."""
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = torch.randn(HELD_OUT, INPUTS, generator=generator)
    return functional.mse_loss(model(inputs), target(inputs)).item()


def train(name: str, rule: AutoClip | float, options: argparse.Namespace) -> Run:
    """Trains a new network; with ``math.inf`` as the rule, the clipper only measures."""
    # Initialization and batches depend on the seed alone, so they are the same in every run.
    generator = torch.Generator().manual_seed(options.seed)
    model = make_model(generator)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=MOMENTUM)
    warm_up = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS)
    )
    clipper = GradClipper(model, rule)
    run = Run(name, first_loss=held_out_loss(model, options.seed))

    # disable=None: a bar on a terminal, nothing if the output is redirected.
    for step in tqdm(range(options.steps), desc=name.ljust(11), leave=False, disable=None):
        inputs = torch.randn(BATCH_SIZE, INPUTS, generator=generator)
        wanted = target(inputs)
        if torch.rand((), generator=generator) < BROKEN_SHARE:
            run.broken_steps.append(step + 1)
            inputs *= BROKEN_SCALE
        optimizer.zero_grad()
        functional.mse_loss(model(inputs), wanted).backward()
        clipper.clip_()
        optimizer.step()
        warm_up.step()
        # On a GPU, ask only as often as you log: a report is a device sync.
        run.reports.append(clipper.report())

    run.final_loss = held_out_loss(model, options.seed)
    return run


def summary(runs: Sequence[Run]) -> str:
    """The table of the runs."""
    rows = [("", "initial loss", "final loss", "largest norm", "clipped", "not finite")]
    for run in runs:
        last = run.reports[-1]
        finite = [norm for norm in run.total_norms if math.isfinite(norm)]
        rows.append(
            (
                run.name,
                f"{run.first_loss:.3g}",
                f"{run.final_loss:.3g}",
                f"{max(finite, default=math.nan):.3g}",
                f"{last.clipped_steps / last.steps:.1%}",
                f"{last.nonfinite_steps} of {last.steps}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def save_figure(unclipped: Run, clipped: Run, path: Path) -> None:
    """Plots the norm per parameter, the total norm, the threshold and the clipped share."""
    # Not pyplot, which may try to open a window.
    figure = Figure(figsize=(11, 9.5), layout="constrained")
    heat, total, share = figure.subplots(3, 1, sharex=True, height_ratios=(5, 3, 1.6))
    _draw_layers(figure, heat, clipped)
    _draw_total(total, unclipped, clipped)
    _draw_share(share, clipped)
    share.set_xlabel("training step")
    share.set_xlim(0.5, len(clipped.reports) + 0.5)
    figure.align_ylabels([total, share])
    figure.suptitle(_title(unclipped))
    figure.savefig(path, dpi=150)


def _title(unclipped: Run) -> str:
    step = unclipped.first_nonfinite_step
    without = "stays finite" if step is None else f"turns non-finite at step {step}"
    return f"Gradient norms of a deep plain network; without clipping, training {without}"


def _draw_layers(figure: Figure, panel: Axes, run: Run) -> None:
    """One row per parameter: the weights, the first layer on top, then the biases."""
    names = run.reports[-1].names
    # In model order weights and biases alternate, which shows as stripes.
    order = sorted(range(len(names)), key=lambda index: names[index].endswith("bias"))
    norms = torch.tensor([report.norms for report in run.reports], dtype=torch.float64).T[order]
    # The others, which a logarithmic scale cannot show, stay grey.
    shown = norms[norms.isfinite() & (norms > 0)]
    # The few smallest would use up half of the scale.
    low, high = shown.quantile(0.03).item(), shown.max().item()
    rows, steps = norms.shape
    image = panel.imshow(
        norms.numpy(),
        norm=LogNorm(low, max(high, 1.1 * low)),
        cmap="magma",
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, steps + 0.5, rows - 0.5, -0.5),
    )
    panel.set_facecolor("0.8")
    panel.axhline(sum(not name.endswith("bias") for name in names) - 0.5, color="white")
    panel.set_yticks(range(rows), [names[index] for index in order], fontsize=8)
    panel.tick_params(axis="y", length=0)
    panel.set_title(
        "Norm of each gradient with AutoClip, before clipping (log scale)", loc="left", fontsize=11
    )
    # In line with the legends of the other panels.
    figure.colorbar(image, cax=panel.inset_axes((1.02, 0.0, 0.025, 1.0)), extend="min")


def _draw_total(panel: Axes, unclipped: Run, clipped: Run) -> None:
    steps = range(1, len(clipped.reports) + 1)
    panel.plot(steps, clipped.total_norms, color=SKY_BLUE, linewidth=1.0, label="with AutoClip")
    panel.plot(
        range(1, len(unclipped.reports) + 1),
        unclipped.total_norms,
        color=VERMILION,
        linewidth=1.2,
        label="without clipping",
    )
    limits = [report.limits[0] for report in clipped.reports]
    panel.plot(steps, limits, color=BLACK, linewidth=1.4, label="threshold")
    panel.set_yscale("log")
    finite = [norm for norm in clipped.total_norms if math.isfinite(norm) and norm > 0]
    # Exploding and vanishing norms leave the panel, to keep the rest readable.
    panel.set_ylim(min(finite) / 10, max(finite) * 10)
    for index, step in enumerate(clipped.broken_steps):
        panel.axvline(
            step,
            ymax=0.04,
            color="0.4",
            linewidth=2,
            label=None if index else "broken batch",
        )
    panel.set_title("Total norm, before clipping (log scale)", loc="left", fontsize=11)
    # Next to the panel, since curves may be anywhere in it.
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    _finish_panel(panel)


def _draw_share(panel: Axes, run: Run) -> None:
    clipped = run.clipped
    steps = range(1, len(clipped) + 1)
    recent = []
    for end in steps:
        window = clipped[max(0, end - SMOOTHED_STEPS) : end]
        recent.append(100 * sum(window) / len(window))
    so_far = [100 * report.clipped_steps / report.steps for report in run.reports]
    panel.plot(steps, recent, color=SKY_BLUE, linewidth=1.2, label=f"last {SMOOTHED_STEPS} steps")
    panel.plot(steps, so_far, color=BLACK, linewidth=1.4, label="all steps so far")
    panel.set_ylim(0, 100)
    panel.set_title("Clipped steps, in percent", loc="left", fontsize=11)
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    _finish_panel(panel)


def _finish_panel(panel: Axes) -> None:
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Trains a deep network with and without clipping, and draws the gradient norm "
        "of every layer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=500, help="training steps per run")
    parser.add_argument("--seed", type=int, default=1, help="for initialization and batches")
    parser.add_argument(
        "--output", type=Path, default=Path("build/watch_norms/watch_norms.png"), help="the figure"
    )
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps has to be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains twice, prints the table and saves the figure."""
    options = parse_arguments(arguments)
    # A network this small is faster with one thread.
    torch.set_num_threads(1)
    unclipped = train("no clipping", math.inf, options)
    clipped = train("AutoClip", AutoClip(PERCENTILE), options)
    print(summary([unclipped, clipped]))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_figure(unclipped, clipped, options.output)
    print(f"\nFigure: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
