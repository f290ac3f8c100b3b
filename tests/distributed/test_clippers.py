"""GradClipper on DTensors: the decisions of one process on the whole gradients, on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mixes
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gradclip_ext import AGC, AdaGC, AutoClip, GradClipper, TimesLimit, ZClip

MIXES = ["fsdp", "empty shards", "hsdp", "fsdp and tensor parallel", "partial", "crossing meshes"]
ROWS = ["fsdp", "empty shards", "hsdp", "beside plain tensors"]
STEPS = 5

Options = dict[str, Any]
# Each gives the arguments of a clipper anew, since rules have a state.
SETTINGS: dict[str, Callable[[], tuple[Any, Options]]] = {
    "number": lambda: (1.0, {}),
    "AutoClip": lambda: (AutoClip(50.0), {}),
    "ZClip": lambda: (ZClip(warmup_steps=2), {}),
    "AdaGC": lambda: (AdaGC(warmup_steps=1), {}),
    "L1": lambda: (1.0, {"norm_type": 1.0}),
    "inf": lambda: (1.0, {"norm_type": math.inf}),
    "clip_value": lambda: (None, {"clip_value": 2.0}),
    "both": lambda: (50.0, {"clip_value": 2.0}),
    "zero": lambda: (1.0, {"nonfinite": "zero"}),
    "skip": lambda: (AutoClip(50.0), {"nonfinite": "skip"}),
    "spikes": lambda: (ZClip(warmup_steps=1), {"skip_above": TimesLimit(1.5)}),
    "weight decay": lambda: (1.0, {"weight_decay": 0.25}),
    "late weight decay": lambda: (AutoClip(50.0), {"weight_decay": 0.25, "nonfinite": "skip"}),
}
# What has to be added up over ranks has no elements to limit, and no units.
OF_ELEMENTS = ("clip_value", "both")
NONFINITE = ("zero", "skip", "spikes", "late weight decay")


def train(
    parameters: list[Any], clipper: GradClipper, renew: Callable[[int], None]
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "totals": [],
        "coefficients": [],
        "norms": [],
        "flags": [],
        "limits": [],
    }
    for step in range(STEPS):
        renew(step)
        clipper.clip_()
        report = clipper.report()
        found["totals"].append(report.total_norm)
        found["coefficients"].append(report.coefficient)
        found["norms"].append(list(report.norms))
        found["limits"].append(list(report.limits))
        found["flags"].append(clipper.found_inf.item())
    state = clipper.state_dict()
    found["counters"] = {key: number for key, number in state.items() if isinstance(number, int)}
    found["rules"] = repr(state["rules"])
    found["gradients"] = [
        mixes.whole_of(parameter.grad).flatten().tolist() for parameter in parameters
    ]
    return found


def wholes_of(name: str, step: int, setting: str) -> list[Tensor]:
    wholes = mixes.whole_gradients(mixes.MIXES[name], seed=step)
    if setting in NONFINITE and step == 3:
        wholes[0].view(-1)[0] = math.nan
    if setting == "spikes" and step == 2:
        wholes = [whole * 1024.0 for whole in wholes]
    return wholes


# On the ranks.


def on_ranks(name: str, setting: str) -> dict[str, Any]:
    entries = mixes.MIXES[name]
    parameters = mixes.parameters_of(entries, mixes.whole_gradients(entries))
    rule, options = SETTINGS[setting]()
    clipper = GradClipper(parameters, rule, **options)

    def renew(step: int) -> None:
        others = mixes.parameters_of(entries, wholes_of(name, step, setting))
        for parameter, other in zip(parameters, others, strict=True):
            parameter.grad = other.grad

    return train(parameters, clipper, renew)


def with_units(name: str, missing: bool) -> Any:
    entries = mixes.MIXES[name]
    wholes = mixes.whole_gradients(entries)
    parameters = mixes.parameters_of(entries, wholes)
    # None of one parameter, on all ranks.
    if missing:
        parameters[0].grad = None
    clipper = GradClipper(parameters, AGC(0.5))
    total = clipper.clip_()
    gradients = [
        None if p.grad is None else mixes.whole_of(p.grad).flatten().tolist() for p in parameters
    ]
    return total.item(), clipper.report().coefficient, gradients


def groups_of_parameters(name: str) -> Any:
    """Two groups, each with a rule of its own, measured in one exchange."""
    entries = mixes.MIXES[name]
    parameters = mixes.parameters_of(entries, mixes.whole_gradients(entries))
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    clipper = GradClipper(groups, [1.0, AutoClip(50.0)])
    total = clipper.clip_()
    report = clipper.report()
    return total.item(), list(report.norms), list(report.limits), report.coefficient


def resume() -> Any:
    """A state that one rank saved is that of all."""
    entries = mixes.MIXES["fsdp"]
    parameters = mixes.parameters_of(entries, mixes.whole_gradients(entries))
    clipper = GradClipper(parameters, ZClip(warmup_steps=1))
    clipper.clip_()
    states = [clipper.state_dict()] if torch.distributed.get_rank() == 0 else [None]
    torch.distributed.broadcast_object_list(states, src=0)
    other = GradClipper(parameters, ZClip(warmup_steps=1))
    other.load_state_dict(states[0])
    assert other.state_dict() == clipper.state_dict()
    found = []
    for each in (clipper, other):
        for parameter, again in zip(
            parameters, mixes.parameters_of(entries, mixes.whole_gradients(entries, 3)), strict=True
        ):
            parameter.grad = again.grad
        each.clip_()
        found.append((each.report(), mixes.whole_of(parameters[0].grad).tolist()))
    assert found[0] == found[1]
    return found[0][0].total_norm


def refused(kind: str) -> Any:
    mesh = mixes.mesh_of(mixes.FLAT)
    placement = {"columns": mixes.S1, "partial": mixes.P}[kind]
    entry = mixes.Entry((4, 4), mixes.FLAT, (placement,))
    parameters = mixes.parameters_of([entry], [torch.ones(4, 4)])
    assert isinstance(parameters[0], DTensor) and mesh.size() == 2
    before = parameters[0].grad.to_local().clone()
    try:
        GradClipper(parameters, AGC()).clip_()
    finally:
        assert torch.equal(parameters[0].grad.to_local(), before)


# In the test process.


def alone(name: str, setting: str) -> dict[str, Any]:
    parameters = [nn.Parameter(torch.full_like(w, 0.5)) for w in wholes_of(name, 0, setting)]
    rule, options = SETTINGS[setting]()

    def renew(step: int) -> None:
        for parameter, whole in zip(parameters, wholes_of(name, step, setting), strict=True):
            parameter.grad = whole.clone()

    return train(parameters, GradClipper(parameters, rule, **options), renew)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MIXES)
def test_same_decisions_as_alone(world, name, setting):
    if setting in OF_ELEMENTS and name == "partial":
        answers = world(4).outcomes(on_ranks, name, setting)
        for rank, answer in enumerate(answers):
            assert answer.kind == "NotImplementedError", answer
            assert "added up over its ranks" in answer.text and f"on rank {rank}" in answer.text
        return
    answers = world(4).run(on_ranks, name, setting)
    expected = alone(name, setting)
    for answer in answers:
        # The same bits everywhere; repr, because a NaN is not equal to itself.
        assert repr(answer) == repr(answers[0])
    found = answers[0]
    assert found["flags"] == expected["flags"]
    assert found["counters"] == expected["counters"]
    for key in ("totals", "coefficients"):
        assert found[key] == pytest.approx(expected[key], rel=1e-6, nan_ok=True), key
    for key in ("norms", "limits", "gradients"):
        for one, other in zip(found[key], expected[key], strict=True):
            assert one == pytest.approx(other, rel=2e-6, abs=1e-12, nan_ok=True), key


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_units(world, name, missing):
    answers = world(2).run(with_units, name, missing)
    assert answers[0] == answers[1]
    wholes = mixes.whole_gradients(mixes.MIXES[name])
    parameters = [nn.Parameter(torch.full_like(whole, 0.5)) for whole in wholes]
    for parameter, whole in zip(parameters, wholes, strict=True):
        parameter.grad = whole.clone()
    if missing:
        parameters[0].grad = None
    clipper = GradClipper(parameters, AGC(0.5))
    total = clipper.clip_()
    assert answers[0][0] == pytest.approx(total.item(), rel=1e-6)
    assert answers[0][1] == pytest.approx(clipper.report().coefficient, rel=1e-6)
    for found, parameter in zip(answers[0][2], parameters, strict=True):
        expected = None if parameter.grad is None else parameter.grad.flatten().tolist()
        assert found == (None if expected is None else pytest.approx(expected, rel=2e-6))


@pytest.mark.parametrize(
    ("kind", "text"), [("columns", "units that are split over ranks"), ("partial", "not partial")]
)
def test_units_that_are_split(world, kind, text):
    for answer in world(2).outcomes(refused, kind):
        assert answer.kind in ("NotImplementedError", "RuntimeError") and text in answer.text, (
            answer
        )


@pytest.mark.parametrize("name", ["fsdp", "hsdp", "crossing meshes"])
def test_groups_with_rules_of_their_own(world, name):
    answers = world(4).run(groups_of_parameters, name)
    assert all(answer == answers[0] for answer in answers)
    wholes = mixes.whole_gradients(mixes.MIXES[name])
    parameters = [nn.Parameter(torch.zeros_like(whole)) for whole in wholes]
    for parameter, whole in zip(parameters, wholes, strict=True):
        parameter.grad = whole.clone()
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    clipper = GradClipper(groups, [1.0, AutoClip(50.0)])
    total = clipper.clip_()
    report = clipper.report()
    expected = [total.item(), *report.norms, *report.limits, report.coefficient]
    found = answers[0]
    assert [found[0], *found[1], *found[2], found[3]] == pytest.approx(expected, rel=1e-6)


def test_resume(world):
    totals = world(2).run(resume)
    assert totals[0] == totals[1] > 0.0
