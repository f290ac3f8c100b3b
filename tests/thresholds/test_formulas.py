"""Thresholds that adapt: against the papers' formulas, written here as plain loops over floats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from rules import (
    NONFINITE,
    assert_same_state,
    by_rule,
    feed,
    limits_of,
    random_norms,
    total_of,
    with_nonfinite,
)

from gradclip_ext.thresholds import AGC, AdaGC, AutoClip, Threshold, ZClip

pytestmark = pytest.mark.cpu_only

# The papers' formulas.


def autoclip_loop(rows, percentile, window):
    history, limits = [], []
    for row in rows:
        history.append(total_of(row))
        limits.append(float(np.percentile(history[-window:], percentile)))
    return limits


def zclip_loop(rows, alpha, z_threshold, warmup_steps, max_norm):
    collected, limits = [], []
    mean = variance = math.nan
    for row in rows:
        norm, limit = total_of(row), math.inf
        if len(collected) < warmup_steps:
            collected.append(norm)
            mean, variance = float(np.mean(collected)), float(np.var(collected))
        else:
            deviation = math.sqrt(variance)
            z = (norm - mean) / (deviation + 1e-6)
            if z > z_threshold:
                limit = norm = mean + z_threshold**2 / z * deviation
            mean = alpha * mean + (1.0 - alpha) * norm
            variance = alpha * variance + (1.0 - alpha) * (norm - mean) ** 2
        limits.append(limit if max_norm is None else min(limit, max_norm))
    return limits


def adagc_loop(rows, relative_limit, beta, warmup_steps, absolute_limit):
    gamma = [math.inf] * len(rows[0])
    limits = []
    for step, row in enumerate(rows):
        total = total_of(row)
        coefficient = min(absolute_limit / total, 1.0) if total > 0.0 else 1.0
        limits.append([])
        for i, norm in enumerate(row):
            warming = step < warmup_steps
            limit = norm * coefficient if warming else relative_limit * gamma[i]
            limits[-1].append(limit)
            if norm == 0.0:
                continue
            clipped = min(norm, limit)
            if warming:
                gamma[i] = min(gamma[i], clipped)
            elif gamma[i] == math.inf:
                gamma[i] = clipped
            else:
                gamma[i] = beta * gamma[i] + (1.0 - beta) * clipped
    return limits


@pytest.mark.parametrize("percentile", [0, 10.0, 37.5, 50.0, 100])
@pytest.mark.parametrize("window", [1, 2, 7, 63, 64, 65, 130, 10_000])
def test_autoclip_is_the_percentile_of_the_last_norms(percentile, window):
    rows = random_norms(300)
    found = feed(AutoClip(percentile, window), rows)
    assert found == pytest.approx(autoclip_loop(rows, percentile, window), rel=1e-12)


@pytest.mark.parametrize("max_norm", [None, 1.2])
@pytest.mark.parametrize("warmup_steps", [1, 2, 25])
@pytest.mark.parametrize(("alpha", "z_threshold"), [(0.97, 2.5), (0.5, 1.0), (0.0, 2.0), (1, 1)])
def test_zclip_is_the_papers_formula(alpha, z_threshold, warmup_steps, max_norm):
    rows = random_norms(200)
    expected = zclip_loop(rows, alpha, z_threshold, warmup_steps, max_norm)
    if max_norm is None:
        assert any(limit < math.inf for limit in expected[warmup_steps:])
        assert expected[:warmup_steps] == [math.inf] * warmup_steps
    found = feed(ZClip(alpha, z_threshold, warmup_steps, max_norm), rows)
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 100])
@pytest.mark.parametrize(
    ("relative_limit", "beta", "absolute_limit"),
    [(1.05, 0.98, 1.0), (2.0, 0.5, 100.0), (1.0, 1, 0.1), (1.05, 0.0, math.inf)],
)
def test_adagc_is_the_papers_formula(relative_limit, beta, absolute_limit, warmup_steps):
    rows = random_norms(200, count=5)
    expected = adagc_loop(rows, relative_limit, beta, warmup_steps, absolute_limit)
    found = feed(AdaGC(relative_limit, beta, warmup_steps, absolute_limit), rows)
    for mine, other in zip(found, expected, strict=True):
        assert mine == pytest.approx(other, rel=1e-12)


def test_defaults_are_the_papers():
    assert (AutoClip().percentile, AutoClip().window) == (10.0, 10_000)
    zclip = ZClip()
    assert (zclip.alpha, zclip.z_threshold, zclip.warmup_steps, zclip.max_norm) == (
        0.97,
        2.5,
        25,
        None,
    )
    adagc = AdaGC()
    assert (adagc.relative_limit, adagc.beta, adagc.warmup_steps, adagc.absolute_limit) == (
        1.05,
        0.98,
        100,
        1.0,
    )
    assert (AGC().clip_factor, AGC().eps, AGC().exclude) == (0.01, 1e-3, ())


@by_rule
def test_limits_have_the_form_that_the_protocol_promises(make):
    rule = make()
    assert isinstance(rule, Threshold)
    assert rule.epsilon == 0.0
    for row in random_norms(12):
        limits = limits_of(rule, row)
        assert limits.dtype == torch.float64
        assert limits.shape == ((3,) if rule.per_parameter else ())
        assert not limits.isnan().any()


@by_rule
def test_state_keeps_no_graph(make):
    rule = make()
    for row in random_norms(8):
        norms = torch.tensor(row, dtype=torch.float64, requires_grad=True)
        limits = rule.limits(torch.linalg.vector_norm(norms), norms)
        assert not limits.requires_grad
    tensors = [value for value in rule.state_dict().values() if isinstance(value, torch.Tensor)]
    assert tensors and not any(tensor.requires_grad for tensor in tensors)


class TestParametersWithoutGradient:
    def test_adagc_does_not_clip_before_the_first_gradient_and_follows_it_after(self):
        rule = AdaGC(relative_limit=1.5, beta=0.5, warmup_steps=2)
        rows = [[0.5, 0.0], [0.5, 0.0], [0.5, 0.0], [0.5, 8.0], [0.5, 8.0], [0.5, 100.0]]
        of_second = [limits[1] for limits in feed(rule, rows)]
        assert of_second == [0.0, 0.0, math.inf, math.inf, 12.0, 12.0]

    def test_adagc_keeps_the_average_where_there_is_no_gradient(self):
        rule = AdaGC(relative_limit=2.0, beta=0.5, warmup_steps=1)
        assert feed(rule, [[0.5], [0.0], [0.0]]) == [[0.5], [1.0], [1.0]]

    @by_rule
    def test_nothing_but_zeros(self, make):
        rule = make()
        for limits in feed(rule, [[0.0, 0.0]] * 12):
            assert not np.isnan(limits).any()


class TestNonfinite:
    @by_rule
    def test_leaves_the_statistics_as_they_were(self, make):
        rows = random_norms(80)
        mixed, places = with_nonfinite(rows)
        assert len(mixed) > len(rows) + 20
        undisturbed, disturbed = make(), make()
        expected = feed(undisturbed, rows)
        found = feed(disturbed, mixed)
        assert [found[place] for place in places] == expected
        assert_same_state(undisturbed, disturbed)

    @by_rule
    @pytest.mark.parametrize("value", NONFINITE)
    def test_first_of_all(self, make, value):
        rule = make()
        for limits in feed(rule, [[value, 1.0, 1.0]] * 20):
            limits = np.atleast_1d(limits)
            assert np.isinf(limits).all() or (rule_max_norm(rule) == limits).all()
        fresh = make()
        rows = random_norms(20)
        assert feed(rule, rows) == feed(fresh, rows)

    @pytest.mark.parametrize("value", NONFINITE)
    def test_limit_is_that_of_the_steps_before(self, value):
        bad = [value, 1.0]
        assert feed(AutoClip(50.0), [[3.0, 4.0], bad])[1] == 5.0
        assert feed(AutoClip(50.0, window=1), [[3.0, 4.0], bad, bad])[2] == 5.0
        assert feed(ZClip(warmup_steps=2), [[3.0, 4.0], [0.0, 7.0], bad])[2] == 6.0
        assert feed(ZClip(warmup_steps=2, max_norm=2.0), [[3.0, 4.0], [0.0, 7.0], bad])[2] == 2.0
        assert feed(AdaGC(2.0, warmup_steps=1), [[0.25, 0.5], bad])[1] == [0.5, 1.0]
        assert feed(AdaGC(2.0, warmup_steps=9), [[0.25, 0.5], bad])[1] == [0.5, 1.0]

    def test_infinite_total_of_finite_norms(self):
        rule = AdaGC(2.0, warmup_steps=9)
        norms = torch.tensor([0.5, 0.25], dtype=torch.float64)
        rule.limits(torch.linalg.vector_norm(norms), norms)
        rule.limits(torch.tensor(math.inf, dtype=torch.float64), norms)
        assert rule.state_dict()["gamma"].tolist() == [0.5, 0.25]


def rule_max_norm(rule):
    return getattr(rule, "max_norm", None)
