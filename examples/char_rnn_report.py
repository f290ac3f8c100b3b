"""What `char_rnn.py` reports about its three runs: a table, a figure and a JSON file."""

from __future__ import annotations

import json
import math
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gradclip_ext

# Clipping itself is checked against torch in float64, on the gradients of every step of the run
# without clipping. The rounding error of float32 is about 1e-7.
SAME_GRADIENTS_TOLERANCE = 1e-6

# Whether two training runs agree is harder to say. From the first clipped step on they differ by
# rounding errors, which grow tenfold about every 20 steps: the same instability makes the run
# without clipping blow up. After some 100 steps only the trend of the losses is the same. Two runs
# with torch's clipping behave alike if the clipped gradients of one are multiplied by 1 + 1e-7.
# So single losses are compared only at first, and the mean loss over all steps.
COMPARED_STEPS_AFTER_FIRST_CLIP = 10
LOSS_TOLERANCE = 1e-4
MEAN_LOSS_TOLERANCE = 2e-2

FINAL_STEPS = 50

# The losses of single batches are too noisy to tell three curves apart.
SMOOTHED_STEPS = 10

# From the Okabe-Ito palette, which is safe for the colour-blind.
VERMILION, SKY_BLUE, BLACK = "#D55E00", "#56B4E9", "#000000"
STYLES: tuple[dict[str, Any], ...] = (
    {"color": VERMILION, "linewidth": 1.0, "linestyle": "-"},
    {"color": SKY_BLUE, "linewidth": 3.0, "linestyle": "-"},
    # Thin and on top, so that the curve below stays visible where both agree.
    {"color": BLACK, "linewidth": 0.8, "linestyle": "-"},
)


@dataclass
class Run:
    """The measurements of a training run, step by step."""

    name: str
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    clip_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    sample: str = ""

    @property
    def final_perplexity(self) -> float:
        """exp of the mean loss over the last steps."""
        loss = statistics.fmean(self.losses[-FINAL_STEPS:])
        # exp would overflow.
        return math.exp(loss) if loss < 700 else math.inf

    @property
    def largest_norm(self) -> float:
        """The largest gradient norm before clipping."""
        return max(self.gradient_norms, default=math.nan)

    @property
    def clip_milliseconds(self) -> float:
        """The median time of a call to the clipping function."""
        return statistics.median(self.clip_seconds) * 1000

    def clipped_share(self, max_norm: float) -> float:
        """The share of steps whose gradients were clipped."""
        return sum(norm > max_norm for norm in self.gradient_norms) / len(self.gradient_norms)

    def blow_up_step(self, loss_limit: float) -> int | None:
        """The first step whose loss is above the limit or not finite, counting from 1."""
        for step, loss in enumerate(self.losses, start=1):
            if not loss <= loss_limit:
                return step
        return None


@dataclass
class Comparison:
    """The three runs side by side."""

    unclipped: Run
    reference: Run
    extension: Run
    max_norm: float
    vocabulary_size: int
    # Relative errors in clipping the same gradients, by the name of the function.
    same_gradients: dict[str, list[float]]

    @property
    def runs(self) -> tuple[Run, Run, Run]:
        """The runs in the order of the report."""
        return self.unclipped, self.reference, self.extension

    @property
    def blow_up_loss(self) -> float:
        """Twice the loss of uniform guessing."""
        return 2 * math.log(self.vocabulary_size)

    @property
    def compared_steps(self) -> int:
        """For how many steps the two clipped runs should have the same losses."""
        for step, norm in enumerate(self.reference.gradient_norms, start=1):
            if norm > self.max_norm:
                return min(step + COMPARED_STEPS_AFTER_FIRST_CLIP, len(self.reference.losses))
        return len(self.reference.losses)

    @property
    def loss_difference(self) -> float:
        """The largest relative difference of the losses of the two clipped runs in these steps."""
        return self.largest_loss_difference(self.compared_steps)

    def largest_loss_difference(self, steps: int | None = None) -> float:
        """The largest relative difference of the losses of the two clipped runs."""
        expected = torch.tensor(self.reference.losses[:steps], dtype=torch.float64)
        actual = torch.tensor(self.extension.losses[:steps], dtype=torch.float64)
        if actual.shape != expected.shape:
            return math.inf
        return largest(((actual - expected).abs() / expected).tolist())

    @property
    def mean_loss_difference(self) -> float:
        """The relative difference of the mean losses of the two clipped runs."""
        expected = statistics.fmean(self.reference.losses)
        return abs(statistics.fmean(self.extension.losses) - expected) / expected

    @property
    def agrees(self) -> bool:
        """Whether gradclip_ext did what torch does. NaN counts as disagreement."""
        return (
            largest(self.same_gradients[self.extension.name]) <= SAME_GRADIENTS_TOLERANCE
            and self.loss_difference <= LOSS_TOLERANCE
            and self.mean_loss_difference <= MEAN_LOSS_TOLERANCE
        )


def largest(values: list[float]) -> float:
    """The largest value, or NaN if there is one, which max() would overlook."""
    return torch.tensor(values, dtype=torch.float64).max().item() if values else math.nan


def summary(comparison: Comparison) -> str:
    """Returns the table of the runs, a sample of each, and how well they agree."""
    header = (
        "run",
        "final perplexity",
        "largest gradient norm",
        "steps clipped",
        "clipping, ms per step",
        "blow-up at step",
    )
    rows = [header]
    for run in comparison.runs:
        clips = run is not comparison.unclipped
        rows.append(
            (
                run.name,
                f"{run.final_perplexity:.3g}",
                f"{run.largest_norm:.3g}",
                f"{run.clipped_share(comparison.max_norm):.1%}" if clips else "-",
                f"{run.clip_milliseconds:.3f}" if clips else "-",
                str(run.blow_up_step(comparison.blow_up_loss) or "never"),
            )
        )
    lines = ["", *_aligned(rows), ""]
    lines += [f"{run.name:14} writes: {run.sample}" for run in comparison.runs]
    lines += ["", *_agreement(comparison)]
    return "\n".join(lines)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        name, *numbers = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([name, *numbers]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def _agreement(comparison: Comparison) -> list[str]:
    reference, extension = comparison.reference.name, comparison.extension.name
    off = {name: largest(values) for name, values in comparison.same_gradients.items()}
    compared, all_steps = comparison.compared_steps, len(comparison.reference.losses)
    lines = [
        "Largest relative error in clipping the same gradients, from "
        f"{len(comparison.same_gradients[extension])} steps without clipping:",
        f"  {reference:28} {off[reference]:.1e}",
        f"  {extension:28} {off[extension]:.1e}  (tolerance {SAME_GRADIENTS_TOLERANCE:.0e})",
        f"Largest relative difference between training with {reference} and {extension}:",
        f"  {f'losses of steps 1 to {compared}':28} {comparison.loss_difference:.1e}"
        f"  (tolerance {LOSS_TOLERANCE:.0e})",
    ]
    if compared < all_steps:
        # For the reader, because the line above covers the first steps only.
        lines.append(
            f"  {'losses of all steps':28} {comparison.largest_loss_difference():.1e}"
            "  (not checked: training amplifies rounding errors)"
        )
    lines += [
        f"  {'mean loss of all steps':28} {comparison.mean_loss_difference:.1e}"
        f"  (tolerance {MEAN_LOSS_TOLERANCE:.0e})",
        f"{reference} and {extension} {'agree' if comparison.agrees else 'DO NOT AGREE'}.",
    ]
    return lines


def save_json(comparison: Comparison, options: dict[str, Any], path: Path) -> None:
    """Writes everything that was measured."""
    content = {
        "options": {name: value for name, value in options.items() if name != "out"},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gradclip_ext": gradclip_ext.__version__,
        },
        "runs": {
            run.name: {
                "final_perplexity": run.final_perplexity,
                "largest_gradient_norm": run.largest_norm,
                "clipped_share": run.clipped_share(comparison.max_norm) if clips else None,
                "clipping_milliseconds_median": run.clip_milliseconds if clips else None,
                "blow_up_step": run.blow_up_step(comparison.blow_up_loss),
                "seconds": run.seconds,
                "sample": run.sample,
                "losses": run.losses,
                "gradient_norms": run.gradient_norms,
            }
            for run, clips in zip(comparison.runs, (False, True, True), strict=True)
        },
        "agreement": {
            "agrees": comparison.agrees,
            "same_gradients_difference": {
                name: largest(values) for name, values in comparison.same_gradients.items()
            },
            "same_gradients_tolerance": SAME_GRADIENTS_TOLERANCE,
            "compared_steps": comparison.compared_steps,
            "loss_difference": comparison.loss_difference,
            "loss_tolerance": LOSS_TOLERANCE,
            "loss_difference_of_all_steps": comparison.largest_loss_difference(),
            "mean_loss_difference": comparison.mean_loss_difference,
            "mean_loss_tolerance": MEAN_LOSS_TOLERANCE,
        },
    }
    path.write_text(json.dumps(_without_nonfinite(content), indent=1, allow_nan=False) + "\n")


def _without_nonfinite(value: Any) -> Any:
    """Replaces NaN and infinities, which JSON lacks, by null."""
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_figure(comparison: Comparison, path: Path) -> None:
    """Plots losses and gradient norms of all runs against the step."""
    # Not pyplot, which may try to open a window.
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    loss_panel, norm_panel = figure.subplots(1, 2)
    for run, style in zip(comparison.runs, STYLES, strict=True):
        smooth_losses = _running_mean(run.losses)
        loss_panel.plot(range(1, len(smooth_losses) + 1), smooth_losses, label=run.name, **style)
        norm_panel.plot(range(1, len(run.gradient_norms) + 1), run.gradient_norms, **style)

    _finish_panel(loss_panel, f"Loss (mean of {SMOOTHED_STEPS} steps)", "cross-entropy")
    _finish_panel(norm_panel, "Gradient norm (before clipping)", "norm of all gradients")
    _reference_line(loss_panel, math.log(comparison.vocabulary_size), "guessing at random")
    threshold = f"max_norm = {comparison.max_norm:g}, clipped above"
    _reference_line(norm_panel, comparison.max_norm, threshold)
    step = comparison.unclipped.blow_up_step(comparison.blow_up_loss)
    title = "A recurrent network trained with and without gradient clipping"
    if step is not None:
        title += f". Without, it blows up at step {step}."
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def _running_mean(values: list[float]) -> list[float]:
    """Replaces every value by the mean of itself and the values before it."""
    return [
        statistics.fmean(values[max(0, end - SMOOTHED_STEPS) : end])
        for end in range(1, len(values) + 1)
    ]


def _finish_panel(panel: Axes, title: str, label: str) -> None:
    panel.set_title(title)
    panel.set_xlabel("training step")
    panel.set_ylabel(f"{label} (log scale)")
    panel.set_yscale("log")
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def _reference_line(panel: Axes, height: float, label: str) -> None:
    panel.axhline(height, color="0.35", linewidth=1.2, linestyle="--")
    panel.annotate(
        label,
        (0.02, height),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
    )
