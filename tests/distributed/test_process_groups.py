"""Gradients that are split over process groups without being DTensors."""

from __future__ import annotations

import math
from typing import Any

import mixes
import pytest
import torch
from torch import Tensor, nn
from torch.distributed import new_group
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.debug import CommDebugMode
from worlds import Failure

import gradclip_ext
from gradclip_ext import AGC, AdaGC, AutoClip, GradClipper, ShardGroup

_groups: dict[tuple[tuple[int, ...], ...], Any] = {}


def rank() -> int:
    return torch.distributed.get_rank()


def group_of(*partition: tuple[int, ...]) -> Any:
    """This rank's group of several, which all ranks have to make together."""
    if partition not in _groups:
        made = [new_group(list(ranks)) for ranks in partition]
        _groups[partition] = next(
            group for group, ranks in zip(made, partition, strict=True) if rank() in ranks
        )
    return _groups[partition]


def tensor_parallel() -> Any:
    return group_of((0, 1), (2, 3))


def pipeline() -> Any:
    return group_of((0, 2), (1, 3))


def world_group() -> Any:
    return torch.distributed.group.WORLD


def parameter_with(gradient: Tensor, **attributes: Any) -> nn.Parameter:
    parameter = nn.Parameter(torch.full_like(gradient, 0.5))
    parameter.grad = gradient.clone()
    for name, value in attributes.items():
        setattr(parameter, name, value)
    return parameter


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm_of(tensors: list[Tensor], norm_type: float) -> float:
    return torch.linalg.vector_norm(
        torch.cat([t.flatten().double() for t in tensors]), norm_type
    ).item()


def require_scaled(parameters: list[Any], wholes: list[Tensor], norm: float) -> None:
    for parameter, whole in zip(parameters, wholes, strict=True):
        expected = (whole.double() / (norm + 1e-6)).float()
        torch.testing.assert_close(parameter.grad, expected, rtol=3e-7, atol=0.0)


# On the ranks.


def stages(norm_type: float, way: str) -> Any:
    """Each rank has other parameters, the last one none."""
    size = torch.distributed.get_world_size()
    all_wholes = [
        [numbers(10 * stage + place, 3, 2 + stage) for place in range(2)]
        for stage in range(size - 1)
    ]
    all_wholes.append([])
    wholes = all_wholes[rank()]
    parameters = [parameter_with(whole) for whole in wholes]
    expected = norm_of([whole for stage in all_wholes for whole in stage], norm_type)
    group = world_group()
    if way == "mesh":
        group = mixes.mesh_of(mixes.FLAT)
    if way == "get_total_norm":
        gradients = [parameter.grad for parameter in parameters]
        norm = gradclip_ext.get_total_norm(
            gradients, norm_type, process_groups=group, dtype=torch.float64
        )
    elif way == "grad_norms":
        norm, each, names = gradclip_ext.grad_norms(parameters, norm_type, process_groups=group)
        assert len(names) == len(parameters)
        own = [norm_of([whole], norm_type) for whole in wholes]
        assert each.tolist() == pytest.approx(own, rel=1e-6)
    elif way == "GradClipper":
        clipper = GradClipper(parameters, 1.0, norm_type=norm_type, process_groups=[group])
        norm = clipper.clip_()
        assert clipper.report().total_norm == norm.item()
        assert clipper.report().clipped_steps == 1
    else:
        norm = gradclip_ext.clip_grad_norm_(
            parameters, 1.0, norm_type, process_groups=group, dtype=torch.float64
        )
    assert type(norm) is Tensor
    if way not in ("get_total_norm", "grad_norms"):
        require_scaled(parameters, wholes, expected)
    return norm.item().hex(), expected


def megatron(orders: str) -> Any:
    """Two stages; in each, tensors split over two ranks and copies on both."""
    stage, part = divmod(rank(), 2)
    split = [numbers(100 * s + 7, 4, 6) for s in range(2)]
    copies = [numbers(100 * s + 8, 5) for s in range(2)]
    wholes = [split[stage].chunk(2)[part], copies[stage]]
    parameters = [
        parameter_with(wholes[0], tensor_model_parallel=True),
        parameter_with(wholes[1]),
    ]
    tensor_group = ShardGroup(
        tensor_parallel(), lambda p: not getattr(p, "tensor_model_parallel", False)
    )
    groups: list[Any] = [tensor_group, pipeline()]
    if orders == "reversed" or (orders == "one differs" and rank() == 0):
        groups.reverse()
    with CommDebugMode() as counter:
        norm = gradclip_ext.clip_grad_norm_(
            parameters, 1.0, process_groups=groups, dtype=torch.float64
        )
    counted = {str(name): count for name, count in counter.get_comm_counts().items()}
    assert counted == {"c10d_functional.all_reduce": 2}, counted
    expected = norm_of([*split, *copies], 2.0)
    require_scaled(parameters, wholes, expected)
    return norm.item().hex(), expected


def stages_with_partial_gradients() -> Any:
    """Stages on meshes of their own, only one of which has gradients that are partial."""
    stage = torch.distributed.get_rank() // 2
    mixes_of_stages = [
        [mixes.Entry((4, 2), "tp", (mixes.S0,)), mixes.Entry((3,), "tp", (mixes.P,))],
        [mixes.Entry((6, 2), "tp", (mixes.S1,))],
    ]
    wholes = [mixes.whole_gradients(entries, seed) for seed, entries in enumerate(mixes_of_stages)]
    parameters = mixes.parameters_of(mixes_of_stages[stage], wholes[stage])
    found = []
    for norm_type in (2.0, math.inf):
        norm = gradclip_ext.get_total_norm(
            [p.grad for p in parameters], norm_type, process_groups=pipeline(), dtype=torch.float64
        )
        found.append((norm.item().hex(), norm_of([*wholes[0], *wholes[1]], norm_type)))
    return found


def beside_dtensors(group_name: str) -> Any:
    """DTensors whose mesh holds the group count once, plain tensors are parts over the group."""
    entries = mixes.MIXES["fsdp and tensor parallel"]
    wholes = mixes.whole_gradients(entries)
    parameters = mixes.parameters_of(entries, wholes)
    parts = [numbers(50 + r, 3) for r in range(4)]
    parameters.append(parameter_with(parts[rank()]))
    if group_name == "world":
        group, counted = world_group(), parts
    else:
        # Copies on the ranks of the other dimension, whose first is counted.
        group, counted = mixes.mesh_of("tp"), parts[:2]
    norm = gradclip_ext.clip_grad_norm_(
        parameters, math.inf, process_groups=group, dtype=torch.float64
    )
    assert type(norm) is Tensor
    return norm.item().hex(), norm_of([*wholes, *counted], 2.0)


def smaller_mesh() -> Any:
    """DTensors over two ranks, and two such pairs: a group of all ranks adds the pairs up."""
    pair = rank() // 2
    wholes = [numbers(60 + p, 4, 2) for p in range(2)]
    copies = [numbers(70 + p, 3) for p in range(2)]
    mesh = mixes.mesh_of("tp")
    local = wholes[pair].chunk(2)[rank() % 2]
    gradient = DTensor.from_local(local.clone(), mesh, [mixes.S0], run_check=False)
    copy = DTensor.from_local(copies[pair].clone(), mesh, [Replicate()], run_check=False)
    parameters = [nn.Parameter(torch.zeros_like(gradient)), nn.Parameter(torch.zeros_like(copy))]
    parameters[0].grad, parameters[1].grad = gradient, copy
    totals = [
        gradclip_ext.clip_grad_norm_(
            parameters, math.inf, norm_type, process_groups=group, dtype=torch.float64
        )
        for group in (world_group(), pipeline())
        for norm_type in (2.0, math.inf)
    ]
    expected = [norm_of([*wholes, *copies], norm_type) for norm_type in (2.0, math.inf)] * 2
    return [total.item().hex() for total in totals], expected


def clipper_of_stages(rule: str) -> Any:
    """The same decisions on all ranks, the one without parameters included."""
    size = torch.distributed.get_world_size()
    rules = {"number": lambda: 2.0, "AutoClip": lambda: AutoClip(50.0)}
    parameters = [] if rank() == size - 1 else [parameter_with(numbers(rank(), 4))]
    clipper = GradClipper(
        parameters, rules[rule](), nonfinite="skip", skip_above=1e3, process_groups=world_group()
    )
    found = []
    for step in range(6):
        for parameter in parameters:
            parameter.grad = numbers(10 * step + rank(), 4) * (1 + step)
            if step == 3 and rank() == 0:
                parameter.grad[0] = math.nan
            if step == 4 and rank() == 1:
                parameter.grad[0] = 1e6
        clipper.clip_()
        report = clipper.report()
        found.append((report.total_norm.hex(), report.limits, clipper.found_inf.item()))
    state = clipper.state_dict()
    state.pop("names")
    return found, str(state)


def refuse(kind: str) -> Any:
    parameters = [parameter_with(torch.ones(2))]
    wrong: dict[str, Any] = {
        "type": lambda: 3,
        "no groups": list,
        "no groups in a tuple": tuple,
        "twice": lambda: [tensor_parallel(), tensor_parallel()],
        "two dimensions": lambda: mixes.mesh_of(mixes.GRID),
        "predicate": lambda: ShardGroup(tensor_parallel(), replicated=True),
        "not a member": lambda: torch.distributed.GroupMember.NON_GROUP_MEMBER,
    }
    gradclip_ext.clip_grad_norm_(parameters, 1.0, process_groups=wrong[kind]())


def refuse_rule(kind: str) -> None:
    rule = AdaGC() if kind == "AdaGC" else AGC()
    GradClipper([parameter_with(torch.ones(2))], rule, process_groups=world_group())


def fail_in_a_group(kind: str) -> Any:
    parameters: list[Any] = [parameter_with(torch.ones(2))]
    options: dict[str, Any] = {}
    if rank() == 1:
        if kind == "predicate":
            options["replicated"] = lambda parameter: parameter.missing
        elif kind == "no tensor":
            parameters.append(3)
    group = ShardGroup(world_group(), **options)
    own = -1.0 if rank() == 1 and kind == "argument" else 1.0
    gradclip_ext.clip_grad_norm_(parameters, own, process_groups=group)


def fail_in_the_list(function: str) -> Any:
    given: Any = [parameter_with(torch.ones(2))]
    before = given[0].grad
    if rank() == 1:
        given = 3 if function == "grad_norms" else (1 / 0 for _ in given)
    try:
        if function == "clip_grad_norm_":
            gradclip_ext.clip_grad_norm_(given, 1.0, math.inf, process_groups=world_group())
        elif function == "get_total_norm":
            given = [p.grad for p in given] if rank() != 1 else given
            gradclip_ext.get_total_norm(given, process_groups=world_group())
        else:
            gradclip_ext.grad_norms(given, process_groups=world_group())
    finally:
        assert before.tolist() == [1.0, 1.0]


def groups_of_one_rank() -> Any:
    own = group_of((0,), (1,))
    parameter = parameter_with(torch.full((4,), 3.0))
    groups = [own, ShardGroup(own), world_group()]
    found = gradclip_ext.clip_grad_norm_([parameter], 1.0, process_groups=groups).item()
    alone = gradclip_ext.clip_grad_norm_([parameter], math.inf, process_groups=[own, own]).item()
    return found, alone


def nested(is_first: bool, norm_type: float) -> Any:
    """A group within another: each rank is counted once."""
    part, whole = mixes.mesh_of("tp").get_group(), torch.distributed.group.WORLD
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([float(torch.distributed.get_rank() + 1)])
    groups = [part, whole] if is_first else [whole, part]
    norm = gradclip_ext.clip_grad_norm_([parameter], math.inf, norm_type, process_groups=groups)
    norms = gradclip_ext.grad_norms([parameter], norm_type, process_groups=groups)
    assert norms.total.item() == pytest.approx(norm.item(), rel=1e-6)
    return norm.item()


# In the test process.


@pytest.mark.parametrize(
    "way", ["clip_grad_norm_", "mesh", "get_total_norm", "grad_norms", "GradClipper"]
)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0])
@pytest.mark.parametrize("size", [2, 4])
def test_pipeline(world, size, norm_type, way):
    answers = world(size).run(stages, norm_type, way)
    assert len({found for found, _ in answers}) == 1
    found, expected = answers[0]
    assert float.fromhex(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("orders", ["", "reversed"])
def test_megatron(world, orders):
    answers = world(4).run(megatron, orders)
    assert len({found for found, _ in answers}) == 1
    assert float.fromhex(answers[0][0]) == pytest.approx(answers[0][1], rel=1e-6)


def test_groups_in_another_order_on_one_rank(world):
    for answer in world(4).outcomes(megatron, "one differs"):
        assert isinstance(answer, Failure) and "called it differently" in answer.text, answer
        assert "order" in answer.text


def test_stages_of_which_one_has_partial_gradients(world):
    answers = world(4).run(stages_with_partial_gradients)
    assert all(answer == answers[0] for answer in answers)
    for found, expected in answers[0]:
        assert float.fromhex(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("group", ["world", "tp"])
def test_a_group_that_a_mesh_contains(world, group):
    answers = world(4).run(beside_dtensors, group)
    assert len({found for found, _ in answers}) == 1
    assert float.fromhex(answers[0][0]) == pytest.approx(answers[0][1], rel=1e-6)


def test_a_group_around_a_mesh(world):
    answers = world(4).run(smaller_mesh)
    assert all(found == answers[0][0] for found, _ in answers)
    assert [float.fromhex(n) for n in answers[0][0]] == pytest.approx(answers[0][1], rel=1e-6)


@pytest.mark.parametrize("rule", ["number", "AutoClip"])
@pytest.mark.parametrize("size", [2, 4])
def test_decisions(world, size, rule):
    answers = world(size).run(clipper_of_stages, rule)
    assert all(answer == answers[0] for answer in answers)
    assert [flag for _, _, flag in answers[0][0]] == [0.0, 0.0, 0.0, 1.0, float(size > 2), 0.0]


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        (
            "type",
            "TypeError",
            "process_groups has to be a ProcessGroup, a DeviceMesh or a ShardGroup",
        ),
        ("no groups", "ValueError", "at least one group"),
        ("no groups in a tuple", "ValueError", "at least one group"),
        ("twice", "ValueError", "process_groups[0] and process_groups[1] have the same ranks"),
        ("two dimensions", "ValueError", "mesh of one dimension, found one of 2"),
        ("predicate", "TypeError", "process_groups.replicated has to be a function"),
        ("not a member", "ValueError", "has to contain this rank, 0"),
    ],
)
def test_bad_groups(world, kind, error, text):
    answer = world(4).outcomes(refuse, kind)[0]
    assert answer.kind == error and text in answer.text, answer


@pytest.mark.parametrize("kind", ["AdaGC", "AGC"])
def test_rules_that_need_whole_parameters(world, kind):
    for answer in world(2).outcomes(refuse_rule, kind):
        assert answer.kind == "ValueError" and f"{kind} needs whole parameters" in answer.text


@pytest.mark.parametrize("kind", ["predicate", "no tensor", "argument"])
def test_a_failure_reaches_all(world, kind):
    for number, answer in enumerate(world(4).outcomes(fail_in_a_group, kind)):
        assert isinstance(answer, Failure), answer
        assert number == 1 or "rank 1 failed" in answer.text


@pytest.mark.parametrize("function", ["clip_grad_norm_", "get_total_norm", "grad_norms"])
def test_a_failure_of_the_list_itself_reaches_all(world, function):
    for answer in world(2).outcomes(fail_in_the_list, function):
        assert isinstance(answer, Failure), answer
        reason = "found 3 (int)" if function == "grad_norms" else "division by zero"
        assert reason in answer.text and "rank 1" in answer.text, answer.text


def test_groups_of_one_rank(world):
    """A trainer whose parallel dimensions are all 1 has several with the same rank."""
    for found, alone in world(2).run(groups_of_one_rank):
        assert found == pytest.approx(math.sqrt(72.0), rel=1e-6)
        assert alone == pytest.approx(1.0 / math.sqrt(2.0), rel=1e-5)


def test_without_an_initialized_process_group():
    parameter = parameter_with(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"torch\.distributed, which is not initialized"):
        gradclip_ext.clip_grad_norm_([parameter], 1.0, process_groups=ShardGroup(None))
    assert parameter.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("norm_type, expected", [(1.0, 10.0), (2.0, 30.0**0.5), (math.inf, 4.0)])
def test_a_group_within_another(world, is_first, norm_type, expected):
    for found in world(4).run(nested, is_first, norm_type):
        assert found == pytest.approx(expected, rel=1e-6)
