"""Arguments of the rules: what is said when one is wrong, word for word."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

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


def test_arguments_may_be_numbers_of_numpy():
    assert AutoClip(np.float32(50.0), np.int64(7)).window == 7
