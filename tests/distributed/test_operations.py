"""What else works on DTensors: clamping, the textbooks' names, fused steps, results."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import mixes
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import gradclip_ext


def norm_of(wholes: list[Any]) -> float:
    return torch.cat([whole.flatten().double() for whole in wholes]).norm().item()


# On the ranks.


def clamp(name: str) -> Any:
    wholes = mixes.whole_gradients(mixes.MIXES[name])
    parameters = mixes.parameters_of(mixes.MIXES[name], wholes)
    versions = [parameter.grad._version for parameter in parameters]
    gradclip_ext.clip_grad_value_(parameters, 8.0)
    for parameter, whole, version in zip(parameters, wholes, versions, strict=True):
        assert torch.equal(mixes.whole_of(parameter.grad), whole.clamp(-8.0, 8.0))
        assert parameter.grad._version > version


def clamp_partial() -> Any:
    entries = mixes.MIXES["partial only"]
    gradclip_ext.clip_grad_value_(mixes.parameters_of(entries, mixes.whole_gradients(entries)), 8.0)


def result(name: str) -> Any:
    """The norm is a replicated DTensor where all gradients have one mesh, as torch's is."""
    wholes = mixes.whole_gradients(mixes.MIXES[name])
    parameters = mixes.parameters_of(mixes.MIXES[name], wholes)
    found = []
    for norm_type in (2.0, math.inf):
        norm = gradclip_ext.clip_grad_norm_(parameters, math.inf, norm_type)
        assert norm.dtype == torch.promote_types(*[whole.dtype for whole in [*wholes, *wholes][:2]])
        is_replicated = isinstance(norm, DTensor) and all(p == Replicate() for p in norm.placements)
        number = norm.full_tensor() if isinstance(norm, DTensor) else norm
        found.append((isinstance(norm, DTensor), is_replicated, number.item() == float(norm)))
    return found


def versions(quiet: bool) -> Any:
    wholes = mixes.whole_gradients(mixes.MIXES["beside plain tensors"])
    parameters = mixes.parameters_of(mixes.MIXES["beside plain tensors"], wholes)
    before = [parameter.grad._version for parameter in parameters]
    objects = [parameter.grad for parameter in parameters]
    gradclip_ext.clip_grad_norm_(parameters, 1e9 if quiet else 1.0)
    assert all(
        parameter.grad is gradient for parameter, gradient in zip(parameters, objects, strict=True)
    )
    if quiet:
        for parameter, whole in zip(parameters, wholes, strict=True):
            assert torch.equal(mixes.whole_of(parameter.grad), whole)
    return [
        parameter.grad._version > version
        for parameter, version in zip(parameters, before, strict=True)
    ]


def some_without_gradients(kind: str) -> Any:
    """Of all gradients of a rank, of some of them, in another order."""
    entries = mixes.MIXES["crossing meshes"]
    wholes = mixes.whole_gradients(entries)
    own = torch.distributed.get_rank()
    missing = {
        "all of one rank": lambda place: own == 1,
        "all of all ranks": lambda place: True,
        "one of all ranks": lambda place: place == 1,
        "order": lambda place: False,
    }[kind]
    parameters = mixes.parameters_of(entries, wholes, missing)
    if kind == "order" and own % 2:
        parameters.reverse()
    norm = gradclip_ext.clip_grad_norm_(parameters, math.inf, dtype=torch.float64)
    norms = gradclip_ext.grad_norms(parameters) if kind != "order" else None
    return norm.item(), norms and norms.total.item(), norms and norms.norms.tolist()


def project() -> Any:
    wholes = mixes.whole_gradients(mixes.MIXES["fsdp"])
    parameters = mixes.parameters_of(mixes.MIXES["fsdp"], wholes)
    expected = norm_of(wholes)
    gradclip_ext.grad_clipping(SimpleNamespace(params=parameters), 1.0)
    for parameter, whole in zip(parameters, wholes, strict=True):
        torch.testing.assert_close(
            mixes.whole_of(parameter.grad), (whole.double() / expected).float(), rtol=3e-7, atol=0.0
        )


def decay(name: str) -> Any:
    wholes = mixes.whole_gradients(mixes.MIXES[name])
    parameters = mixes.parameters_of(mixes.MIXES[name], wholes)
    gradclip_ext.add_weight_decay_(parameters, 0.5)
    for parameter, whole in zip(parameters, wholes, strict=True):
        assert torch.equal(mixes.whole_of(parameter.grad), whole + 0.25)


def step(optimizer: str, fused: bool) -> Any:
    wholes = mixes.whole_gradients(mixes.MIXES["fsdp"])
    parameters = mixes.parameters_of(mixes.MIXES["fsdp"], wholes)
    plain = [torch.nn.Parameter(torch.full_like(whole, 0.5)) for whole in wholes]
    for parameter, whole in zip(plain, wholes, strict=True):
        parameter.grad = whole.clone()
    kind = getattr(torch.optim, optimizer)
    total = gradclip_ext.clip_and_step(kind(parameters, lr=0.1, fused=fused), 1.0)
    torch.nn.utils.clip_grad_norm_(plain, 1.0)
    kind(plain, lr=0.1).step()
    for parameter, expected in zip(parameters, plain, strict=True):
        torch.testing.assert_close(
            mixes.whole_of(parameter.detach()), expected.detach(), rtol=2e-6, atol=1e-7
        )
    return float(total.full_tensor() if isinstance(total, DTensor) else total), norm_of(wholes)


def unscale(way: str, overflow: str) -> Any:
    """An overflow on one rank skips the step on all of them."""
    entries = mixes.MIXES["fsdp"]
    wholes = mixes.whole_gradients(entries)
    parameters = mixes.parameters_of(entries, [whole * 1024.0 for whole in wholes])
    if overflow and torch.distributed.get_rank() == 1:
        parameters[0].grad.to_local().view(-1)[0] = float(overflow)
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=way == "fused")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    if way in ("fused", "unfused"):
        norm = gradclip_ext.clip_and_step(optimizer, 1.0, scaler=scaler)
    elif way == "GradClipper":
        clipper = gradclip_ext.GradClipper(parameters, 1.0)
        norm = clipper.step(optimizer, scaler)
    else:
        norm = gradclip_ext.unscale_and_clip_grad_norm_(scaler, optimizer, 1.0)
        scaler.step(optimizer)
    scaler.update()
    changed = [
        not torch.equal(p.detach().to_local(), torch.full_like(p.to_local(), 0.5))
        for p in parameters
    ]
    plain = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return any(changed), scaler.get_scale(), repr(plain.item()), norm_of(wholes)


def largest_of_tensors() -> Any:
    """A limit in a tensor or a DTensor."""
    entries = mixes.MIXES["fsdp"]
    wholes = mixes.whole_gradients(entries)
    mesh = mixes.mesh_of(mixes.FLAT)
    limit = torch.tensor(2.0)
    replicated = DTensor.from_local(limit, mesh, [Replicate()], run_check=False)
    for max_norm in (limit, replicated):
        parameters = mixes.parameters_of(entries, wholes)
        gradclip_ext.clip_grad_norm_(parameters, max_norm)
        found = norm_of([mixes.whole_of(parameter.grad) for parameter in parameters])
        assert found == pytest.approx(2.0, rel=1e-6)


def drifted() -> Any:
    """Copies that are no longer the same: the first rank's count, and a NaN of any rank."""
    entries = [
        mixes.Entry((4,), mixes.FLAT, (mixes.R,)),
        mixes.Entry((3,), mixes.FLAT, (mixes.S0,)),
    ]
    own = torch.distributed.get_rank()
    found = []
    for value in (float(own + 1), math.nan if own == 1 else 1.0, math.inf if own == 1 else 1.0):
        parameters = mixes.parameters_of(entries, [torch.ones(4), torch.zeros(3)])
        parameters[0].grad.to_local().fill_(value)
        for norm_type in (2.0, math.inf):
            norm = gradclip_ext.get_total_norm(
                [parameter.grad for parameter in parameters], norm_type, dtype=torch.float64
            )
            found.append(repr(norm.full_tensor().item()))
    return found


def beside_meshes_of_groups() -> Any:
    """A plain tensor beside meshes of two groups, of which each rank knows only its own."""
    own = torch.distributed.get_rank()
    rows = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    columns = [torch.distributed.new_group([0, 2]), torch.distributed.new_group([1, 3])]
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    parameters[0].grad = torch.tensor([3.0, 4.0])
    for group, place in ((rows[own // 2], own % 2), (columns[own % 2], own // 2)):
        mesh = DeviceMesh.from_group(group, "cpu")
        part = torch.tensor([[12.0], [0.0]][place])
        weight = DTensor.from_local(torch.zeros(1), mesh, [Shard(0)])
        parameters.append(torch.nn.Parameter(weight))
        parameters[-1].grad = DTensor.from_local(part, mesh, [Shard(0)])
    return [
        repr(gradclip_ext.clip_grad_norm_(parameters, math.inf, order).item())
        for order in (1.0, math.inf, 2.0)
    ]


def reversed_on_some(name: str) -> Any:
    """The list in another order on some ranks, whose meshes and groups come in it as well."""
    entries = mixes.MIXES[name]
    wholes = mixes.whole_gradients(entries)
    parameters = mixes.parameters_of(entries, wholes)
    if torch.distributed.get_rank() in (1, 2):
        parameters.reverse()
    norms = [
        gradclip_ext.clip_grad_norm_(parameters, math.inf, order).item()
        for order in (2.0, math.inf)
    ]
    return norms, [norm_of(wholes), max(whole.abs().max().item() for whole in wholes)]


def nan_among_numbers(sign: float) -> Any:
    """A NaN on one rank, in the norms that are maxima and minima over ranks."""
    entries = mixes.MIXES["fsdp"]
    parameters = mixes.parameters_of(entries, mixes.whole_gradients(entries))
    if torch.distributed.get_rank() == 1:
        parameters[0].grad.to_local().view(-1)[0] = math.copysign(math.nan, sign)
    gradients = [parameter.grad for parameter in parameters]
    norms = [gradclip_ext.get_total_norm(gradients, order) for order in (math.inf, -math.inf)]
    return [repr(norm.full_tensor().item()) for norm in norms]


def copies_in_a_group(same: bool) -> Any:
    """A plain tensor beside a mesh whose ranks are also a group, of which it is split or a copy."""
    weight = mixes.parameters_of([mixes.Entry((4,), mixes.FLAT, (mixes.S0,))], [torch.zeros(4)])
    plain = torch.nn.Parameter(torch.zeros(2))
    plain.grad = torch.tensor([3.0, 4.0])
    group = gradclip_ext.ShardGroup(torch.distributed.group.WORLD, lambda _: same)
    return gradclip_ext.clip_grad_norm_([*weight, plain], math.inf, process_groups=group).item()


# In the test process.


@pytest.mark.parametrize(
    "name", ["fsdp", "hsdp", "fsdp and tensor parallel", "beside plain tensors"]
)
def test_clamp(world, name):
    world(4).run(clamp, name)


def test_clamp_refuses_partial_gradients(world):
    for answer in world(2).outcomes(clamp_partial):
        assert answer.kind == "NotImplementedError" and "added up over its ranks" in answer.text


@pytest.mark.parametrize(
    ("name", "is_dtensor"),
    [("fsdp", True), ("hsdp", True), ("beside plain tensors", False), ("crossing meshes", False)],
)
def test_kind_of_the_result(world, name, is_dtensor):
    assert world(4).run(result, name) == [[(is_dtensor, is_dtensor, True)] * 2] * 4


@pytest.mark.parametrize("quiet", [True, False])
def test_versions(world, quiet):
    assert world(2).run(versions, quiet) == [[True] * 3] * 2


@pytest.mark.parametrize(
    "kind", ["all of one rank", "all of all ranks", "one of all ranks", "order"]
)
def test_ranks_without_gradients(world, kind):
    answers = world(4).run(some_without_gradients, kind)
    assert all(answer == answers[0] for answer in answers)
    wholes = mixes.whole_gradients(mixes.MIXES["crossing meshes"])
    total, again, _ = answers[0]
    if kind == "one of all ranks":
        del wholes[1]
    if kind == "all of all ranks":
        assert total == again == 0.0
    elif kind != "all of one rank":
        assert total == pytest.approx(norm_of(wholes), rel=1e-6)
    else:
        # What that rank would have held is missing, and nothing else.
        assert 0.0 < total == again < norm_of(wholes)


def test_grad_clipping(world):
    world(4).run(project)


@pytest.mark.parametrize("name", ["fsdp", "hsdp", "fsdp and tensor parallel", "sequence parallel"])
def test_weight_decay(world, name):
    world(4).run(decay, name)


@pytest.mark.parametrize(
    ("optimizer", "fused"), [("Adam", True), ("AdamW", True), ("SGD", False), ("AdamW", False)]
)
def test_clip_and_step(world, optimizer, fused):
    for found, expected in world(2).run(step, optimizer, fused):
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("overflow", ["", "nan", "inf"])
@pytest.mark.parametrize("way", ["fused", "unfused", "GradClipper", "unscale_and_clip"])
def test_with_a_scaler(world, way, overflow):
    answers = world(2).run(unscale, way, overflow)
    assert answers[0] == answers[1]
    changed, scale, norm, expected = answers[0]
    if overflow:
        assert not changed and scale == 512.0
    else:
        assert changed and scale == 1024.0
        assert float(norm) == pytest.approx(expected, rel=1e-6)


def test_a_limit_in_a_tensor(world):
    world(2).run(largest_of_tensors)


def test_copies_that_have_drifted(world):
    answers = world(4).run(drifted)
    assert all(answer == answers[0] for answer in answers)
    assert answers[0] == ["2.0", "1.0", "nan", "nan", "nan", "inf"]


def test_plain_tensors_beside_meshes_of_groups(world):
    for found in world(4).run(beside_meshes_of_groups):
        assert list(map(float, found)) == [31.0, 12.0, pytest.approx(math.sqrt(313.0))]


@pytest.mark.parametrize("name", ["crossing meshes", "expert parallel beside data parallel"])
def test_lists_in_another_order(world, name):
    for norms, expected in world(4).run(reversed_on_some, name):
        assert norms == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_among_numbers(world, sign):
    for norms in world(4).run(nan_among_numbers, sign):
        assert norms == ["nan", "nan"]


@pytest.mark.parametrize("same, expected", [(True, 5.0), (False, 10.0)])
def test_copies_in_a_group_of_a_mesh(world, same, expected):
    assert world(4).run(copies_in_a_group, same) == [pytest.approx(expected)] * 4
