"""What a step has to bring to count, and that no history makes a limit that is none."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import NONFINITE, assert_same_state, by_rule, feed, limits_of, random_norms

from gradclip_ext.thresholds import AdaGC, AutoClip, ZClip

pytestmark = pytest.mark.cpu_only

SMALLEST, LARGEST = math.ulp(0.0), sys.float_info.max
NOTHING = [0.0, 0.0, 0.0]


def same_bits(one, two):
    """Whether two states hold the same, NaN that mark empty places included."""
    return one.keys() == two.keys() and all(
        torch.equal(value.view(torch.int64), two[key].view(torch.int64))
        if isinstance(value, torch.Tensor)
        else value == two[key]
        for key, value in one.items()
    )


class TestNoObservation:
    @by_rule
    @pytest.mark.parametrize("before", [0, 3, 5, 20])
    def test_steps_without_gradient_leave_the_state(self, make, before):
        rule, undisturbed = make(), make()
        rows = random_norms(60)
        for each in (rule, undisturbed):
            limits_of(each, NOTHING)  # creates the state
            feed(each, rows[:before])
        state = rule.state_dict()
        limits = feed(rule, [NOTHING] * 30)
        assert same_bits(rule.state_dict(), state)
        assert all((torch.tensor(limit) > 0.0).all() for limit in limits)
        assert feed(rule, rows[before:]) == feed(undisturbed, rows[before:])
        assert_same_state(rule, undisturbed)

    def test_history_does_not_grow_for_them(self):
        rule = AutoClip()
        feed(rule, random_norms(60))
        state = rule.state_dict()
        feed(rule, [NOTHING, [math.nan] * 3] * 30)
        assert same_bits(rule.state_dict(), state)

    @by_rule
    def test_one_step_in_five_without_gradient(self, make):
        rows = random_norms(160)
        mixed = [row for i, r in enumerate(rows) for row in ([r, NOTHING] if i % 4 == 3 else [r])]
        found = [limit for row, limit in zip(mixed, feed(make(), mixed), strict=True) if any(row)]
        assert found == feed(make(), rows)

    def test_autoclip_gives_the_first_gradient_its_own_norm(self):
        rule = AutoClip()
        assert feed(rule, [[0.0, 0.0]] * 3) == [math.inf] * 3
        assert feed(rule, [[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]]) == [5.0, 5.0, 5.5]

    def test_zclip_begins_its_warm_up_with_the_first_gradient(self):
        rule = ZClip(warmup_steps=2)
        assert feed(rule, [[0.0]] * 25) == [math.inf] * 25
        assert feed(rule, [[4.0], [0.0], [6.0]]) == [math.inf] * 3
        state = rule.state_dict()
        assert [state[key].item() for key in ("count", "mean", "variance")] == [2.0, 5.0, 1.0]
        # z = (25 - 5) / (1 + 1e-6)
        assert feed(rule, [[25.0]]) == [pytest.approx(5.0 + 2.5**2 / 20.0, rel=1e-5)]

    def test_zclip_clips_nothing_after_steps_without_gradient(self):
        rule = ZClip()
        feed(rule, [[0.0]] * 25)
        assert feed(rule, [[0.37]] * 5000) == [math.inf] * 5000
        assert rule.state_dict()["mean"].item() == 0.37

    def test_adagc_begins_its_warm_up_with_the_first_gradient(self):
        rule = AdaGC(relative_limit=2.0, beta=0.5, warmup_steps=1, absolute_limit=1.0)
        assert feed(rule, [[0.0, 0.0]] * 100) == [[math.inf] * 2] * 100
        assert rule.state_dict()["count"].item() == 0.0
        rows = [[6.0, 8.0], [0.6, 0.0], [0.6, 4.0]]
        assert feed(rule, rows) == [
            [pytest.approx(0.6), pytest.approx(0.8)],
            [pytest.approx(1.2), pytest.approx(1.6)],
            [pytest.approx(1.2), pytest.approx(1.6)],
        ]
        assert rule.state_dict()["gamma"].tolist() == [pytest.approx(0.6), pytest.approx(1.2)]


class TestEndsOfTheRange:
    """Where a product or a square leaves the range of float64."""

    def test_equal_norms_keep_averages_where_they_are(self):
        for norm in (0.1, 1e-300, 1e300, SMALLEST, LARGEST):
            zclip, adagc = ZClip(alpha=0.9, warmup_steps=3), AdaGC(beta=0.9, absolute_limit=1e309)
            for rule in (zclip, adagc):
                for _ in range(1000):
                    total = torch.tensor(norm, dtype=torch.float64)
                    assert (rule.limits(total, total.view(1)) >= norm).all()
            assert zclip.state_dict()["mean"].item() == norm
            assert zclip.state_dict()["variance"].item() == 0.0
            assert adagc.state_dict()["gamma"].tolist() == [norm]

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 0.97, 1.0])
    def test_norms_that_vanish(self, alpha):
        totals = [2.0**-i for i in range(1075)] + [SMALLEST] * 500
        rules = [
            AutoClip(0.0, window=3),
            ZClip(alpha, warmup_steps=2),
            AdaGC(beta=alpha, relative_limit=0.5, warmup_steps=1),
        ]
        for rule in rules:
            limits = [rule.limits(total, total.view(1)) for total in totals_of(totals)]
            assert all((limit > 0.0).all() for limit in limits)

    def test_zclip_of_squares_beyond_the_range(self):
        rule = ZClip(warmup_steps=2)
        found = [rule.limits(total, total.view(1)) for total in totals_of([1e300, 3e300, 1e307])]
        state = rule.state_dict()
        assert [limit.item() for limit in found[:2]] == [math.inf] * 2
        # The deviation ends at 1.3e154, so that the limit is the mean.
        assert found[2].item() == pytest.approx(2e300)
        assert state["mean"].item() == pytest.approx(2e300)
        assert state["variance"].item() <= LARGEST

    def test_zclip_of_thresholds_whose_square_is_beyond_the_range(self):
        past = [[1.0], [3.0]]
        # mean 2, deviation 1; z^2 / z * deviation = z where a norm is just above the threshold.
        found = feed(ZClip(z_threshold=1e160, warmup_steps=2), [*past, [1.5e160]])
        assert found[2] == pytest.approx(1e160 / 1.5, rel=1e-5)
        for tiny in (1e-200, SMALLEST):
            assert feed(ZClip(z_threshold=tiny, warmup_steps=2), [*past, [4.0]])[2] == 2.0
        for huge in (1e160, LARGEST, math.inf):
            rule = ZClip(z_threshold=huge, warmup_steps=2)
            assert feed(rule, [*past, [4.0]])[2] == math.inf

    def test_adagc_of_products_below_the_range(self):
        rule = AdaGC(relative_limit=1e-200, beta=0.5, warmup_steps=1, absolute_limit=1e-200)
        limits = feed(rule, [[1.0]] * 5)
        assert limits[0] == [pytest.approx(1e-200)]
        assert limits[1:] == [[sys.float_info.min]] * 4
        (gamma,) = rule.state_dict()["gamma"].tolist()
        assert gamma == pytest.approx(1e-200 / 16.0)


def totals_of(values):
    return torch.tensor(values, dtype=torch.float64).unbind()


# From the smallest to the largest number, each magnitude as likely as the others.
positive = st.builds(
    lambda exponent, mantissa: min(max(math.ldexp(mantissa, exponent), SMALLEST), LARGEST),
    st.integers(-1074, 1024),
    st.floats(0.5, 1.0, exclude_max=True),
) | st.sampled_from([SMALLEST, 1e-310, sys.float_info.min, 1e-300, 1.0, 1e154, 1e300, LARGEST])
norms = positive | st.sampled_from([0.0, *NONFINITE])
share = st.sampled_from([0.0, SMALLEST, 0.5, 0.97, 1.0]) | st.floats(0.0, 1.0)
factor = positive | st.just(math.inf)
rules = (
    st.builds(AutoClip, share.map(lambda part: 100.0 * part), st.integers(1, 5))
    | st.builds(ZClip, share, factor, st.integers(1, 4), st.none() | factor)
    | st.builds(AdaGC, factor, share, st.integers(0, 3), factor)
)


def histories(elements):
    rows = st.lists(st.tuples(elements, elements), min_size=1, max_size=12)
    # Runs of the same norms find what rounding adds up to.
    return rows | st.builds(lambda some, times: some * times, rows, st.integers(2, 40))


def assert_possible(state):
    """That no number of a state is one that no history leads to."""
    count = state["count"].item()
    assert count >= 0.0 and count.is_integer()
    if "mean" in state:
        mean, variance = state["mean"].item(), state["variance"].item()
        assert (0.0 < mean < math.inf) if count else mean == variance == 0.0
        assert 0.0 <= variance < math.inf
    elif "history" in state:
        kept = state["history"][: int(min(count, state["window"]))]
        assert ((kept > 0.0) & (kept < math.inf)).all()
        assert state["history"][len(kept) :].isnan().all()
    else:
        assert (state["gamma"] > 0.0).all()


@settings(deadline=None, max_examples=400)
@given(rules, histories(norms))
def test_any_history_makes_limits_and_a_state_that_can_be(rule, history):
    for row in history:
        each = torch.tensor(row, dtype=torch.float64)
        # The inf norm, because it stays in the range.
        total = torch.linalg.vector_norm(each, math.inf)
        before = rule.state_dict()
        limits = rule.limits(total, each)
        assert (limits > 0.0).all(), limits
        assert_possible(rule.state_dict())
        if not 0.0 < total.item() < math.inf and len(before.get("gamma", each)):
            assert same_bits(rule.state_dict(), before)
