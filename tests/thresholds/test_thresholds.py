"""Thresholds that adapt: against the papers' formulas, written here as plain loops over floats."""

from __future__ import annotations

import copy
import math
import pickle
import random

import numpy as np
import pytest
import reference as ref
import torch
from reference import name_of
from torch._subclasses.fake_tensor import FakeTensorMode

from gradclip_ext.thresholds import AGC, AdaGC, AutoClip, Threshold, ZClip, adaptive_clip_grad_

pytestmark = pytest.mark.cpu_only

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


class TestState:
    # Before the first step, in and at the end of warm-up, before and after the ring is full.
    @pytest.mark.parametrize("steps", [0, 1, 4, 5, 6, 8, 9, 10, 30])
    @by_rule
    def test_continues_with_the_same_bits(self, make, steps, tmp_path):
        rows, _ = with_nonfinite(random_norms(60))
        original = make()
        feed(original, rows[:steps])
        torch.save(original.state_dict(), tmp_path / "state.pt")
        loaded = make()
        feed(loaded, rows[10:17])  # what is loaded replaces all of that
        loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        by_pickle, by_copy = pickle.loads(pickle.dumps(original)), copy.deepcopy(original)
        expected = feed(original, rows[steps:])
        for other in (loaded, by_pickle, by_copy):
            assert feed(other, rows[steps:]) == expected
            assert_same_state(original, other)

    def test_continues_where_the_history_has_grown(self):
        rows = random_norms(400)
        original, loaded = AutoClip(window=300), AutoClip(window=300)
        feed(original, rows[:200])
        loaded.load_state_dict(original.state_dict())
        assert feed(loaded, rows[200:]) == feed(original, rows[200:])

    def test_history_grows_by_doubling(self):
        rule = AutoClip(window=150)
        sizes = []
        for row in random_norms(200):
            limits_of(rule, row)
            sizes.append(rule.state_dict()["history"].numel())
        assert sizes == [64] * 64 + [128] * 64 + [150] * 72

    @by_rule
    def test_is_a_copy_in_both_directions(self, make):
        rows = random_norms(30)
        rule, other, undisturbed = make(), make(), make()
        feed(undisturbed, rows[:12])
        feed(rule, rows[:12])
        state = rule.state_dict()
        other.load_state_dict(state)
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.fill_(7.0)
        expected = feed(undisturbed, rows[12:])
        assert feed(rule, rows[12:]) == expected
        assert feed(other, rows[12:]) == expected

    @by_rule
    def test_holds_tensors_and_numbers_only(self, make):
        rule = make()
        for _ in range(2):
            state = rule.state_dict()
            assert state.pop("rule") == type(rule).__name__
            for value in state.values():
                assert isinstance(value, (int, float, torch.Tensor))
                assert not isinstance(value, torch.Tensor) or value.dtype == torch.float64
            feed(rule, random_norms(3))

    @by_rule
    def test_of_another_rule_is_refused(self, make):
        rule = make()
        feed(rule, random_norms(12))
        before = rule.state_dict()
        name = type(rule).__name__
        other = AutoClip() if name != "AutoClip" else AdaGC()
        with pytest.raises(ValueError) as caught:
            rule.load_state_dict(other.state_dict())
        assert str(caught.value) == (
            f"{name}: state['rule'] has to be {name!r}, found {type(other).__name__!r}"
        )
        with pytest.raises(ValueError) as caught:
            rule.load_state_dict({})
        assert str(caught.value) == f"{name}: state['rule'] has to be {name!r}, found 'nothing'"
        with pytest.raises(TypeError) as caught:
            rule.load_state_dict([1])
        assert str(caught.value) == f"{name}: state has to be a mapping, found list"
        assert_equal_states(rule.state_dict(), before)

    @by_rule
    def test_that_lacks_or_mangles_something_is_refused(self, make):
        rule = make()
        feed(rule, random_norms(12))
        before = rule.state_dict()
        name = type(rule).__name__
        for key, value in before.items():
            if key == "rule":
                continue
            state = rule.state_dict()
            del state[key]
            with pytest.raises(ValueError) as caught:
                rule.load_state_dict(state)
            assert f"{name}: state has to hold " in str(caught.value)
            assert str(caught.value).endswith(f", found none of {key!r}")
            if not isinstance(value, torch.Tensor):
                continue
            form = f"a tensor of {value.dim()} dimensions and dtype torch.float64"
            wrong = {
                "float": 1.0,
                f"{value.dim() + 2} dimensions and dtype torch.float64": value[None, None],
                f"{value.dim()} dimensions and dtype torch.float32": value.float(),
            }
            for found, replacement in wrong.items():
                with pytest.raises(ValueError) as caught:
                    rule.load_state_dict({**before, key: replacement})
                assert str(caught.value) == (
                    f"{name}: state[{key!r}] has to be {form}, found {found}"
                )
        assert_equal_states(rule.state_dict(), before)

    def test_of_another_number_of_parameters_is_refused(self):
        rule, other = AdaGC(), AdaGC()
        feed(rule, random_norms(3, count=3))
        feed(other, random_norms(3, count=4))
        before = rule.state_dict()
        with pytest.raises(ValueError) as caught:
            rule.load_state_dict(other.state_dict())
        assert str(caught.value) == (
            "AdaGC: state['gamma'] has to hold one norm for each of 3 parameters, found 4"
        )
        assert_equal_states(rule.state_dict(), before)

    def test_other_parameters_than_in_the_steps_before_are_refused(self):
        original = AdaGC()
        feed(original, random_norms(3, count=3))
        loaded = AdaGC()
        loaded.load_state_dict(original.state_dict())
        for rule in (original, loaded):
            with pytest.raises(ValueError) as caught:
                limits_of(rule, [1.0] * 4)
            assert str(caught.value) == (
                "AdaGC: norms has to hold one for each of the 3 parameters of the steps before, "
                "found shape (4,)"
            )
            assert_equal_states(rule.state_dict(), original.state_dict())

    def test_history_that_does_not_fit_is_refused(self):
        rule = AutoClip(window=9)
        feed(rule, random_norms(20))
        before = rule.state_dict()
        for change, message in (
            ({"window": 8}, "state['window'] has to be 9, as this object's, found 8"),
            (
                {"history": torch.zeros(10, dtype=torch.float64)},
                "state['history'] has to hold 1 to 9 norms, found 10",
            ),
            (
                {"history": torch.zeros(5, dtype=torch.float64)},
                "state['history'] has to have a place for each of state['count'] norms, "
                "found 5 places for 20.0",
            ),
            (
                {"count": torch.tensor(math.nan, dtype=torch.float64)},
                "state['history'] has to have a place for each of state['count'] norms, "
                "found 9 places for nan",
            ),
        ):
            with pytest.raises(ValueError) as caught:
                rule.load_state_dict({**before, **change})
            assert str(caught.value) == f"AutoClip: {message}"
        assert_equal_states(rule.state_dict(), before)


def assert_equal_states(one, two):
    assert one.keys() == two.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(nan=-1.0), two[key].nan_to_num(nan=-1.0))
        else:
            assert value == two[key]


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


class TestNothingWaitsForTheDevice:
    @by_rule
    def test_nothing_is_read_in_python(self, make, monkeypatch):
        rule = make()
        rows = [
            (torch.linalg.vector_norm(norms), norms)
            for norms in torch.tensor(
                with_nonfinite(random_norms(20))[0], dtype=torch.float64
            ).unbind()
        ]

        def refuse(*_):
            raise AssertionError("a number was read on the host")

        with monkeypatch.context() as patch:
            names = ("item", "tolist", "numpy", "cpu", "__array__")
            names += ("__bool__", "__float__", "__int__", "__index__")
            for name in names:
                patch.setattr(torch.Tensor, name, refuse)
            for total, norms in rows:
                rule.limits(total, norms)

    @by_rule
    def test_runs_where_there_are_no_numbers_to_read(self, make):
        # A fake tensor of a GPU has a device but no values: reading one raises, and so does
        # bringing it together with a tensor of another device.
        rule = make()
        with FakeTensorMode():
            norms = torch.empty(3, dtype=torch.float64, device="cuda")
            total = torch.empty((), dtype=torch.float64, device="cuda")
            for _ in range(12):
                limits = rule.limits(total, norms)
                assert limits.device.type == "cuda"
                assert limits.shape == ((3,) if rule.per_parameter else ())
                state = rule.state_dict()
                tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
                assert all(tensor.device.type == "cuda" for tensor in tensors)
            with pytest.raises(Exception, match="local_scalar_dense"):
                total.item()

    def test_agc_runs_where_there_are_no_numbers_to_read(self):
        with FakeTensorMode():
            for shape in ((), (5,), (4, 5), (4, 3, 2, 2)):
                parameter = torch.empty(shape, device="cuda", requires_grad=True)
                parameter.grad = torch.empty(shape, device="cuda")
                adaptive_clip_grad_(parameter)
                AGC().clip_([("weight", parameter)])

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    @by_rule
    def test_torch_sees_no_synchronization(self, make):
        rows, _ = with_nonfinite(random_norms(150))
        on_host, on_device = make(), make()
        expected = feed(on_host, rows)
        norms = torch.tensor(rows, dtype=torch.float64, device="cuda")
        found = []
        torch.cuda.set_sync_debug_mode("error")
        try:
            for row in norms.unbind():
                found.append(on_device.limits(torch.linalg.vector_norm(row), row))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for mine, other in zip(found, expected, strict=True):
            assert mine.tolist() == pytest.approx(other, rel=1e-10)

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    @by_rule
    def test_state_follows_the_norms_to_another_device(self, make):
        rows = random_norms(30)
        rule, expected = make(), feed(make(), rows)
        found = feed(rule, rows[:12])
        found += [limits_of(rule, row, "cuda").tolist() for row in rows[12:]]
        for mine, other in zip(found, expected, strict=True):
            assert mine == pytest.approx(other, rel=1e-10)


# Shapes of weights: Linear, Conv2d, its bias, Conv1d, a scalar, one row, rows without elements.
SHAPES = [(6, 10), (4, 3, 2, 2), (6,), (5, 3, 4), (), (1, 9), (3, 0)]
AGC_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def units_of(tensor):
    return list(tensor) if tensor.dim() > 1 else [tensor]


def agc_coefficients(weights, gradient, clip_factor, eps):
    """One for each unit, from sums over all its elements."""
    result = []
    for weight_unit, gradient_unit in zip(units_of(weights), units_of(gradient), strict=True):
        weight_norm = math.sqrt(math.fsum(w * w for w in weight_unit.flatten().tolist()))
        norm = math.sqrt(math.fsum(g * g for g in gradient_unit.flatten().tolist()))
        limit = max(weight_norm, eps) * clip_factor
        result.append(limit / max(norm, 1e-6) if norm > limit else 1.0)
    return result


def weights_and_gradient(shape, dtype=torch.float32, seed=0, scale=0.02):
    parameter = torch.nn.Parameter(ref.random_gradient(shape, dtype, seed))
    parameter.grad = ref.random_gradient(shape, dtype, seed + 100, scale)
    if len(shape) > 1 and shape[0] > 2:
        with torch.no_grad():
            parameter[1].zero_()  # its gradient meets eps
            parameter.grad[2].mul_(1e-3)  # nothing to clip
    return parameter


class TestAGC:
    @pytest.mark.parametrize("dtype", AGC_DTYPES, ids=name_of)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_is_the_papers_formula(self, shape, dtype):
        parameter = weights_and_gradient(shape, dtype)
        before = ref.widened(parameter.grad)
        weights = ref.widened(parameter)
        assert adaptive_clip_grad_(parameter) is None
        assert torch.equal(ref.widened(parameter), weights)
        coefficients = agc_coefficients(weights, before, 0.01, 1e-3)
        if len(shape) > 1 and min(shape) > 1:
            assert min(coefficients) < 0.1 and max(coefficients) == 1.0
        units = zip(units_of(parameter.grad), units_of(before), coefficients, strict=True)
        for found, original, coefficient in units:
            ref.assert_scaled(found, original, coefficient)
            if coefficient == 1.0:
                assert torch.equal(ref.widened(found), original)

    def test_complex_gradients(self):
        parameter = weights_and_gradient((6, 10), torch.complex64)
        before = ref.widened(parameter.grad)
        pairs = torch.view_as_real(ref.widened(parameter)), torch.view_as_real(before)
        coefficients = agc_coefficients(*pairs, 0.01, 1e-3)
        adaptive_clip_grad_([parameter])
        for found, original, coefficient in zip(parameter.grad, before, coefficients, strict=True):
            ref.assert_scaled(found, original, coefficient)

    def test_bfloat16_norms_lose_no_bits(self):
        # In bfloat16 the sum of squares would stop at 256 ones.
        parameter = torch.nn.Parameter(torch.ones(1, 2**16, dtype=torch.bfloat16))
        parameter.grad = torch.ones_like(parameter)
        adaptive_clip_grad_(parameter, clip_factor=0.5)
        assert torch.equal(parameter.grad, torch.full_like(parameter.grad, 0.5))

    def test_memory_layouts(self):
        for layout in ref.LAYOUTS.values():
            parameter = ref.parameter(layout(ref.random_gradient((6, 10))))
            before = ref.widened(parameter.grad)
            coefficients = agc_coefficients(ref.widened(parameter), before, 2.0, 0.1)
            adaptive_clip_grad_([parameter], clip_factor=2.0, eps=0.1)
            for found, original, c in zip(parameter.grad, before, coefficients, strict=True):
                ref.assert_scaled(found, original, c)

    def test_units_that_are_not_finite_stay_as_they_are(self):
        parameter = weights_and_gradient((6, 10))
        parameter.grad[0, 3] = math.nan
        parameter.grad[1, 4] = math.inf
        before = parameter.grad.clone()
        coefficients = agc_coefficients(ref.widened(parameter), ref.widened(before), 0.01, 1e-3)
        adaptive_clip_grad_(parameter)
        assert torch.equal(parameter.grad[:2].nan_to_num(7.0), before[:2].nan_to_num(7.0))
        ref.assert_scaled(parameter.grad[5], ref.widened(before[5]), coefficients[5])

    def test_gradients_with_a_graph(self):
        parameter = weights_and_gradient((6, 10))
        plain = weights_and_gradient((6, 10))
        parameter.grad.requires_grad_()
        for one in (parameter, plain):
            adaptive_clip_grad_(one)
        assert torch.equal(parameter.grad, plain.grad)

    def test_excluded_names_are_left_alone(self):
        def model():
            torch.manual_seed(0)
            layers = {
                "conv": torch.nn.Conv2d(3, 4, 3),
                "head": torch.nn.Linear(6, 5),
                "Head": torch.nn.Linear(6, 5),
                "frozen": torch.nn.Linear(2, 2),
            }
            result = torch.nn.ModuleDict(layers)
            for name, parameter in result.named_parameters():
                if not name.startswith("frozen"):
                    parameter.grad = torch.ones_like(parameter)
            return result

        one, two = model(), model()
        AGC(exclude=("head.*", "*.bias")).clip_(one.named_parameters())
        chosen = ["conv.weight", "Head.weight", "frozen.weight"]
        adaptive_clip_grad_(two.get_parameter(name) for name in chosen)
        pairs = zip(one.named_parameters(), two.parameters(), strict=True)
        for (name, mine), other in pairs:
            if name.startswith("frozen"):
                assert mine.grad is None
                continue
            assert torch.equal(mine.grad, other.grad)
            assert torch.equal(mine.grad, torch.ones_like(mine)) == (name not in chosen)

    def test_nothing_to_do(self):
        adaptive_clip_grad_([])
        AGC().clip_([])
        AGC(exclude=["*"]).clip_([("weight", weights_and_gradient((6, 10)))])

    def test_objects_pickle(self):
        rule = pickle.loads(pickle.dumps(AGC(0.02, 1e-2, ["head.*"])))
        assert (rule.clip_factor, rule.eps, rule.exclude) == (0.02, 1e-2, ("head.*",))

    @pytest.mark.parametrize("by_name", [False, True], ids=["function", "class"])
    def test_gradients_that_cannot_be_scaled(self, by_name):
        good = weights_and_gradient((6, 10))
        before = good.grad.clone()
        sparse = torch.nn.Parameter(torch.ones(3, 2))
        sparse.grad = torch.ones(3, 2).to_sparse()
        shared = torch.nn.Parameter(torch.ones(3, 2))
        shared.grad = torch.ones(1).expand(3, 2)
        function, name = ("AGC", "last") if by_name else ("adaptive_clip_grad_", "parameters[1]")
        for parameter, error, message in (
            (sparse, NotImplementedError, "be dense, found layout torch.sparse_coo"),
            (
                shared,
                RuntimeError,
                "have memory for each element, found shape (3, 2) with strides (0, 0); "
                "clone() it first",
            ),
        ):
            with pytest.raises(error) as caught:
                if by_name:
                    AGC().clip_([("first", good), ("last", parameter)])
                else:
                    adaptive_clip_grad_([good, parameter])
            assert str(caught.value) == f"{function}: the gradient of {name} has to {message}"
            assert torch.equal(good.grad, before)

    def test_wrong_parameters(self):
        module = torch.nn.Linear(2, 2)
        pairs = "AGC: named_parameters has to be an iterable of pairs of a name and a tensor, found"
        for value, message in (
            (module, f"{pairs} Linear; pass module.named_parameters()"),
            (dict(module.named_parameters()), f"{pairs} dict; pass module.named_parameters()"),
            (3, f"{pairs} int; pass module.named_parameters()"),
            (
                module.parameters(),
                "AGC: named_parameters[0] has to be a pair of a name and a tensor, "
                "found Parameter; pass module.named_parameters()",
            ),
        ):
            with pytest.raises(TypeError) as caught:
                AGC().clip_(value)
            assert str(caught.value) == message
        with pytest.raises(TypeError) as caught:
            adaptive_clip_grad_(module)
        assert str(caught.value).startswith("adaptive_clip_grad_: parameters has to be")
        with pytest.raises(TypeError) as caught:
            adaptive_clip_grad_(module.named_parameters())
        assert str(caught.value).startswith("adaptive_clip_grad_: parameters[0] has to be")
