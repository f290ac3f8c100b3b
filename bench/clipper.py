"""Times GradClipper, grad_norms and the adaptive rules against the same written by hand in torch.

    python bench/clipper.py                            # the default workloads, minutes
    python bench/clipper.py --workloads lstm --seconds 0.5
    python bench/clipper.py --device cuda

Gradients are float32 and have the shapes of real models. Within a row everything takes turns.
Gradients and the state of a rule are restored before every call, so that all calls make the same
step. Each implementation is checked against the one by hand in float64 before anything is timed.
Quote the ratios: absolute times depend on what else the machine does.

Cases:
  norms         grad_norms: the norm of each gradient and of all.
  clip          GradClipper with a number, against torch's clip_grad_norm_ with norms and history.
  autoclip      GradClipper with AutoClip, against numpy.percentile of all norms so far.
  zclip         GradClipper with ZClip, against moving averages as Python floats.
  adagc         GradClipper with AdaGC, against a loop over the tensors.
  agc           adaptive_clip_grad_, against a loop over the tensors.
  weight_decay  add_weight_decay_ and clip_grad_norm_, against a loop and torch's clip_grad_norm_.

Kinds: "quiet" is a step that clips nothing, "clip" one that clips everything. "bare" is our own
function without what the case adds: get_total_norm for norms, else clip_grad_norm_. So ours/bare
tells what the addition costs.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import by_hand
import torch
from clocks import Clock, clock_for, measured
from report import Table, default_path, environment, save
from torch import Tensor
from tqdm import tqdm
from workloads import WORKLOADS, Model, Workload

import gradclip_ext
from gradclip_ext import (
    AdaGC,
    AutoClip,
    GradClipper,
    Threshold,
    ZClip,
    adaptive_clip_grad_,
    add_weight_decay_,
    grad_norms,
)

OURS, HAND, BARE = "gradclip_ext", "by hand", "gradclip_ext, bare"
DEFAULT_WORKLOADS = ("small", "lstm", "1000x1000", "resnet50", "gpt2")

WEIGHT_DECAY = 0.1
PERCENTILE = 10.0
# The papers' values, which are also our defaults.
ZCLIP = {"alpha": 0.97, "z_threshold": 2.5}
ADAGC = {"beta": 0.98, "relative_limit": 1.05}
# Steps before the timed one, and the spread of the logarithms of their norms.
PAST_STEPS = 1000
PAST_SPREAD = 0.1
# For AGC: no unit exceeds its limit, or all of them do.
CLIP_FACTORS = {"quiet": 100.0, "clip": 0.01}

# Largest relative error of ours: of a norm, and of an element relative to the largest. More is a
# bug, and nothing is timed.
TOLERANCE = 4e-7
# Beyond this, the result of another implementation counts as wrong. It is timed, but marked.
BELIEVABLE = 1e-2


@dataclass(frozen=True)
class Prepared:
    """An implementation, ready to be called on a model."""

    restore: Callable[[], None]
    call: Callable[[], Any]
    # Turns what a call returned into the norms that it found, the total first.
    read: Callable[[Any], list[float]] = lambda _: []


# Prepares an implementation for a model and a kind.
Way = Callable[[Model, str], Prepared]


def max_norm_of(model: Model, kind: str) -> float:
    """Above the norm of the gradients, or below it."""
    return model.norm * {"quiet": 3.0, "clip": 1.0 / 3.0}[kind]


def read_pair(result: tuple[Tensor, Tensor]) -> list[float]:
    return [result[0].item(), *result[1].tolist()]


def read_total(result: Tensor) -> list[float]:
    return [result.item()]


# --- norms ---


def all_norms(
    measure: Callable[[list[torch.nn.Parameter]], Any], model: Model, kind: str
) -> Prepared:
    # Ours also returns the names.
    return Prepared(model.restore, lambda: measure(model.parameters)[:2], read_pair)


def bare_norms(model: Model, kind: str) -> Prepared:
    return Prepared(model.restore, lambda: gradclip_ext.get_total_norm(model.gradients), read_total)


def bare_norms_of_parameters(model: Model, kind: str) -> Prepared:
    """Also reads each parameter's ``.grad``, as grad_norms does."""
    return Prepared(
        model.restore,
        lambda: gradclip_ext.clip_grad_norm_(model.parameters, math.inf),
        read_total,
    )


# --- clip ---


def read_report(clipper: GradClipper) -> Callable[[Any], list[float]]:
    def read(_: Any) -> list[float]:
        report = clipper.report()
        return [report.total_norm, *report.norms]

    return read


def ours_clip(model: Model, kind: str) -> Prepared:
    clipper = GradClipper(model.parameters, max_norm_of(model, kind))
    return Prepared(model.restore, clipper.clip_, read_report(clipper))


def hand_clip(model: Model, kind: str, foreach: bool = False) -> Prepared:
    clipper = by_hand.Clipper(model.parameters, max_norm_of(model, kind), foreach)
    return Prepared(model.restore, clipper.clip_, read_pair)


def foreach_clip(model: Model, kind: str) -> Prepared:
    return hand_clip(model, kind, foreach=True)


def bare_clip(model: Model, kind: str) -> Prepared:
    max_norm = max_norm_of(model, kind)
    return Prepared(
        model.restore,
        lambda: gradclip_ext.clip_grad_norm_(model.parameters, max_norm),
        read_total,
    )


# --- rules ---


def past_factors() -> list[float]:
    """The norms of the steps before, relative to a typical one."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(PAST_STEPS, generator=generator, dtype=torch.float64) * PAST_SPREAD
    return noise.exp().tolist()


def with_past(rule: Threshold, model: Model, kind: str) -> Threshold:
    """The rule, in its state before the timed step."""
    device = model.originals[0].device
    norms = torch.tensor(model.norms, dtype=torch.float64, device=device)
    norms *= max_norm_of(model, kind) / model.norm
    for factor in past_factors():
        past = norms * factor
        rule.limits(torch.linalg.vector_norm(past), past)
    return rule


def ours_rule(make: Callable[[Model], Threshold], model: Model, kind: str) -> Prepared:
    rule = with_past(make(model), model, kind)
    state = rule.state_dict()
    clipper = GradClipper(model.parameters, rule)

    def restore() -> None:
        model.restore()
        rule.load_state_dict(state)

    return Prepared(restore, clipper.clip_, read_report(clipper))


def make_autoclip(model: Model) -> AutoClip:
    return AutoClip(PERCENTILE)


def make_zclip(model: Model) -> ZClip:
    return ZClip(**ZCLIP)


def make_adagc(model: Model) -> AdaGC:
    # So high that the warm-up clips nothing and records the norms as they are.
    return AdaGC(**ADAGC, absolute_limit=10 * model.norm)


def hand_autoclip(model: Model, kind: str) -> Prepared:
    past = [max_norm_of(model, kind) * factor for factor in past_factors()]
    clipper = by_hand.AutoClip(model.parameters, PERCENTILE)

    def restore() -> None:
        model.restore()
        clipper.history[:] = past

    return Prepared(restore, clipper.clip_, lambda total: [total])


def hand_zclip(model: Model, kind: str) -> Prepared:
    state = with_past(make_zclip(model), model, kind).state_dict()
    mean, variance = state["mean"].item(), state["variance"].item()
    clipper = by_hand.ZClip(model.parameters, **ZCLIP)

    def restore() -> None:
        model.restore()
        clipper.mean, clipper.variance = mean, variance

    return Prepared(restore, clipper.clip_, lambda total: [total])


def hand_adagc(model: Model, kind: str) -> Prepared:
    gammas = with_past(make_adagc(model), model, kind).state_dict()["gamma"].tolist()
    clipper = by_hand.AdaGC(model.parameters, **ADAGC)

    def restore() -> None:
        model.restore()
        clipper.gammas[:] = gammas

    return Prepared(restore, clipper.clip_, lambda norms: [math.hypot(*norms), *norms])


# --- agc ---


def agc(
    clip_: Callable[[list[torch.nn.Parameter], float], None], model: Model, kind: str
) -> Prepared:
    clip_factor = CLIP_FACTORS[kind]
    return Prepared(model.restore, lambda: clip_(model.parameters, clip_factor))


# --- weight_decay ---


def weight_decay(
    add_: Callable[[list[torch.nn.Parameter], float], None],
    clip_: Callable[[list[torch.nn.Parameter], float], Tensor],
    model: Model,
    kind: str,
) -> Prepared:
    max_norm = max_norm_of(model, kind)

    def call() -> Tensor:
        add_(model.parameters, WEIGHT_DECAY)
        return clip_(model.parameters, max_norm)

    return Prepared(model.restore, call, read_total)


def clipper_weight_decay(model: Model, kind: str) -> Prepared:
    clipper = GradClipper(model.parameters, max_norm_of(model, kind), weight_decay=WEIGHT_DECAY)
    return Prepared(model.restore, clipper.clip_, read_total)


@dataclass(frozen=True)
class Case:
    """The implementations by name: always OURS, HAND and BARE, and others where there are any."""

    ways: dict[str, Way]
    kinds: tuple[str, ...] = ("quiet", "clip")


CASES = {
    "norms": Case(
        {
            OURS: partial(all_norms, grad_norms),
            HAND: partial(all_norms, by_hand.norms_one_by_one),
            BARE: bare_norms,
            "gradclip_ext, bare, of parameters": bare_norms_of_parameters,
            "torch foreach": partial(all_norms, by_hand.norms_by_foreach),
        },
        ("quiet",),
    ),
    "clip": Case(
        {OURS: ours_clip, HAND: hand_clip, BARE: bare_clip, "torch foreach": foreach_clip}
    ),
    "autoclip": Case(
        {OURS: partial(ours_rule, make_autoclip), HAND: hand_autoclip, BARE: bare_clip}
    ),
    "zclip": Case({OURS: partial(ours_rule, make_zclip), HAND: hand_zclip, BARE: bare_clip}),
    "adagc": Case({OURS: partial(ours_rule, make_adagc), HAND: hand_adagc, BARE: bare_clip}),
    "agc": Case(
        {
            OURS: partial(agc, adaptive_clip_grad_),
            HAND: partial(agc, by_hand.adaptive_clip_grad_),
            BARE: bare_clip,
        }
    ),
    "weight_decay": Case(
        {
            OURS: partial(weight_decay, add_weight_decay_, gradclip_ext.clip_grad_norm_),
            HAND: partial(weight_decay, by_hand.add_weight_decay_, torch.nn.utils.clip_grad_norm_),
            BARE: bare_clip,
            "GradClipper": clipper_weight_decay,
        }
    ),
}


def is_bare(name: str) -> bool:
    """Whether it does less than the others, so that results may differ."""
    return name.startswith(BARE)


def done(prepared: Prepared) -> list[float]:
    """Makes one step and returns the norms it found."""
    prepared.restore()
    return prepared.read(prepared.call())


def relative_error(
    found: list[float], model: Model, expected: list[float], expected_gradients: list[Tensor]
) -> float:
    """The largest, over the norms that both report and all elements relative to the largest."""
    errors = [
        abs(one - other) / other
        for one, other in zip(found, expected, strict=False)
        if other > 0.0 or one != other
    ]
    worst = torch.zeros((), dtype=torch.float64, device=expected_gradients[0].device)
    for gradient, other in zip(model.gradients, expected_gradients, strict=True):
        error = (gradient.double() - other).abs().max() / other.abs().max()
        worst = torch.maximum(worst, error.nan_to_num(nan=torch.inf))
    errors.append(worst.item())
    # max() would overlook NaN, and JSON has no infinity.
    return min(1e300, max(math.inf if math.isnan(error) else error for error in errors))


def checked(case: Case, kind: str, model: Model) -> dict[str, float]:
    """The relative error of each comparable implementation, against by hand in float64."""
    truth = model.in_float64()
    expected = done(case.ways[HAND](truth, kind))
    errors = {}
    for name, way in case.ways.items():
        if is_bare(name):
            continue
        found = done(way(model, kind))
        errors[name] = relative_error(found, model, expected, truth.gradients)
    if not errors[OURS] <= TOLERANCE + by_hand.TORCH_EPSILON / model.norm:
        raise SystemExit(f"gradclip_ext is wrong, relative error {errors[OURS]:.2g}")
    return errors


def row_of(
    workload: Workload,
    name: str,
    kind: str,
    model: Model,
    clock: Clock,
    seconds: float,
) -> dict[str, Any]:
    """Checks and measures all implementations of a case."""
    case = CASES[name]
    errors = checked(case, kind, model)
    prepared = {way_name: way(model, kind) for way_name, way in case.ways.items()}
    calls = {way_name: (way.restore, way.call) for way_name, way in prepared.items()}
    implementations = measured(calls, clock, seconds)
    for way_name, error in errors.items():
        implementations[way_name]["relative_error"] = error
        implementations[way_name]["believable"] = error <= BELIEVABLE
    medians = {way_name: values["median_us"] for way_name, values in implementations.items()}
    bares = [median for way_name, median in medians.items() if is_bare(way_name)]
    return {
        "workload": workload.name,
        "case": name,
        "kind": kind,
        "dtype": "float32",
        "tensors": len(model.gradients),
        "elements": workload.elements,
        "implementations": implementations,
        "ratio": medians[HAND] / medians[OURS],
        "ratio_to_bare": medians[OURS] / medians[BARE],
        # Of norms there are two: one is given the gradients, the other reads them.
        "ratio_to_slowest_bare": medians[OURS] / max(bares),
    }


COLUMNS = {
    "workload": -10,
    "case": -12,
    "kind": -5,
    "tensors": 7,
    "by hand us": 11,
    "ours us": 10,
    "20 % .. 80 %": 21,
    "hand/ours": 9,
    "bare us": 10,
    "ours/bare": 9,
    "others": -60,
}


def line_of(table: Table, row: dict[str, Any]) -> str:
    implementations = row["implementations"]
    ours, hand, bare = (implementations[name] for name in (OURS, HAND, BARE))
    others = [
        f"{name} {values['median_us']:.1f}" + ("" if values.get("believable", True) else "!")
        for name, values in implementations.items()
        if name not in (OURS, HAND, BARE)
    ]
    return table.line(
        [
            row["workload"],
            row["case"],
            row["kind"],
            str(row["tensors"]),
            f"{hand['median_us']:.1f}" + ("" if hand["believable"] else "!"),
            f"{ours['median_us']:.1f}",
            f"{ours['q20_us']:.1f} .. {ours['q80_us']:.1f}",
            f"{row['ratio']:.2f}",
            f"{bare['median_us']:.1f}",
            f"{row['ratio_to_bare']:.3f}",
            ", ".join(others),
        ]
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=WORKLOADS,
        default=list(DEFAULT_WORKLOADS),
        metavar="NAME",
        help=f"{', '.join(WORKLOADS)} (default: {', '.join(DEFAULT_WORKLOADS)})",
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="per workload, case and kind (default: 4)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument(
        "--output", type=Path, help="JSON file (default: named after the run, in bench/results)"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    clock = clock_for(device)
    facts = environment(device)
    path = options.output or default_path(facts, "clipper")
    table = Table(COLUMNS)
    tqdm.write(table.head())
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    steps = [(name, kind) for name in options.cases for kind in CASES[name].kinds]
    # disable=None: a bar on a terminal, nothing if the output is redirected.
    progress = tqdm(total=len(options.workloads) * len(steps), leave=False, disable=None)
    for workload in (WORKLOADS[name] for name in options.workloads):
        model = Model(workload, device)
        for name, kind in steps:
            progress.set_description(f"{workload.name} {name} {kind}")
            rows.append(row_of(workload, name, kind, model, clock, options.seconds))
            tqdm.write(line_of(table, rows[-1]))
            progress.update()
            # After every row, so that an interrupted run keeps what it has measured.
            save({**facts, "seconds": options.seconds, "rows": rows}, path)
        # Freed first, since two of the largest models may not fit into memory together.
        del model
    progress.close()
    if any(
        not way.get("believable", True) for row in rows for way in row["implementations"].values()
    ):
        tqdm.write("!: the error is too large to be explained by the dtype")
    tqdm.write(f"\n{time.perf_counter() - start:.0f} s. Data: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
