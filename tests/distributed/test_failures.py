"""What fails on one rank raises on all of them, within seconds and with nothing changed."""

from __future__ import annotations

import math
from typing import Any

import mixes
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from worlds import Failure

import gradclip_ext

BROKEN = 1
NAMES = ["fsdp", "partial", "crossing meshes", "beside plain tensors"]


class Raising(nn.Parameter):
    """One whose gradient cannot be read."""

    @property
    def grad(self) -> Tensor:
        raise LookupError("the gradient was lost")


def integers() -> Tensor:
    tensor = torch.zeros(3, dtype=torch.int64)
    tensor.grad = torch.ones(3, dtype=torch.int64)
    return tensor


def with_gradient(gradient: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(gradient.shape, device=gradient.device))
    parameter.grad = gradient
    return parameter


def freed() -> nn.Parameter:
    parameter = with_gradient(torch.ones(3))
    parameter.grad.untyped_storage().resize_(0)
    return parameter


# What is appended to the list of one rank, where others have a sound parameter; what its error is,
# and what all ranks say of it.
APPENDED = {
    "integer gradient": (integers, "TypeError", "found torch.int64"),
    "no tensor": (lambda: 3, "TypeError", "found 3 (int)"),
    "none": (lambda: None, "TypeError", "found None"),
    "raising property": (lambda: Raising(torch.zeros(3)), "LookupError", "the gradient was lost"),
    "expanded": (lambda: with_gradient(torch.ones(1).expand(3)), "RuntimeError", "single memory"),
    "freed": (freed, "RuntimeError", "has no memory"),
    "meta": (lambda: with_gradient(torch.ones(3, device="meta")), "RuntimeError", "meta device"),
}
ARGUMENTS = {
    "negative max_norm": ({"max_norm": -1.0}, "ValueError", "found -1.0"),
    "max_norm of another type": ({"max_norm": "one"}, "TypeError", "'one'"),
    "norm_type": ({"norm_type": "two"}, "TypeError", "'two'"),
    "dtype": ({"dtype": torch.int32}, "TypeError", "int32"),
}


def snapshot(parameters: list[Any]) -> list[Tensor]:
    gradients = [p.grad for p in parameters if type(p) is not Raising and isinstance(p, Tensor)]
    locals_ = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    return [g.clone() for g in locals_ if g.untyped_storage().nbytes() > 0 and not g.is_meta]


def require_same(before: list[Tensor], after: list[Tensor]) -> None:
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)


# On the ranks.


def append(name: str, function: str, kind: str, norm_type: float) -> Any:
    entries = mixes.MIXES[name]
    parameters: list[Any] = mixes.parameters_of(entries, mixes.whole_gradients(entries))
    is_broken = torch.distributed.get_rank() == BROKEN
    parameters.append(APPENDED[kind][0]() if is_broken else with_gradient(torch.ones(3)))
    before = snapshot(parameters)
    try:
        if function == "clip_grad_norm_":
            gradclip_ext.clip_grad_norm_(parameters, 1.0, norm_type)
        elif function == "GradClipper":
            parameters[-1] = parameters[-1] if is_broken else with_gradient(torch.ones(3))
            gradclip_ext.GradClipper(parameters, 1.0, norm_type=norm_type).clip_()
        else:
            gradclip_ext.grad_norms(parameters, norm_type)
    finally:
        require_same(before, snapshot(parameters))


def argue(name: str, kind: str) -> Any:
    entries = mixes.MIXES[name]
    parameters = mixes.parameters_of(entries, mixes.whole_gradients(entries))
    before = snapshot(parameters)
    own = ARGUMENTS[kind][0] if torch.distributed.get_rank() == BROKEN else {}
    try:
        gradclip_ext.clip_grad_norm_(parameters, **{"max_norm": 1.0, **own})
    finally:
        require_same(before, snapshot(parameters))


def nonfinite(name: str, norm_type: float, value: float, way: str) -> Any:
    entries = mixes.MIXES[name]
    parameters = mixes.parameters_of(entries, mixes.whole_gradients(entries))
    if torch.distributed.get_rank() == BROKEN:
        parameters[0].grad.to_local().view(-1)[0] = value
    before = snapshot(parameters)
    try:
        if way == "function":
            gradclip_ext.clip_grad_norm_(parameters, 1.0, norm_type, error_if_nonfinite=True)
        elif way == "get_total_norm":
            gradients = [parameter.grad for parameter in parameters]
            gradclip_ext.get_total_norm(gradients, norm_type, error_if_nonfinite=True)
        else:
            gradclip_ext.GradClipper(
                parameters, 1.0, norm_type=norm_type, nonfinite="raise"
            ).clip_()
    finally:
        require_same(before, snapshot(parameters))


def unknown_partial() -> Any:
    mesh = mixes.mesh_of(mixes.FLAT)
    parameter = nn.Parameter(
        DTensor.from_local(torch.zeros(3), mesh, [Replicate()], run_check=False)
    )
    parameter.grad = DTensor.from_local(torch.ones(3), mesh, [Partial("max")], run_check=False)
    gradclip_ext.clip_grad_norm_([parameter], 1.0)


def partial_on_some() -> Any:
    mesh = mixes.mesh_of(mixes.FLAT)
    parameter = nn.Parameter(
        DTensor.from_local(torch.zeros(3), mesh, [Replicate()], run_check=False)
    )
    if torch.distributed.get_rank() != BROKEN:
        parameter.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)
    before = None if parameter.grad is None else parameter.grad.to_local().clone()
    try:
        gradclip_ext.clip_grad_norm_([parameter], 1.0)
    finally:
        if before is not None:
            assert torch.equal(parameter.grad.to_local(), before)


def different_orders() -> Any:
    entries = mixes.MIXES["fsdp"]
    parameters = mixes.parameters_of(entries, mixes.whole_gradients(entries))
    order = 3.0 if torch.distributed.get_rank() == BROKEN else 2.0
    gradclip_ext.clip_grad_norm_(parameters, 1.0, order)


def different_lists(function: str) -> Any:
    """One rank lists a parameter less than the others."""
    entries = mixes.MIXES["beside plain tensors"]
    parameters = mixes.parameters_of(entries, mixes.whole_gradients(entries))
    if torch.distributed.get_rank() == BROKEN:
        parameters = parameters[:-1]
    if function == "grad_norms":
        gradclip_ext.grad_norms(parameters)
    else:
        gradclip_ext.GradClipper(parameters, 1.0).clip_()


def outside(beside: bool) -> Any:
    """A mesh of the first two ranks, on four; with ``beside`` also a mesh of all."""
    mesh = torch.distributed.device_mesh.DeviceMesh("cpu", [0, 1])
    local = torch.full((2,), 3.0)
    gradient = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=(4,), stride=(1,))
    parameter = nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient
    parameters = [parameter]
    if beside:
        parameters += mixes.parameters_of(
            [mixes.Entry((4,), mixes.FLAT, (mixes.S0,))], [torch.ones(4)]
        )
    norm = gradclip_ext.clip_grad_norm_(parameters, 1.0)
    return norm.full_tensor().item() if isinstance(norm, DTensor) else norm.item()


def two_devices() -> Any:
    from gradclip_ext._ops import meshes

    entries = mixes.MIXES["crossing meshes"]
    parameters = mixes.parameters_of(entries, mixes.whole_gradients(entries))
    known = meshes.read_mesh(mixes.mesh_of(mixes.OTHER))
    place = id(mixes.mesh_of(mixes.OTHER))
    before = meshes._known[place]
    meshes._known[place] = (before[0], known._replace(device_type="cuda"))
    try:
        gradclip_ext.clip_grad_norm_(parameters, 1.0)
    finally:
        meshes._known[place] = before


def fail_then_work() -> Any:
    """After an error that all ranks have seen, the next call works."""
    entries = mixes.MIXES["fsdp"]
    wholes = mixes.whole_gradients(entries)
    parameters = mixes.parameters_of(entries, wholes)
    texts = []
    for attempt in range(3):
        failing = torch.distributed.get_rank() == attempt % 2
        try:
            gradclip_ext.clip_grad_norm_(parameters, -float(attempt + 1) if failing else 1.0)
        except (RuntimeError, ValueError) as error:
            texts.append(str(error))
    norm = gradclip_ext.clip_grad_norm_(parameters, 1.0, dtype=torch.float64)
    expected = torch.cat([whole.flatten().double() for whole in wholes]).norm()
    return texts, norm.full_tensor().item(), expected.item()


# In the test process.


def require_everywhere(answers: list[Any], kind: str, reason: str, name: str | None) -> None:
    assert all(isinstance(answer, Failure) for answer in answers), answers
    for rank, answer in enumerate(answers):
        assert answer.kind == (kind if rank == BROKEN else "RuntimeError"), answer.trace
        assert reason in answer.text, answer.text
        # A foreign exception is raised as it is where it came from.
        if rank != BROKEN or kind != "LookupError":
            assert f"rank {BROKEN}" in answer.text, answer.text
            assert name is None or name in answer.text or kind == "LookupError", answer.text


@pytest.mark.parametrize("kind", APPENDED)
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_gradient(world, name, kind):
    answers = world(4).outcomes(append, name, "clip_grad_norm_", kind, 2.0)
    place = f"parameters[{len(mixes.MIXES[name])}]"
    require_everywhere(answers, *APPENDED[kind][1:], place)


@pytest.mark.parametrize("kind", ["integer gradient", "raising property", "freed"])
@pytest.mark.parametrize("norm_type", [1.0, math.inf, -math.inf, 3.0])
@pytest.mark.parametrize("function", ["clip_grad_norm_", "grad_norms"])
def test_a_bad_gradient_with_other_norms(world, function, norm_type, kind):
    answers = world(2).outcomes(append, "fsdp", function, kind, norm_type)
    require_everywhere(answers, *APPENDED[kind][1:], "[4]")


@pytest.mark.parametrize("kind", ["integer gradient", "expanded", "freed"])
def test_a_bad_gradient_of_a_clipper(world, kind):
    answers = world(2).outcomes(append, "fsdp", "GradClipper", kind, 2.0)
    require_everywhere(answers, *APPENDED[kind][1:], "[4]")


@pytest.mark.parametrize("kind", ARGUMENTS)
@pytest.mark.parametrize("size", [2, 4])
def test_a_bad_argument(world, size, kind):
    answers = world(size).outcomes(argue, "crossing meshes", kind)
    require_everywhere(answers, *ARGUMENTS[kind][1:], None)


@pytest.mark.parametrize("way", ["function", "get_total_norm", "GradClipper"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("name", ["fsdp", "partial"])
def test_nonfinite(world, name, norm_type, value, way):
    answers = world(4).outcomes(nonfinite, name, norm_type, value, way)
    assert all(isinstance(answer, Failure) for answer in answers), answers
    for answer in answers:
        assert answer.kind == "RuntimeError", answer.trace
        assert f"order {norm_type} for gradients from `parameters` is non-finite" in answer.text
        assert f"On rank {BROKEN}." in answer.text, answer.text
        assert "[0]" in answer.text, answer.text


def test_an_unknown_partial(world):
    for answer in world(2).outcomes(unknown_partial):
        assert answer.kind == "NotImplementedError", answer
        assert "parameters[0].grad is P" in answer.text and "redistribute" in answer.text


@pytest.mark.parametrize("size", [2, 4])
def test_a_partial_gradient_that_one_rank_does_not_have(world, size):
    for answer in world(size).outcomes(partial_on_some):
        assert answer.kind == "RuntimeError" and "Partial" in answer.text, answer


def test_another_norm_on_one_rank(world):
    for answer in world(4).outcomes(different_orders):
        assert answer.kind == "RuntimeError" and "differently" in answer.text, answer


@pytest.mark.parametrize("function", ["grad_norms", "GradClipper"])
def test_another_list_on_one_rank(world, function):
    for answer in world(4).outcomes(different_lists, function):
        assert answer.kind == "RuntimeError" and "differently" in answer.text, answer


def test_outside_of_the_only_mesh(world):
    assert world(4).run(outside, False) == [6.0, 6.0, 0.0, 0.0]


def test_outside_of_one_mesh_of_several(world):
    for rank, answer in enumerate(world(4).outcomes(outside, True)):
        assert answer.kind == ("ValueError" if rank > 1 else "RuntimeError"), answer
        expected = "several ranks" if rank < 2 else f"(on rank {rank})"
        assert expected in answer.text and "not part of" in answer.text


def test_meshes_of_two_kinds_of_devices(world):
    for answer in world(4).outcomes(two_devices):
        assert answer.kind == "RuntimeError"
        assert "cpu and cuda" in answer.text and "through the host" in answer.text


def test_the_next_call_works(world):
    for texts, norm, expected in world(2).run(fail_then_work):
        assert [f"found -{attempt + 1}.0" in text for attempt, text in enumerate(texts)] == [
            True
        ] * 3
        assert norm == pytest.approx(expected, rel=1e-6)
