"""The rules that the suites of thresholds/ ask, and the steps that they are fed with."""

from __future__ import annotations

import math
import random

import pytest
import torch

from gradclip_ext.thresholds import AdaGC, AutoClip, ZClip

# Short warm-ups and windows, so that few steps cross every border.
RULES = {
    "AutoClip": lambda: AutoClip(percentile=30.0, window=9),
    "AutoClip, one place": lambda: AutoClip(window=1),
    "ZClip": lambda: ZClip(alpha=0.9, z_threshold=2.0, warmup_steps=5),
    "ZClip, max_norm": lambda: ZClip(alpha=0.9, z_threshold=2.0, warmup_steps=5, max_norm=1.2),
    "AdaGC": lambda: AdaGC(beta=0.9, warmup_steps=5),
    "AdaGC, no warm-up": lambda: AdaGC(beta=0.9, warmup_steps=0),
}
by_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())
NONFINITE = (math.nan, math.inf)


def random_norms(steps, count=3, seed=0):
    """A row of norms for each step: mostly near 1, falling slowly, with spikes and zeros."""
    generator = random.Random(seed)
    rows = []
    for step in range(steps):
        row = [math.exp(generator.gauss(-step / 200.0, 0.3)) for _ in range(count)]
        if generator.random() < 0.15:
            row[generator.randrange(count)] *= 50.0
        if generator.random() < 0.1:
            row[generator.randrange(count)] = 0.0
        rows.append(row)
    return rows


def total_of(row):
    return math.sqrt(math.fsum(norm * norm for norm in row))


def limits_of(rule, row, device="cpu"):
    norms = torch.tensor(row, dtype=torch.float64, device=device)
    total = torch.linalg.vector_norm(norms)
    return rule.limits(total, norms)


def feed(rule, rows):
    return [limits_of(rule, row).tolist() for row in rows]


def with_nonfinite(rows, seed=1):
    """The rows with non-finite ones in between, and the places of the others."""
    generator = random.Random(seed)
    mixed, places = [], []
    for row in rows:
        while generator.random() < 0.3:
            bad = list(row)
            bad[generator.randrange(len(bad))] = generator.choice(NONFINITE)
            mixed.append(bad)
        places.append(len(mixed))
        mixed.append(row)
    return mixed, places


def assert_same_state(one, two):
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    for key, value in first.items():
        if key == "history":
            # Buffers of different lengths may hold the same norms.
            assert value[~value.isnan()].tolist() == second[key][~second[key].isnan()].tolist()
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, second[key])
        else:
            assert value == second[key]
