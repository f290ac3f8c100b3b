"""Arguments that are wrong on one rank, and steps of optimizers in which ranks differ."""

from __future__ import annotations

import math
from typing import Any

import mixes
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from worlds import Failure

import gradclip_ext

BROKEN = 1
EXPERTS = "expert parallel beside data parallel"
STEPS = ["clip_and_step", "with a scaler", "unscale_and_clip", "GradClipper", "GradClipper, scaler"]


def is_broken() -> bool:
    return torch.distributed.get_rank() == BROKEN


def parameters_of(name: str) -> list[Any]:
    return mixes.parameters_of(mixes.MIXES[name], mixes.whole_gradients(mixes.MIXES[name]))


def local_of(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def same_as(parameters: list[nn.Parameter], name: str) -> bool:
    """Whether the gradients are those that the mix begins with."""
    return all(
        torch.equal(local_of(one.grad), local_of(other.grad))
        for one, other in zip(parameters, parameters_of(name), strict=True)
    )


# On the ranks.


def step(way: str, optimizer: Any, max_norm: Any = 1.0, norm_type: Any = 2.0) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    if way == "clip_and_step":
        norm = gradclip_ext.clip_and_step(optimizer, max_norm, norm_type)
    elif way == "with a scaler":
        norm = gradclip_ext.clip_and_step(optimizer, max_norm, norm_type, scaler=scaler)
    elif way == "unscale_and_clip":
        norm = gradclip_ext.unscale_and_clip_grad_norm_(scaler, optimizer, max_norm, norm_type)
    else:
        clipper = gradclip_ext.GradClipper(optimizer, max_norm, norm_type=norm_type)
        norm = clipper.step(optimizer, scaler if "scaler" in way else None)
    return repr(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))


def step_without(name: str, way: str, missing: list[int]) -> Any:
    """One rank has no gradient for some parameters, and so contributes nothing of them."""
    parameters = parameters_of(name)
    if is_broken():
        for place in missing:
            parameters[place].grad = None
    norm = step(way, torch.optim.SGD(parameters, lr=0.1))
    own = [local_of(p.grad).double() for p in parameters if p.grad is not None]
    squares = torch.stack([torch.zeros((), dtype=torch.float64), *[(g * g).sum() for g in own]])
    after = squares.sum()
    torch.distributed.all_reduce(after)
    return norm, after.sqrt().item()


def step_with(way: str, max_norm: Any, norm_type: Any) -> Any:
    parameters = parameters_of("crossing meshes")
    wrong = {"max_norm": max_norm, "norm_type": norm_type} if is_broken() else {}
    try:
        step(way, torch.optim.SGD(parameters, lr=0.1), **wrong)
    finally:
        assert same_as(parameters, "crossing meshes")


def step_what_is_no_scaler(way: str) -> Any:
    parameters = parameters_of("fsdp")
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler: Any = 3 if is_broken() else None
    try:
        if way == "GradClipper":
            gradclip_ext.GradClipper(optimizer, 1.0).step(optimizer, scaler)
        else:
            gradclip_ext.clip_and_step(optimizer, 1.0, scaler=scaler)
    finally:
        assert same_as(parameters, "fsdp")


def iterate(function: str, with_groups: bool) -> Any:
    """An iterator that raises halfway, or at once where process groups are all that is known."""
    parameters = parameters_of("fsdp")
    if with_groups:
        parameters = [nn.Parameter(torch.ones(3))]
        parameters[0].grad = torch.ones(3)
    tensors = [p.grad for p in parameters] if function == "get_total_norm" else parameters

    def iterator() -> Any:
        for place, tensor in enumerate(tensors):
            if is_broken() and place == len(tensors) - 1:
                raise LookupError("the iterator broke")
            yield tensor

    arguments = [1.0] if function == "clip_grad_norm_" else []
    groups = {"process_groups": torch.distributed.group.WORLD} if with_groups else {}
    return getattr(gradclip_ext, function)(iterator(), *arguments, **groups)


def units(kind: str) -> Any:
    parameters = parameters_of("fsdp")
    kept = list(parameters)
    arguments: dict[str, Any] = {}
    if is_broken() and kind == "item":
        parameters[1] = 3
    elif is_broken():
        arguments = {"clip_factor": {"clip_factor": -1.0}, "eps": {"eps": "x"}}[kind]
    try:
        gradclip_ext.adaptive_clip_grad_(parameters, **{"clip_factor": 0.01, **arguments})
    finally:
        assert same_as(kept, "fsdp")


def other_orders(own: float, others: float) -> Any:
    parameters = parameters_of("crossing meshes")
    try:
        gradclip_ext.clip_grad_norm_(parameters, 1.0, own if is_broken() else others)
    finally:
        assert same_as(parameters, "crossing meshes")


def other_lengths(function: str, own: int, others: int, norm_type: float) -> Any:
    mesh = mixes.mesh_of(mixes.FLAT)
    parameters = []
    for _ in range(own if is_broken() else others):
        parameters.append(nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Shard(0)])))
        parameters[-1].grad = DTensor.from_local(torch.ones(2), mesh, [Shard(0)])
    if function == "grad_norms":
        return gradclip_ext.grad_norms(parameters, norm_type)
    return gradclip_ext.GradClipper(parameters, 1.0, norm_type=norm_type).clip_()


def other_dtypes() -> Any:
    """Of gradients that would be added up over ranks."""
    mesh = mixes.mesh_of(mixes.FLAT)
    parameters = []
    for dtype in (torch.float64 if is_broken() else torch.float32, torch.float32):
        weight = torch.ones(4, dtype=dtype)
        parameters.append(nn.Parameter(DTensor.from_local(weight, mesh, [Replicate()])))
        parameters[-1].grad = DTensor.from_local(weight.clone(), mesh, [Partial()])
    try:
        gradclip_ext.clip_grad_norm_(parameters, 1.0)
    finally:
        assert all(p.grad.to_local().eq(1.0).all() for p in parameters)


class LimitForEach(gradclip_ext.Threshold):
    """A rule that cannot follow other parameters."""

    per_parameter = True
    epsilon = 0.0

    def limits(self, total: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(norms)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def follow() -> Any:
    parameters = parameters_of("fsdp")
    module = nn.ParameterList(parameters)
    clipper = gradclip_ext.GradClipper(module, LimitForEach())
    clipper.clip_()
    if is_broken():
        module.append(nn.Parameter(torch.ones(2)))
    clipper.clip_()


def bad_groups_beside_dtensors(kind: str) -> Any:
    parameters = parameters_of("fsdp")
    groups: Any = torch.distributed.group.WORLD
    if is_broken():
        groups = {"none": [], "number": 3, "twice": [groups, groups]}[kind]
    try:
        gradclip_ext.clip_grad_norm_(parameters, 1.0, process_groups=groups)
    finally:
        assert same_as(parameters, "fsdp")


def without_a_value(kind: str) -> Any:
    """Arguments that only fail when they are used."""
    parameters = parameters_of("fsdp")
    wrong: dict[str, Any] = {}
    if is_broken():
        several = torch.ones(2)
        wrong = {
            "max_norm": {"max_norm": torch.ones((), device="meta")},
            "error_if_nonfinite": {"error_if_nonfinite": several},
        }[kind]
    try:
        gradclip_ext.clip_grad_norm_(
            parameters,
            **{"max_norm": 1.0, **wrong},
            process_groups=torch.distributed.group.WORLD,
        )
    finally:
        assert same_as(parameters, "fsdp")


def step_stages(overflow: bool) -> Any:
    """One rank also steps a parameter that is not clipped, so its clipper does not hand over."""
    clipped, spared = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    clipped.grad, spared.grad = torch.tensor([12.0, 16.0]), torch.tensor([4.0])
    if is_broken() and overflow:
        clipped.grad[0] = math.inf
    optimizer = torch.optim.SGD([clipped, spared] if is_broken() else [clipped], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    groups = torch.distributed.group.WORLD
    clipper = gradclip_ext.GradClipper([clipped], 0.5, process_groups=groups)
    norm = clipper.step(optimizer, scaler)
    scaler.update()
    return norm.item(), clipped.tolist(), scaler.get_scale()


def group_within_a_mesh() -> Any:
    """A group of a part of a mesh's only dimension: the mesh has counted its ranks."""
    parameters = parameters_of("fsdp")
    group = mixes.mesh_of("tp").get_group()
    norm = gradclip_ext.clip_grad_norm_(parameters, math.inf, process_groups=group)
    wholes = mixes.whole_gradients(mixes.MIXES["fsdp"])
    return norm.item(), torch.cat([whole.reshape(-1) for whole in wholes]).norm().item()


# In the test process.


def require_everywhere(answers: list[Any], kind: str, text: str) -> None:
    assert all(isinstance(answer, Failure) for answer in answers), answers
    for rank, answer in enumerate(answers):
        assert answer.kind == (kind if rank == BROKEN else "RuntimeError"), answer.trace
        assert text in answer.text, answer.text
        assert rank == BROKEN or f"rank {BROKEN} failed" in answer.text, answer.text


@pytest.mark.parametrize("way", STEPS)
@pytest.mark.parametrize(
    "name, missing", [("fsdp", [0, 1, 2, 3]), (EXPERTS, [0, 1]), (EXPERTS, [2, 3])]
)
def test_steps_of_ranks_without_gradients(world, name, missing, way):
    answers = world(2).outcomes(step_without, name, way, missing)
    if len(missing) == 4 and way in ("with a scaler", "GradClipper, scaler"):
        return require_everywhere(answers, "AssertionError", "No inf checks were recorded")
    assert len({norm for norm, _ in answers}) == 1, answers
    for _, after in answers:
        assert after == pytest.approx(1.0, rel=1e-5), answers
    return None


@pytest.mark.parametrize("way", STEPS[:3])
@pytest.mark.parametrize("argument", ["max_norm", "norm_type"])
def test_a_step_with_a_bad_argument(world, way, argument):
    wrong = (-1.0, 2.0) if argument == "max_norm" else (1.0, "two")
    kind, text = ("ValueError", "-1.0") if argument == "max_norm" else ("TypeError", "'two'")
    require_everywhere(world(2).outcomes(step_with, way, *wrong), kind, text)


@pytest.mark.parametrize("way", ["GradClipper", "clip_and_step"])
def test_a_step_with_what_is_no_scaler(world, way):
    answers = world(2).outcomes(step_what_is_no_scaler, way)
    require_everywhere(answers, "TypeError", "has to be a torch.amp.GradScaler")


@pytest.mark.parametrize("with_groups", [False, True])
@pytest.mark.parametrize("function", ["clip_grad_norm_", "get_total_norm", "grad_norms"])
def test_an_iterator_that_raises(world, function, with_groups):
    if function == "grad_norms" and not with_groups:
        pytest.skip("what it has given is not known")
    answers = world(2).outcomes(iterate, function, with_groups)
    require_everywhere(answers, "LookupError", "the iterator broke")


@pytest.mark.parametrize(
    "kind, error, text",
    [
        ("item", "TypeError", "parameters[1] has to be a torch.Tensor"),
        ("clip_factor", "ValueError", "-1.0"),
        ("eps", "TypeError", "'x'"),
    ],
)
def test_units_with_a_bad_argument(world, kind, error, text):
    require_everywhere(world(2).outcomes(units, kind), error, text)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "own, others", [(math.inf, 2.0), (2.0, math.inf), (0.0, 1.0), (-math.inf, 3.0)]
)
def test_another_order_on_one_rank(world, size, own, others):
    for answer in world(size).outcomes(other_orders, own, others):
        assert answer.kind == "RuntimeError" and "differently" in answer.text, answer


def test_an_order_that_is_wrong_on_one_rank_where_others_maximize(world):
    for rank, answer in enumerate(world(2).outcomes(other_orders, "two", math.inf)):
        assert answer.kind == ("TypeError" if rank == BROKEN else "RuntimeError"), answer
        assert "'two'" in answer.text, answer


@pytest.mark.parametrize("function", ["grad_norms", "GradClipper"])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("own, others", [(40, 3), (8, 9), (1, 300)])
def test_lists_of_other_lengths(world, function, norm_type, own, others):
    for answer in world(2).outcomes(other_lengths, function, own, others, norm_type):
        assert answer.kind == "RuntimeError" and "differently" in answer.text, answer


def test_partial_gradients_of_another_dtype(world):
    for answer in world(2).outcomes(other_dtypes):
        assert answer.kind == "RuntimeError" and "Partial" in answer.text, answer


def test_a_rule_that_cannot_follow_on_one_rank(world):
    require_everywhere(world(2).outcomes(follow), "ValueError", "cannot follow others")


@pytest.mark.parametrize(
    "kind, error, text",
    [
        ("none", "ValueError", "at least one group"),
        ("number", "TypeError", "found 3 (int)"),
        ("twice", "ValueError", "count twice"),
    ],
)
@pytest.mark.parametrize("size", [2, 4])
def test_bad_groups_beside_dtensors(world, size, kind, error, text):
    answers = world(size).outcomes(bad_groups_beside_dtensors, kind)
    require_everywhere(answers, error, text)


@pytest.mark.parametrize(
    "kind, error, text",
    [
        ("max_norm", "ValueError", "meta device"),
        ("error_if_nonfinite", "RuntimeError", "ambiguous"),
    ],
)
def test_arguments_without_a_value(world, kind, error, text):
    require_everywhere(world(2).outcomes(without_a_value, kind), error, text)


def test_stages_of_which_one_steps_more_than_it_clips(world):
    for norm, weights, scale in world(2).run(step_stages, False):
        assert norm == pytest.approx(50.0**0.5, rel=1e-6) and scale == 4.0
        factor = 0.5 / 50.0**0.5
        assert weights == pytest.approx([-3.0 * factor, -4.0 * factor], rel=1e-5)


def test_an_overflow_in_one_stage_skips_the_step_of_all(world):
    for norm, weights, scale in world(2).run(step_stages, True):
        assert norm == math.inf and weights == [0.0, 0.0] and scale == 2.0


def test_a_group_of_a_part_of_a_dimension(world):
    for norm, expected in world(4).run(group_within_a_mesh):
        assert norm == pytest.approx(expected, rel=1e-6)
