"""Times the update alone, without forward and backward: unscaling, clipping and the fused AdamW.

Used by ``step.py --updates``. The ways take turns on the same parameters and the same optimizer.
How many bytes of memory each has to move is known, and most of the time is spent on that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from clocks import Call, clock_for, measured
from report import Table
from workloads import SIGMA, WORKLOADS, Model

import gradclip_ext

SHAPES = ("resnet50", "gpt2")
SCALE = 65536.0
# Smaller than any update that would change the time of the next one.
LEARNING_RATE = 1e-6
NOTHING, RECIPE, CLIP, HANDED = "no clipping", "torch", "clip + step", "clip_and_step"
KINDS = {"quiet": 2.0, "clip": 0.5}
# Bytes that float32 parameters move for each element. A step reads parameter, gradient and two
# averages, and writes all but the gradient, which it writes too where it divides it.
READ, READ_AND_WRITE = 4, 8
STEP, DIVIDING_STEP = 28, 32


@dataclass(frozen=True)
class Way:
    """One way to update, and the bytes an element that it moves, by kind."""

    call: Call
    bytes: dict[str, int]


class Update:
    """A model's parameters, a fused AdamW and a scaler, and the ways to update with them."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.model = Model(WORKLOADS[name], device)
        self.device = device
        self.elements = WORKLOADS[name].elements
        self.scaled = [original * SCALE for original in self.model.originals]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters, lr=LEARNING_RATE, fused=True, capturable=device.type == "cuda"
        )
        self.scaler = self.new_scaler()
        self.restore()
        # So that no later step has to create its averages.
        self.optimizer.step()

    def new_scaler(self) -> torch.amp.GradScaler:
        scaler = torch.amp.GradScaler(self.device.type, init_scale=SCALE)
        scaler.scale(torch.ones((), device=self.device))
        return scaler

    def restore(self) -> None:
        self.model.restore()

    def restore_scaled(self) -> None:
        torch._foreach_copy_(self.model.gradients, self.scaled)
        self.scaler = self.new_scaler()

    def ways(self, max_norm: float) -> dict[str, Way]:
        """Without a scaler."""
        parameters, optimizer = self.model.parameters, self.optimizer

        def recipe() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            optimizer.step()

        def clip_then_step() -> None:
            gradclip_ext.clip_grad_norm_(parameters, max_norm)
            optimizer.step()

        quiet = {"quiet": READ + STEP, "clip": READ + READ_AND_WRITE + STEP}
        # torch multiplies by 1 as well.
        always = dict.fromkeys(KINDS, quiet["clip"])
        return {
            NOTHING: Way(optimizer.step, dict.fromkeys(KINDS, STEP)),
            RECIPE: Way(recipe, always),
            CLIP: Way(clip_then_step, quiet),
            HANDED: Way(
                lambda: gradclip_ext.clip_and_step(optimizer, max_norm),
                {"quiet": READ + STEP, "clip": READ + DIVIDING_STEP},
            ),
        }

    def ways_with_scaler(self, max_norm: float) -> dict[str, Way]:
        parameters, optimizer = self.model.parameters, self.optimizer

        def recipe() -> None:
            self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            self.scaler.step(optimizer)

        def clip_then_step() -> None:
            gradclip_ext.unscale_and_clip_grad_norm_(self.scaler, optimizer, max_norm)
            self.scaler.step(optimizer)

        # torch looks for infinities in a pass that writes every gradient.
        return {
            NOTHING: Way(
                lambda: self.scaler.step(optimizer),
                dict.fromkeys(KINDS, READ_AND_WRITE + DIVIDING_STEP),
            ),
            RECIPE: Way(recipe, dict.fromkeys(KINDS, 2 * READ_AND_WRITE + READ + STEP)),
            CLIP: Way(clip_then_step, dict.fromkeys(KINDS, READ + READ_AND_WRITE + STEP)),
            HANDED: Way(
                lambda: gradclip_ext.clip_and_step(optimizer, max_norm, scaler=self.scaler),
                dict.fromkeys(KINDS, READ + DIVIDING_STEP),
            ),
        }

    def ways_to_unscale(self, max_norm: float) -> dict[str, Way]:
        """Without the step."""
        parameters, optimizer = self.model.parameters, self.optimizer

        def unscale_then(clip: Callable[..., object]) -> Call:
            def call() -> None:
                self.scaler.unscale_(optimizer)
                clip(parameters, max_norm)

            return call

        both = {"quiet": READ_AND_WRITE + READ, "clip": 2 * READ_AND_WRITE + READ}
        return {
            "unscale_, torch": Way(
                unscale_then(torch.nn.utils.clip_grad_norm_), dict.fromkeys(KINDS, both["clip"])
            ),
            "unscale_, clip_grad_norm_": Way(unscale_then(gradclip_ext.clip_grad_norm_), both),
            "unscale_and_clip_grad_norm_": Way(
                lambda: gradclip_ext.unscale_and_clip_grad_norm_(self.scaler, optimizer, max_norm),
                dict.fromkeys(KINDS, READ + READ_AND_WRITE),
            ),
        }

    def measure(self, max_norm: float) -> dict[str, Way]:
        """With nothing to clip, this is all there is to do beside the step."""
        parameters = self.model.parameters
        return {
            "get_total_norm": Way(
                lambda: gradclip_ext.get_total_norm(self.model.gradients),
                dict.fromkeys(KINDS, READ),
            ),
            "clip_grad_norm_": Way(
                lambda: gradclip_ext.clip_grad_norm_(parameters, max_norm),
                {"quiet": READ, "clip": READ + READ_AND_WRITE},
            ),
        }

    def check(self, way: Way, restore: Call, max_norm: float | None) -> None:
        """Refuses a way that leaves other gradients than the scaled or clipped ones."""
        restore()
        way.call()
        coefficient = 1.0
        if max_norm is not None:
            coefficient = min(1.0, max_norm / (self.model.norm + 1e-6))
        for parameter, original in zip(self.model.parameters, self.model.originals, strict=True):
            expected = original * coefficient
            if not torch.allclose(parameter.grad, expected, rtol=2e-3, atol=1e-6 * SIGMA):
                raise SystemExit("a way to update has left wrong gradients")


def rows_of(name: str, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """A row for each part and kind, all timed in turns for so many seconds."""
    update, clock = Update(name, device), clock_for(device)
    parts = {
        "step": (update.ways, update.restore),
        "step with scaler": (update.ways_with_scaler, update.restore_scaled),
        "unscale and clip": (update.ways_to_unscale, update.restore_scaled),
        "measure": (update.measure, update.restore),
    }
    # All in one round: how fast memory is changes with time, and parts are compared as well.
    calls: dict[str, tuple[Call, Call]] = {}
    ways: dict[tuple[str, str, str], Way] = {}
    for part, (ways_of, restore) in parts.items():
        for kind, factor in KINDS.items():
            max_norm = factor * update.model.norm
            for label, way in ways_of(max_norm).items():
                ways[part, kind, label] = way
                calls[f"{part}, {kind}: {label}"] = (restore, way.call)
                if label not in (NOTHING, "get_total_norm"):
                    update.check(way, restore, max_norm)
    found = measured(calls, clock, seconds)
    rows = []
    for part, kind in itertools.product(parts, KINDS):
        implementations = {
            label: {**found[f"{part}, {kind}: {label}"], "bytes": way.bytes[kind]}
            for (own_part, own_kind, label), way in ways.items()
            if (own_part, own_kind) == (part, kind)
        }
        rows.append(
            {
                "model": name,
                "elements": update.elements,
                "part": part,
                "kind": kind,
                "implementations": implementations,
            }
        )
    _add_measured_bytes(rows)
    return rows


def _add_measured_bytes(rows: list[dict[str, Any]]) -> None:
    """Turns times into bytes, at the rate at which the step without clipping moves its own."""
    (yardstick,) = (
        row["implementations"][NOTHING]
        for row in rows
        if (row["part"], row["kind"]) == ("step", "quiet")
    )
    bytes_a_microsecond = STEP / yardstick["median_us"]
    for row in rows:
        for values in row["implementations"].values():
            values["measured_bytes"] = values["median_us"] * bytes_a_microsecond


def ratios_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What clipping in the step is meant to save, from the rows of one model."""
    medians = {
        (row["part"], row["kind"], label): values["median_us"]
        for row in rows
        for label, values in row["implementations"].items()
    }

    def extra(part: str, label: str) -> float:
        return medians[part, "clip", label] - medians[part, "clip", NOTHING]

    def ratio(part: str, kind: str, label: str, other: str) -> float:
        return medians[part, kind, label] / medians[part, kind, other]

    unscale, ours = "unscale_, clip_grad_norm_", "unscale_and_clip_grad_norm_"
    return {
        "extra of clip_and_step / extra of clip + step": extra("step", HANDED)
        / extra("step", CLIP),
        "extra of clip_and_step / extra of torch": extra("step", HANDED) / extra("step", RECIPE),
        "quiet: extra of clip_and_step / measuring": (
            medians["step", "quiet", HANDED] - medians["step", "quiet", NOTHING]
        )
        / medians["measure", "quiet", "get_total_norm"],
        "with scaler: clip_and_step / no clipping": ratio(
            "step with scaler", "clip", HANDED, NOTHING
        ),
        "with scaler: torch / clip_and_step": ratio("step with scaler", "clip", RECIPE, HANDED),
        "unscale_ and clip_grad_norm_ / unscale_and_clip_grad_norm_": ratio(
            "unscale and clip", "clip", unscale, ours
        ),
        "unscale_ and torch / unscale_and_clip_grad_norm_": ratio(
            "unscale and clip", "clip", "unscale_, torch", ours
        ),
    }


COLUMNS = {"model": -9, "part": -17, "kind": -6, "way": -28, "ms": 8, "bytes": 6, "measured": 9}


def lines_of(table: Table, rows: list[dict[str, Any]]) -> list[str]:
    return [
        table.line(
            [
                row["model"],
                row["part"],
                row["kind"],
                label,
                f"{values['median_us'] / 1e3:.2f}",
                str(values["bytes"]),
                f"{values['measured_bytes']:.1f}",
            ]
        )
        for row in rows
        for label, values in row["implementations"].items()
    ]
