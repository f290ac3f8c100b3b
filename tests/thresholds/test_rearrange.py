"""Parameters that come and go: averages belong to them, not to their places."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from rules import RULES, feed, limits_of, random_norms

from gradclip_ext.thresholds import AdaGC

pytestmark = pytest.mark.cpu_only

INF = math.inf


def by_rules(per_parameter):
    chosen = {name: make for name, make in RULES.items() if make().per_parameter == per_parameter}
    return pytest.mark.parametrize("make", chosen.values(), ids=chosen.keys())


with_a_limit_for_each, with_one_limit = by_rules(True), by_rules(False)


def adagc(gamma, count=100.0):
    rule = AdaGC(relative_limit=2.0, beta=0.5, warmup_steps=1)
    gamma, count = (torch.tensor(value, dtype=torch.float64) for value in (gamma, count))
    rule.load_state_dict({"rule": "AdaGC", "gamma": gamma, "count": count})
    return rule


def gamma_of(rule):
    return rule.state_dict()["gamma"].tolist()


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0, 1, 2], [0.1, INF, 0.3]),
        ([2, 0, 1], [0.3, 0.1, INF]),
        ([0, 2], [0.1, 0.3]),
        ([2], [0.3]),
        ([0, None, 2], [0.1, INF, 0.3]),
        ([None, 0, 1, 2, None], [INF, 0.1, INF, 0.3, INF]),
        ((None, None), [INF, INF]),
    ],
    ids=str,
)
def test_averages_go_along(places, expected):
    rule = adagc([0.1, INF, 0.3])
    rule.rearrange(places)
    assert gamma_of(rule) == expected
    assert rule.state_dict()["count"].item() == 100.0
    # What comes next is limited by its own average; what is new, not at all.
    limits = limits_of(rule, [9.0] * len(places)).tolist()
    assert limits == [2.0 * average for average in expected]
    after = [9.0 if g == INF else 0.5 * g + 0.5 * (2.0 * g) for g in expected]
    assert gamma_of(rule) == pytest.approx(after, rel=1e-15)


@with_a_limit_for_each
@pytest.mark.parametrize("steps", [1, 4, 30])
def test_any_order_gives_the_same_bits(make, steps):
    rows = random_norms(60, count=6)
    order = random.Random(steps).sample(range(6), 6)
    rule, expected = make(), make()
    feed(rule, rows[:steps])
    feed(expected, rows[:steps])
    rule.rearrange(order)
    for row in rows[steps:]:
        norms = torch.tensor(row, dtype=torch.float64)
        # The same total, whose bits would depend on the order.
        total = torch.linalg.vector_norm(norms)
        assert torch.equal(rule.limits(total, norms[order]), expected.limits(total, norms)[order])
    rule.rearrange([order.index(place) for place in range(6)])
    assert torch.equal(rule.state_dict()["gamma"], expected.state_dict()["gamma"])


def test_in_the_warm_up_a_new_parameter_is_clipped_with_the_others():
    rule = AdaGC(absolute_limit=1.0, warmup_steps=5)
    feed(rule, [[6.0, 8.0]])
    rule.rearrange([1, None])
    assert feed(rule, [[3.0, 4.0]]) == [[pytest.approx(0.6), pytest.approx(0.8)]]
    assert gamma_of(rule) == [pytest.approx(0.6), pytest.approx(0.8)]
    assert rule.state_dict()["count"].item() == 2.0


def test_before_the_first_step_there_is_nothing_to_take_along():
    rows = random_norms(12)
    for prepare in (lambda rule: None, lambda rule: rule.load_state_dict(AdaGC().state_dict())):
        rule = AdaGC()
        prepare(rule)
        rule.rearrange([4, None, 0])
        assert feed(rule, rows) == feed(AdaGC(), rows)


def test_after_it_states_of_as_many_parameters_fit():
    rule, other = adagc([0.1, 0.2]), adagc([0.3, 0.4, 0.5])
    rule.rearrange([0, None, 1])
    rule.load_state_dict(copy.deepcopy(rule).state_dict())
    assert gamma_of(rule) == [0.1, INF, 0.2]
    rule.load_state_dict(other.state_dict())
    assert gamma_of(rule) == [0.3, 0.4, 0.5]


def test_inside_inference_mode():
    rule = adagc([0.1, 0.2])
    with torch.inference_mode():
        rule.rearrange([1, 0])
    assert not rule.state_dict()["gamma"].is_inference()
    assert gamma_of(rule) == [0.2, 0.1]


def test_under_another_default_device():
    rule = adagc([0.1, 0.2])
    with torch.device("meta"):
        rule.rearrange([1, None])
    assert gamma_of(rule) == [0.2, INF]


@with_one_limit
def test_rules_with_one_limit_go_on(make):
    rule = make()
    rows = random_norms(30)
    found = feed(rule, rows[:12])
    rule.rearrange([2, None])
    assert found + feed(rule, rows[12:]) == feed(make(), rows)


@pytest.mark.parametrize(
    ("places", "error", "message"),
    [
        ([0, 2], ValueError, "places[1] has to be a whole number from 0 to 1, found 2"),
        ([-1, 0], ValueError, "places[0] has to be a whole number from 0 to 1, found -1"),
        ([0, True], TypeError, "places[1] has to be a whole number from 0 to 1, found True"),
        ([0, 1.0], TypeError, "places[1] has to be a whole number from 0 to 1, found 1.0"),
        ([0, "1"], TypeError, "places[1] has to be a whole number from 0 to 1, found '1'"),
        ([], ValueError, "places has to hold one for each parameter, found none"),
    ],
    ids=str,
)
def test_places_that_are_none(places, error, message):
    rule = adagc([0.1, 0.2])
    with pytest.raises(error) as caught:
        rule.rearrange(places)
    assert str(caught.value) == f"AdaGC: {message}"
    assert gamma_of(rule) == [0.1, 0.2]
