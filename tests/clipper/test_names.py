"""What parameters are called: once each, and the same in a model and in its wrappers."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from models import make_model, set_gradients
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from gradclip_ext import AdaGC, GradClipper, _names, grad_norms

NAMES = ("0.weight", "0.bias", "2.weight")


class Wrapper(nn.Module):
    """Holds a module under the name that a wrapper gives it."""

    def __init__(self, module, name):
        super().__init__()
        self.add_module(name, module)


def fsdp_like(model):
    return Wrapper(model, "_fsdp_wrapped_module")


def checkpointed_inside(model):
    model[0] = checkpoint_wrapper(model[0])
    return model


def data_parallel(model):
    # It would move a model on the CPU to a GPU if it found one.
    is_on_gpu = next(model.parameters()).is_cuda
    with mock.patch.object(torch.cuda, "is_available", lambda: is_on_gpu):
        return nn.DataParallel(model)


def parallel_inside(model):
    model[0] = data_parallel(model[0])
    return model


WRAPPERS = {
    "plain": lambda model: model,
    "torch.compile": torch.compile,
    "DataParallel": data_parallel,
    "compiled, then DataParallel": lambda model: data_parallel(torch.compile(model)),
    "DataParallel, then compiled": lambda model: torch.compile(data_parallel(model)),
    "checkpoint wrapper": checkpoint_wrapper,
    "checkpoint wrapper inside": checkpointed_inside,
    "DataParallel inside": parallel_inside,
    "FSDP": fsdp_like,
    "all": lambda model: torch.compile(data_parallel(fsdp_like(checkpointed_inside(model)))),
    "twice": lambda model: data_parallel(data_parallel(model)),
}
by_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@by_wrapper
def test_wrappers_are_not_in_the_names(wrap):
    model = wrap(make_model())
    assert grad_norms(model).names == NAMES
    clipper = GradClipper(model, 1.0)
    clipper.clip_()
    report = clipper.report()
    assert report.names == NAMES
    assert report.as_dict()["gradients/norm/2.weight"] == report.norms[2] > 0.0


@pytest.mark.parametrize("wrap", [w for n, w in WRAPPERS.items() if n != "DataParallel inside"])
def test_named_parameters_and_param_names(wrap):
    model = wrap(make_model())
    assert grad_norms(model.named_parameters()).names == NAMES
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    assert grad_norms(optimizer).names == NAMES


@by_wrapper
@pytest.mark.parametrize("read", [lambda m: m, lambda m: m.named_parameters()], ids=["m", "pairs"])
@pytest.mark.parametrize("saves", ["the wrapped", "the plain"])
def test_resumes_under_other_names(wrap, read, saves):
    first, second = make_model(), make_model()
    wrapped, plain = (first, second) if saves == "the wrapped" else (second, first)
    wrapped = wrap(wrapped)
    clippers = {
        "the wrapped": GradClipper(read(wrapped), AdaGC(warmup_steps=1)),
        "the plain": GradClipper(read(plain), AdaGC(warmup_steps=1)),
    }
    saved = clippers.pop(saves)
    (resumed,) = clippers.values()
    for seed in range(3):
        set_gradients(first, seed)
        saved.clip_()
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    for model, clipper in ((first, saved), (second, resumed)):
        set_gradients(model, 7, 10.0)
        clipper.clip_()
    assert resumed.report().steps == 4
    assert resumed.report().limits == saved.report().limits
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize(
    "names",
    [
        [f"_orig_mod.{name}" for name in NAMES],
        [f"module.{name}" for name in NAMES],
        [f"module._orig_mod.{name}" for name in NAMES],
        ["0._checkpoint_wrapped_module.weight", "0._checkpoint_wrapped_module.bias", "2.weight"],
        ["0.module.weight", "0.module.bias", "2.weight"],
    ],
)
def test_a_state_that_was_saved_with_the_parts_of_wrappers(names):
    clipper = GradClipper(make_model(), 1.0)
    clipper.clip_()
    clipper.load_state_dict({**clipper.state_dict(), "names": names, "steps": 5})
    assert clipper.report().steps == 5


@pytest.mark.parametrize(
    "names, difference",
    [
        (["0.weight", "0.bias", "3.weight"], "a parameter '2.weight', found '3.weight'"),
        (["module.0.weight", "module.0.bias", "module.2.bias"], "'2.weight', found '2.bias'"),
        (["0.bias", "0.weight", "2.weight"], "a parameter '0.weight', found '0.bias'"),
        (["module.0.weight", "0.bias", "2.weight"], "'0.weight', found 'module.0.weight'"),
        (["_orig_mod.0.weight", "_orig_mod.0.bias"], "3 parameters, found 2"),
        ([1, 2, 3], "a parameter '0.weight', found 1"),
    ],
)
def test_another_model_is_refused(names, difference):
    clipper = GradClipper(make_model(), 1.0)
    with pytest.raises(ValueError) as error:
        clipper.load_state_dict({**clipper.state_dict(), "names": names})
    assert "GradClipper: the state is that of another model: expected" in str(error.value)
    assert difference in str(error.value)


class TestTheUsersOwnModule:
    """A submodule may be called as wrappers call theirs."""

    def test_in_the_middle_stays(self):
        model = nn.ModuleDict({"a": Wrapper(nn.Linear(2, 2), "module"), "b": nn.Linear(2, 2)})
        expected = ("a.module.weight", "a.module.bias", "b.weight", "b.bias")
        assert grad_norms(model).names == expected
        assert grad_norms(data_parallel(model)).names == expected
        assert grad_norms(torch.compile(model).named_parameters()).names == expected

    def test_beside_others_stays(self):
        model = nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
        expected = ("module.weight", "module.bias", "head.weight", "head.bias")
        assert grad_norms(model).names == expected
        assert grad_norms(data_parallel(model)).names == expected

    def test_next_to_the_same_names_stays(self):
        inner = Wrapper(nn.Linear(2, 2), "module")
        inner.weight, inner.bias = (nn.Parameter(torch.ones(2)) for _ in range(2))
        assert set(grad_norms(inner).names) == {"weight", "bias", "module.weight", "module.bias"}

    def test_a_parameter_of_that_name_stays(self):
        model = nn.Linear(2, 2)
        model.register_parameter("_orig_mod", nn.Parameter(torch.ones(2)))
        assert grad_norms(model).names == ("weight", "bias", "_orig_mod")

    def test_two_that_only_a_wrapper_tells_apart(self):
        names = ["a._orig_mod.weight", "a.weight", "b._orig_mod.weight"]
        pairs = [(name, nn.Parameter(torch.ones(2))) for name in names]
        assert grad_norms(pairs).names == ("a._orig_mod.weight", "a.weight", "b.weight")


class TestDuplicateNames:
    def test_are_numbered(self):
        names = ["weight", "bias", "weight", "weight[1]", "weight", "bias"]
        assert _names.unique(names) == (
            "weight",
            "bias",
            "weight[2]",
            "weight[1]",
            "weight[3]",
            "bias[1]",
        )

    def test_no_report_loses_one(self):
        pairs = []
        for number in range(3):
            parameter = nn.Parameter(torch.zeros(2))
            parameter.grad = torch.tensor([3.0 * number, 4.0 * number])
            pairs.append(("weight", parameter))
        clipper = GradClipper(pairs, 100.0)
        clipper.clip_()
        assert clipper.report().names == ("weight", "weight[1]", "weight[2]")
        numbers = clipper.report().as_dict()
        assert [numbers[f"gradients/norm/weight{i}"] for i in ("", "[1]", "[2]")] == [0, 5, 10]

    def test_in_param_names(self):
        groups = [{"params": [nn.Parameter(torch.ones(1))], "param_names": ["w"]} for _ in "ab"]
        assert grad_norms(groups).names == ("w", "w[1]")


def test_param_names_that_are_short_or_no_names():
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    group = {"params": parameters, "param_names": ["a"]}
    expected = ("a", "groups[0]['params'][1]", "groups[0]['params'][2]")
    assert grad_norms([group]).names == expected
    assert GradClipper([group], 1.0)._collection.names == expected
    group["param_names"] = 7
    assert grad_norms([group]).names == ("groups[0]['params'][0]", *expected[1:])
    group["param_names"] = ["a", None, "c", "d"]
    assert grad_norms([group]).names == ("a", "groups[0]['params'][1]", "c")
    optimizer = torch.optim.SGD(nn.Linear(2, 2).named_parameters(), lr=0.1)
    clipper = GradClipper(optimizer, 1.0)
    parameters[0].grad = torch.tensor([3.0])
    optimizer.param_groups[0]["params"].append(parameters[0])
    assert clipper.clip_().item() == 3.0
    assert clipper.report().names == ("weight", "bias", "groups[0]['params'][2]")
