"""What the clipper is given: its arguments, and parameters that change under it."""

from __future__ import annotations

import math

import pytest
import reference as ref
import torch
from models import gradients_of, make_model, set_gradients
from torch import nn

from gradclip_ext import AGC, GradClipper


class TestNoticesChanges:
    def check(self, clipper, model):
        set_gradients(model, 3)
        before = gradients_of(model)
        assert clipper.clip_().item() == pytest.approx(ref.reference_norm(before, 2.0), rel=1e-5)
        assert len(clipper.parameters) == len(before)

    def test_added_replaced_and_deleted_in_a_module(self):
        model = make_model()
        clipper = GradClipper(model, math.inf)
        self.check(clipper, model)
        model.append(nn.Linear(3, 2))
        self.check(clipper, model)
        model[0].weight = nn.Parameter(torch.ones(4, 4))
        self.check(clipper, model)
        del model[3]
        self.check(clipper, model)
        model[0].register_parameter("bias", None)
        self.check(clipper, model)

    def test_group_added_and_list_replaced_in_an_optimizer(self):
        model, other = make_model(), nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clipper = GradClipper(optimizer, math.inf)
        assert len(clipper.parameters) == 3
        optimizer.add_param_group({"params": list(other.parameters())})
        set_gradients(other, 5)
        clipper.clip_()
        assert len(clipper.parameters) == 5
        optimizer.param_groups[1]["params"] = [other.weight]
        clipper.clip_()
        assert len(clipper.parameters) == 4

    def test_learning_rate_is_no_change(self, monkeypatch):
        optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
        clipper = GradClipper(optimizer, 1.0)
        monkeypatch.setattr(clipper._collection, "_collect", lambda: pytest.fail("collected again"))
        optimizer.param_groups[0]["lr"] = 0.01
        clipper.clip_()

    def test_other_number_of_groups_than_thresholds(self):
        model, other = make_model(), nn.Linear(2, 2)
        optimizer = torch.optim.SGD([{"params": model.parameters()}], lr=0.1)
        clipper = GradClipper(optimizer, [1.0])
        optimizer.add_param_group({"params": other.parameters()})
        clipper.clip_()  # one threshold is for all
        optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
        clipper = GradClipper(optimizer, [1.0, 2.0, 3.0])
        optimizer.add_param_group({"params": list(other.parameters())})
        with pytest.raises(ValueError) as error:
            clipper.clip_()
        assert "there are 4 parameter groups now, expected 3" in str(error.value)


class TestBadArguments:
    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
    def test_thresholds(self, value):
        for arguments in ({"max_norm": value}, {"clip_value": value}):
            with pytest.raises(ValueError) as error:
                GradClipper(make_model(), **arguments)
            name = next(iter(arguments))
            assert f"GradClipper: {name} has to be a positive number, found {value}" in str(
                error.value
            )

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({}, "there is nothing to do"),
            ({"max_norm": 1.0, "nonfinite": "ignore"}, "nonfinite has to be one of 'propagate'"),
            ({"max_norm": [1.0, 2.0]}, "one entry for each of the 1 parameter groups, found 2"),
            ({"max_norm": 1.0, "weight_decay": -0.1}, "weight_decay has to be"),
            ({"max_norm": AGC(), "nonfinite": "skip"}, "cannot be combined with clip_value or AGC"),
        ],
    )
    def test_values(self, arguments, message):
        with pytest.raises(ValueError) as error:
            GradClipper(make_model(), **arguments)
        assert message in str(error.value)

    @pytest.mark.parametrize("rule", ["auto", None.__class__, True])
    def test_unknown_rule(self, rule):
        with pytest.raises(TypeError) as error:
            GradClipper(make_model(), rule)
        assert "max_norm has to be a number or a rule such as AutoClip()" in str(error.value)

    def test_sources(self):
        for source in ([], nn.ReLU(), iter(())):
            with pytest.raises(ValueError, match="there are no parameters"):
                GradClipper(source, 1.0)
        with pytest.raises(ValueError, match=r"groups\[1\] has no parameters"):
            GradClipper([{"params": [nn.Parameter(torch.ones(2))]}, {"params": []}], 1.0)
        with pytest.raises(TypeError, match=r"parameters\[1\] has to be a torch.Tensor, found 3"):
            GradClipper([nn.Parameter(torch.ones(2)), 3], 1.0)
        for source in (5, "model", {"weight": torch.ones(2)}):
            with pytest.raises(TypeError, match="expected a module"):
                GradClipper(source, 1.0)


def test_no_python_walk_of_the_parameters_each_step(monkeypatch):
    model = make_model()
    clipper = GradClipper(model, 1.0)
    monkeypatch.setattr(nn.Module, "named_parameters", lambda *_: pytest.fail("walked"))
    for seed in range(3):
        set_gradients_of(clipper.parameters, seed)
        clipper.clip_()


def set_gradients_of(parameters, seed):
    for index, parameter in enumerate(parameters):
        parameter.grad = ref.random_gradient(parameter.shape, seed=seed + index)
