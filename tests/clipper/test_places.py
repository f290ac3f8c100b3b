"""Clippers that are made in one place and used in another, copied, saved and loaded."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from models import make_model, set_gradients
from torch import nn

from gradclip_ext import AGC, AdaGC, AutoClip, GradClipper, ZClip

RULES = {
    "number": lambda: 0.5,
    "AutoClip": AutoClip,
    "ZClip": lambda: ZClip(warmup_steps=2),
    "AdaGC": lambda: AdaGC(warmup_steps=2),
    "AGC": AGC,
}
by_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def steps(clipper, model, seeds):
    for seed in seeds:
        set_gradients(model, seed, 1.0 + seed % 3)
        clipper.clip_()
    return [parameter.grad.clone() for parameter in model.parameters()]


@by_rule
@pytest.mark.parametrize("inside", [(True, False), (False, True)], ids=["first", "then"])
def test_inference_mode(rule, inside):
    # Of the model's gradients none is an inference tensor; the clipper's own must not be either.
    model, other = make_model(), make_model()
    clipper, expected = GradClipper(model, rule()), GradClipper(other, rule())
    for number, within in enumerate((*inside, True, False)):
        set_gradients(model, number, 1.0 + number % 3)
        with torch.inference_mode(within):
            clipper.clip_()
        steps(expected, other, [number])
    assert clipper.report() == expected.report()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


@by_rule
def test_made_in_inference_mode(rule):
    model = make_model()
    with torch.inference_mode():
        clipper = GradClipper(model, rule())
    steps(clipper, model, range(4))
    assert clipper.report().steps == 4
    assert not clipper.found_inf.is_inference()


@pytest.mark.cpu_only
@by_rule
def test_model_on_meta_that_is_materialised_later(rule):
    with torch.device("meta"):
        model = nn.Linear(3, 2)
        clipper = GradClipper(model, rule())
    model.to_empty(device="cpu")
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    steps(clipper, model, range(3))
    assert clipper.found_inf.device.type == "cpu"
    assert clipper.report().total_norm > 0.0


@pytest.mark.cpu_only
def test_default_device_without_any_gradient():
    model = nn.Linear(3, 2)
    clipper = GradClipper(model, AutoClip())
    with torch.device("meta"):
        norm = clipper.clip_()
    assert (norm.device.type, norm.item()) == ("cpu", 0.0)
    assert clipper.report().total_norm == 0.0


@by_rule
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_by_themselves(rule, way):
    model = make_model()
    clipper = GradClipper(model, rule())
    steps(clipper, model, range(4))
    if way == "deepcopy":
        other, other_model = copy.deepcopy((clipper, model))
    elif way == "pickle":
        other, other_model = pickle.loads(pickle.dumps((clipper, model)))
    else:
        file = io.BytesIO()
        torch.save(clipper.state_dict(), file)
        file.seek(0)
        other_model = make_model()
        other = GradClipper(other_model, rule())
        other.load_state_dict(torch.load(file, weights_only=True))
    expected = steps(clipper, model, range(4, 7))
    found = steps(other, other_model, range(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert other.report() == clipper.report()


class TestGroups:
    def test_one_rule_for_two_groups_is_refused(self):
        model = make_model()
        groups = [{"params": [p]} for p in model.parameters()]
        shared = ZClip()
        with pytest.raises(ValueError) as caught:
            GradClipper(groups, [shared, 1.0, shared])
        assert "max_norm[0] and max_norm[2] are the same ZClip object" in str(caught.value)
        agc = AGC()
        GradClipper(groups, [agc, agc, agc]).clip_()

    def test_a_group_with_its_own_history(self):
        frozen, trained = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        groups = [{"params": [frozen]}, {"params": [trained]}]
        clipper = GradClipper(groups, [ZClip(warmup_steps=3), ZClip(warmup_steps=3)])
        for _ in range(30):
            trained.grad = torch.tensor([3.0, 4.0])
            clipper.clip_()
        frozen.grad = torch.tensor([3.0, 4.0])
        trained.grad = torch.tensor([3.0, 4.0])
        clipper.clip_()
        assert frozen.grad.tolist() == trained.grad.tolist() == [3.0, 4.0]


class OwnRule:
    per_parameter = False
    epsilon = 0.0

    def __init__(self, answer):
        self.answer = answer
        self.calls = 0

    def limits(self, total, norms):
        self.calls += 1
        return self.answer(total, norms)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def assert_refused(answer, error, text, decay):
    model = make_model()
    rule, other = OwnRule(answer), AutoClip()
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias]}]
    groups.append({"params": [model[2].weight]})
    if "shape" in text:
        clipper = GradClipper(model, rule, weight_decay=decay)
    else:
        clipper = GradClipper(groups, [other, rule, 1.0], weight_decay=decay)
    before = [parameter.grad.clone() for parameter in model.parameters()]
    with pytest.raises(error) as caught:
        clipper.clip_()
    assert "the rule OwnRule has to give" in str(caught.value)
    assert text in str(caught.value)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert rule.calls == 0
    assert other.state_dict()["count"].item() == 0.0
    assert clipper.state_dict()["steps"] == 0


by_decay = pytest.mark.parametrize("decay", [0.0, 0.1])


@by_decay
@pytest.mark.parametrize(
    "answer, error, text",
    [
        (lambda _, norms: norms, ValueError, "limits of shape (), found shape (3,)"),
        (lambda total, _: total.item(), TypeError, "its limits as a tensor, found"),
    ],
    ids=["shape", "number"],
)
def test_a_bad_limit_names_the_rule_and_changes_nothing(answer, error, text, decay):
    assert_refused(answer, error, text, decay)


# To read the number on a GPU would be a device sync.
@pytest.mark.cpu_only
@by_decay
@pytest.mark.parametrize(
    "answer, text",
    [
        (lambda total, _: -total, "limits that are not negative, found -"),
        (lambda total, _: total * math.nan, "not negative, found nan"),
    ],
    ids=["negative", "NaN"],
)
def test_so_does_a_limit_that_is_no_limit(answer, text, decay):
    assert_refused(answer, ValueError, text, decay)


class TestOtherParameters:
    def norms(self, clipper, parameters, values):
        for parameter, value in zip(parameters, values, strict=True):
            parameter.grad = torch.full_like(parameter, value)
        clipper.clip_()
        return [parameter.grad.flatten()[0].item() for parameter in parameters]

    def clipper_with_averages(self, names):
        model = nn.Module()
        for name in names:
            model.register_parameter(name, nn.Parameter(torch.ones(1)))
        clipper = GradClipper(model, AdaGC(1.0, beta=1.0, warmup_steps=1, absolute_limit=1e9))
        return model, clipper

    def test_reordered_removed_and_added(self):
        model, clipper = self.clipper_with_averages("abc")
        self.norms(clipper, [*model.parameters()], [1.0, 2.0, 3.0])
        a, b = model.a, model.b
        for name in "abc":
            delattr(model, name)
        model.register_parameter("b", b)
        model.register_parameter("d", nn.Parameter(torch.ones(1)))
        model.register_parameter("a", a)
        assert self.norms(clipper, [*model.parameters()], [50.0, 60.0, 70.0]) == [2.0, 60.0, 1.0]
        # The new one has an average of its own now.
        assert self.norms(clipper, [*model.parameters()], [1.0, 90.0, 1.0]) == [1.0, 60.0, 1.0]

    def test_a_head_of_another_shape_starts_afresh(self):
        model, clipper = self.clipper_with_averages("ab")
        self.norms(clipper, [*model.parameters()], [1.0, 2.0])
        model.b = nn.Parameter(torch.ones(1, 1))
        assert self.norms(clipper, [*model.parameters()], [9.0, 9.0]) == [1.0, 9.0]

    def test_in_an_optimizer_the_object_counts(self):
        first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([first, second], lr=0.1)
        clipper = GradClipper(optimizer, AdaGC(1.0, 1.0, warmup_steps=1, absolute_limit=1e9))
        self.norms(clipper, [first, second], [1.0, 2.0])
        optimizer.param_groups[0]["params"] = [second, first]
        assert self.norms(clipper, [second, first], [9.0, 9.0]) == [2.0, 1.0]

    def test_an_own_rule_that_cannot_follow(self):
        model, _ = self.clipper_with_averages("ab")
        rule = OwnRule(lambda _, norms: norms)
        rule.per_parameter = True
        clipper = GradClipper(model, rule)
        self.norms(clipper, [*model.parameters()], [1.0, 2.0])
        report = clipper.report()
        model.register_parameter("c", nn.Parameter(torch.ones(1)))
        model.c.grad = torch.ones(1)
        for _ in range(2):
            with pytest.raises(ValueError, match="the rule OwnRule has limits for each parameter"):
                clipper.clip_()
        assert clipper.report() == report
        assert report.names == ("a", "b")


class TestLoading:
    def test_states_from_before_steps_were_skipped(self):
        model = make_model()
        clipper = GradClipper(model, 1.0)
        names = list(clipper.state_dict()["names"])
        old = {
            "names": names,
            "steps": 5,
            "clipped_steps": 3,
            "nonfinite_steps": 1,
            "rules": [None],
        }
        clipper.load_state_dict(old)
        state = clipper.state_dict()
        assert (state["steps"], state["clipped_steps"], state["skipped_steps"]) == (5, 3, 0)

    @pytest.mark.parametrize(
        "key, value",
        [
            ("steps", -1),
            ("steps", "5"),
            ("steps", 5.0),
            ("steps", True),
            ("clipped_steps", -1),
            ("clipped_steps", 6),
            ("nonfinite_steps", math.nan),
            ("nonfinite_steps", None),
            ("skipped_steps", 7),
            ("last_norm_is_finite", 2),
            ("rules", []),
            ("names", []),
        ],
        ids=repr,
    )
    def test_states_that_cannot_be(self, key, value):
        model = make_model()
        clipper = GradClipper(model, AutoClip())
        steps(clipper, model, range(5))
        state, before = clipper.state_dict(), repr(clipper.state_dict())
        state[key] = value
        with pytest.raises((TypeError, ValueError), match="GradClipper"):
            clipper.load_state_dict(state)
        assert repr(clipper.state_dict()) == before

    @pytest.mark.parametrize("state", [None, 5, [("steps", 1)]], ids=repr)
    def test_what_is_no_mapping(self, state):
        with pytest.raises(TypeError, match="the state has to be a mapping, found"):
            GradClipper(make_model(), 1.0).load_state_dict(state)

    def test_all_or_nothing_of_two_rules(self):
        model = make_model()
        groups = [{"params": [p]} for p in model.parameters()]
        clipper = GradClipper(groups, [AutoClip(), ZClip(), 1.0])
        steps(clipper, model, range(5))
        state, before = clipper.state_dict(), repr(clipper.state_dict())
        state["rules"][0] = AutoClip().state_dict()
        state["rules"][1] = {**state["rules"][1], "mean": torch.tensor(-1.0)}
        with pytest.raises(ValueError, match="ZClip"):
            clipper.load_state_dict(state)
        assert repr(clipper.state_dict()) == before


class TestLoadingAfterAChange:
    def optimizer(self, count=2):
        parameters = [nn.Parameter(torch.ones(2)) for _ in range(2 * count)]
        for parameter in parameters:
            parameter.grad = torch.tensor([3.0, 4.0])
        groups = [{"params": parameters[:count]}, {"params": parameters[count:]}]
        return torch.optim.SGD(groups, lr=0.1)

    def test_what_is_left_out_comes_with_the_optimizer(self):
        optimizer = self.optimizer()
        optimizer.param_groups[1]["clip_grad"] = False
        clipper = GradClipper(optimizer, 1.0)
        clipper.clip_()
        saved = optimizer.state_dict(), clipper.state_dict()
        other = self.optimizer()
        resumed = GradClipper(other, 1.0)
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        assert resumed.state_dict()["steps"] == 1

    def test_averages_for_other_groups_are_refused(self):
        optimizer = self.optimizer()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        named = [(f"p{index}", parameter) for index, parameter in enumerate(parameters)]

        def clipper(first):
            groups = [{"params": part} for part in (named[:first], named[first:])]
            groups = [
                {
                    "params": [p for _, p in group["params"]],
                    "param_names": [n for n, _ in group["params"]],
                }
                for group in groups
            ]
            return GradClipper(groups, [AdaGC(warmup_steps=0), AdaGC(warmup_steps=0)])

        saved, other = clipper(1), clipper(3)
        saved.clip_()
        with pytest.raises(ValueError, match="the state of AdaGC is for 1 parameters, expected 3"):
            other.load_state_dict(saved.state_dict())
        other.clip_()
        assert other.report().steps == 1

    def test_a_group_that_is_left_out_and_comes_back(self):
        optimizer = self.optimizer(1)
        clipper = GradClipper(optimizer, [1.0, AdaGC(1.0, 1.0, warmup_steps=1, absolute_limit=1e9)])
        clipper.clip_()
        group = optimizer.param_groups[1]
        group["clip_grad"] = False
        clipper.clip_()
        assert clipper.report().limits == (1.0, math.inf)
        group["clip_grad"] = True
        group["params"][0].grad = torch.tensor([30.0, 40.0])
        clipper.clip_()
        assert group["params"][0].grad.tolist() == pytest.approx([3.0, 4.0])

    @pytest.mark.parametrize(
        "numbers",
        [
            {"clipped_steps": 5, "nonfinite_steps": 5},
            {"skips_in_a_row": 2},
            {"last_norm_is_finite": 0},
        ],
        ids=repr,
    )
    def test_counters_that_contradict_one_another(self, numbers):
        clipper = GradClipper(make_model(), 1.0)
        state = {**clipper.state_dict(), "steps": 5, **numbers}
        with pytest.raises(ValueError, match="counters of the state have to agree"):
            clipper.load_state_dict(state)

    @pytest.mark.parametrize("key", ["names", "rules"])
    @pytest.mark.parametrize("value", [None, 7], ids=repr)
    def test_lists_that_are_none(self, key, value):
        clipper = GradClipper(make_model(), 1.0)
        with pytest.raises(TypeError, match=f"state\\['{key}'\\] has to be a list"):
            clipper.load_state_dict({**clipper.state_dict(), key: value})
