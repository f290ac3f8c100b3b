"""Arguments of the rules: the error for each wrong one, word for word."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from rules import feed, random_norms

from gradclip_ext.thresholds import AGC, AdaGC, AutoClip, ZClip, adaptive_clip_grad_

pytestmark = pytest.mark.cpu_only

WHOLE = "a whole number that is at least"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AutoClip(percentile=120),
            "AutoClip: percentile has to be a number from 0 to 100, found 120",
        ),
        (
            lambda: AutoClip(-1.0),
            "AutoClip: percentile has to be a number from 0 to 100, found -1.0",
        ),
        (
            lambda: AutoClip(math.nan),
            "AutoClip: percentile has to be a number from 0 to 100, found nan",
        ),
        (
            lambda: AutoClip(window=0),
            "AutoClip: window has to be a whole number from 1 to 16777216, found 0",
        ),
        (
            lambda: AutoClip(window=2**24 + 1),
            "AutoClip: window has to be a whole number from 1 to 16777216, found 16777217",
        ),
        (lambda: ZClip(alpha=1.5), "ZClip: alpha has to be a number from 0 to 1, found 1.5"),
        (lambda: ZClip(alpha=math.nan), "ZClip: alpha has to be a number from 0 to 1, found nan"),
        (
            lambda: ZClip(z_threshold=0),
            "ZClip: z_threshold has to be a number greater than 0, found 0",
        ),
        (
            lambda: ZClip(z_threshold=math.nan),
            "ZClip: z_threshold has to be a number greater than 0, found nan",
        ),
        (lambda: ZClip(warmup_steps=0), f"ZClip: warmup_steps has to be {WHOLE} 1, found 0"),
        (
            lambda: ZClip(max_norm=-1.0),
            "ZClip: max_norm has to be a number greater than 0, found -1.0",
        ),
        (
            lambda: AdaGC(relative_limit=0.0),
            "AdaGC: relative_limit has to be a number greater than 0, found 0.0",
        ),
        (lambda: AdaGC(beta=-0.1), "AdaGC: beta has to be a number from 0 to 1, found -0.1"),
        (lambda: AdaGC(warmup_steps=-1), f"AdaGC: warmup_steps has to be {WHOLE} 0, found -1"),
        (
            lambda: AdaGC(absolute_limit=math.nan),
            "AdaGC: absolute_limit has to be a number greater than 0, found nan",
        ),
        (lambda: AGC(0.0), "AGC: clip_factor has to be a number greater than 0, found 0.0"),
        (lambda: AGC(eps=math.nan), "AGC: eps has to be a number greater than 0, found nan"),
        (
            lambda: adaptive_clip_grad_([], -0.01),
            "adaptive_clip_grad_: clip_factor has to be a number greater than 0, found -0.01",
        ),
        (
            lambda: adaptive_clip_grad_([], eps=0),
            "adaptive_clip_grad_: eps has to be a number greater than 0, found 0",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_outside_their_range(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AutoClip("10"),
            "AutoClip: percentile has to be a number from 0 to 100, found '10'",
        ),
        (
            lambda: AutoClip(window=9.0),
            "AutoClip: window has to be a whole number from 1 to 16777216, found 9.0",
        ),
        (
            lambda: ZClip(torch.tensor(0.5)),
            "ZClip: alpha has to be a number from 0 to 1, found tensor(0.5000)",
        ),
        (
            lambda: ZClip(warmup_steps=torch.tensor(3)),
            f"ZClip: warmup_steps has to be {WHOLE} 1, found tensor(3)",
        ),
        (
            lambda: AdaGC(None),
            "AdaGC: relative_limit has to be a number greater than 0, found None",
        ),
        (
            lambda: AdaGC(warmup_steps=True),
            f"AdaGC: warmup_steps has to be {WHOLE} 0, found True",
        ),
        (
            lambda: AGC(exclude="head.*"),
            "AGC: exclude has to be an iterable of patterns, found 'head.*'",
        ),
        (lambda: AGC(exclude=[1]), "AGC: exclude[0] has to be a str, found 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_of_the_wrong_type(make, message):
    with pytest.raises(TypeError) as caught:
        make()
    assert str(caught.value) == message


def settings_of(rule):
    return {name: value for name, value in vars(rule).items() if not name.startswith("_")}


@pytest.mark.parametrize(
    ("rule", "same"),
    [
        (AutoClip(np.float32(50.0), np.int64(7)), AutoClip(50.0, 7)),
        (AutoClip(np.longdouble(50.0), np.array(7)), AutoClip(50.0, 7)),
        (AutoClip(Fraction(25, 2)), AutoClip(12.5)),
        (
            ZClip(Fraction(1, 2), np.float16(2.5), np.uint8(3), Fraction(3, 2)),
            ZClip(0.5, 2.5, 3, 1.5),
        ),
        (ZClip(np.float64(0.1), np.int8(2), max_norm=np.uint64(4)), ZClip(0.1, 2, max_norm=4)),
        (AdaGC(Fraction(3, 2), np.float32(0.5), np.int16(4), np.int64(2)), AdaGC(1.5, 0.5, 4, 2)),
        (AGC(Fraction(1, 64), np.float16(0.5)), AGC(0.015625, 0.5)),
    ],
    ids=lambda rule: f"{type(rule).__name__}{tuple(settings_of(rule).values())}",
)
def test_arguments_may_be_numbers_of_numpy_and_fractions(rule, same):
    found = settings_of(rule)
    assert found == settings_of(same)
    # Numbers of numpy would make steps slower, and end up in what users pickle.
    assert {type(value) for value in found.values()} <= {int, float, tuple, type(None)}
    if not isinstance(rule, AGC):
        rows = random_norms(30)
        assert feed(rule, rows) == feed(same, rows)


def test_fractions_and_numbers_of_numpy_outside_their_range():
    for make, found in (
        (lambda: ZClip(Fraction(3, 2)), "3/2"),
        (lambda: ZClip(np.float32(1.5)), "1.5"),
        (lambda: ZClip(np.float64(math.nan)), "nan"),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        assert str(caught.value) == f"ZClip: alpha has to be a number from 0 to 1, found {found}"


@pytest.mark.parametrize("rule", [ZClip, AdaGC])
def test_a_warm_up_without_end(rule):
    rows = random_norms(10)
    assert feed(rule(warmup_steps=10**400), rows) == feed(rule(warmup_steps=10), rows)
