"""Whatever is in a list: a function that raises has changed nothing."""

from __future__ import annotations

import itertools
import math

import kinds
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import gradclip_ext
from gradclip_ext import AGC, AdaGC, AutoClip, GradClipper, ZClip

pytestmark = pytest.mark.cpu_only

FUNCTIONS = {
    "clip_grad_norm_": lambda p: gradclip_ext.clip_grad_norm_(p, 1.0),
    "error_if_nonfinite": lambda p: gradclip_ext.clip_grad_norm_(p, 1.0, error_if_nonfinite=True),
    "L3": lambda p: gradclip_ext.clip_grad_norm_(p, 1.0, 3.0),
    "foreach": lambda p: gradclip_ext.clip_grad_norm_(p, 1.0, foreach=True),
    "clip_grads_with_norm_": lambda p: gradclip_ext.clip_grads_with_norm_(p, 1.0, 5.0),
    "with norm, foreach": lambda p: gradclip_ext.clip_grads_with_norm_(p, 1.0, 5.0, foreach=True),
    "clip_grad_value_": lambda p: gradclip_ext.clip_grad_value_(p, 0.5),
    "value, foreach": lambda p: gradclip_ext.clip_grad_value_(p, 0.5, foreach=True),
    "large value": lambda p: gradclip_ext.clip_grad_value_(p, 1e5),
    "add_weight_decay_": lambda p: gradclip_ext.add_weight_decay_(p, 0.1),
    "large decay": lambda p: gradclip_ext.add_weight_decay_(p, 1e6),
    "adaptive_clip_grad_": lambda p: gradclip_ext.adaptive_clip_grad_(p),
}


def named(parameters):
    return [(f"p{index}", parameter) for index, parameter in enumerate(parameters)]


def two_groups(parameters):
    half = (len(parameters) + 1) // 2
    groups = [parameters[:half], parameters[half:]]
    return [{"params": group} for group in groups if group]


def rules(parameters, rule):
    return [rule() for _ in two_groups(parameters)]


CLIPPERS = {
    "number": lambda p: GradClipper(named(p), 1.0),
    "two groups": lambda p: GradClipper(two_groups(p), [1.0] * len(two_groups(p))),
    "decay": lambda p: GradClipper(two_groups(p), rules(p, lambda: 1.0), weight_decay=0.1),
    "raise": lambda p: GradClipper(named(p), 1.0, nonfinite="raise", weight_decay=0.1),
    "skip": lambda p: GradClipper(named(p), 1.0, nonfinite="skip", weight_decay=0.1),
    "zero": lambda p: GradClipper(two_groups(p), rules(p, AutoClip), nonfinite="zero"),
    "value": lambda p: GradClipper(two_groups(p), rules(p, ZClip), clip_value=0.1),
    "units": lambda p: GradClipper(two_groups(p), rules(p, AGC)),
    "each": lambda p: GradClipper(named(p), AdaGC(warmup_steps=0), weight_decay=0.01),
}


def check(parameters, call):
    before = [kinds.stored(parameter) for parameter in parameters]
    try:
        call()
    except Exception:
        assert [kinds.stored(parameter) for parameter in parameters] == before
        return True
    return False


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_two_gradients_of_any_kinds(function):
    failures = 0
    for first, second in itertools.product(kinds.GRADIENTS, repeat=2):
        parameters = [kinds.parameter(first), kinds.parameter(second)]
        failures += check(parameters, lambda p=parameters: function(p))
    # Most kinds are taken by most functions, and none takes all.
    assert 0 < failures < len(kinds.GRADIENTS) ** 2


def states_of(clipper):
    state = clipper.state_dict()
    return repr({key: value for key, value in state.items() if key != "names"})


@pytest.mark.parametrize("make", CLIPPERS.values(), ids=CLIPPERS)
def test_clipper_with_two_gradients_of_any_kinds(make):
    failures = 0
    for first, second in itertools.product(kinds.GRADIENTS, repeat=2):
        parameters = [kinds.parameter(first), kinds.parameter(second)]
        clipper = make(parameters)
        before = states_of(clipper)
        if check(parameters, clipper.clip_):
            failures += 1
            assert states_of(clipper) == before
            with pytest.raises(RuntimeError, match="before the first"):
                clipper.report()
    assert 0 < failures < len(kinds.GRADIENTS) ** 2


class Machine(RuleBasedStateMachine):
    """Functions and clippers in any order, over parameters whose gradients come and go."""

    @initialize(chosen=st.lists(st.sampled_from(sorted(kinds.GRADIENTS)), min_size=1, max_size=5))
    def start(self, chosen):
        self.parameters = [kinds.Kept(kind) for kind in chosen]
        self.clippers = {}

    @rule(place=st.integers(0, 4), kind=st.sampled_from(sorted(kinds.GRADIENTS)))
    def replace(self, place, kind):
        self.parameters[place % len(self.parameters)].held = kinds.GRADIENTS[kind]()

    @rule(name=st.sampled_from(sorted(FUNCTIONS)))
    def call(self, name):
        check(self.parameters, lambda: FUNCTIONS[name](self.parameters))

    @rule(name=st.sampled_from(sorted(CLIPPERS)))
    def step(self, name):
        if name not in self.clippers:
            self.clippers[name] = CLIPPERS[name](self.parameters)
        clipper = self.clippers[name]
        before = states_of(clipper)
        if check(self.parameters, clipper.clip_):
            assert states_of(clipper) == before

    @invariant()
    def numbers_are_plain(self):
        for clipper in getattr(self, "clippers", {}).values():
            state = clipper.state_dict()
            if state["steps"]:
                report = clipper.report()
                assert type(report.total_norm) is float
                assert all(type(norm) is float for norm in report.norms)
                assert report.total_norm >= 0.0 or math.isnan(report.total_norm)


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=12, deadline=None)
TestMachine = Machine.TestCase
