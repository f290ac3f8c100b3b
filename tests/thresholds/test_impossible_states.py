"""States that no steps lead to: refused with nothing changed; and those of earlier versions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import RULES, assert_same_state, by_rule, feed, limits_of, random_norms

from gradclip_ext.thresholds import AGC, AdaGC, AutoClip, ZClip
from gradclip_ext.thresholds.rule import FixedThreshold

pytestmark = pytest.mark.cpu_only

NAN, INF = math.nan, math.inf
WHOLE = f"be a whole number from 0 to {2**53}"
NORM = "be a finite norm greater than 0"
FINITE = "be a finite number that is not negative"


def float64(value):
    return torch.tensor(value, dtype=torch.float64)


def refusal(rule, state):
    """The text with which a state is refused, which must not change the next limits."""
    before = rule.state_dict()
    with pytest.raises(ValueError) as caught:
        rule.load_state_dict(state)
    after = rule.state_dict()
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.view(torch.int64), after[key].view(torch.int64))
    return str(caught.value)


class TestRefused:
    @by_rule
    @pytest.mark.parametrize("count", [-1.0, 2.5, NAN, INF, -INF, 1e300, 2.0**53 + 2.0])
    def test_counts(self, make, count):
        rule = make()
        feed(rule, random_norms(12))
        found = refusal(rule, {**rule.state_dict(), "count": float64(count)})
        assert found == f"{type(rule).__name__}: state['count'] has to {WHOLE}, found {count}"

    @pytest.mark.parametrize("norm", [-1.0, -INF, INF, NAN])
    @pytest.mark.parametrize("steps", [3, 12])
    def test_norms_of_a_history(self, norm, steps):
        rule = AutoClip(window=9)
        feed(rule, random_norms(steps))
        state = rule.state_dict()
        state["history"][2] = norm
        assert refusal(rule, state) == f"AutoClip: state['history'][2] has to {NORM}, found {norm}"

    def test_norms_behind_the_history(self):
        rule = AutoClip(window=9)
        feed(rule, random_norms(3))
        for norm in (1.0, 0.0, INF):
            state = rule.state_dict()
            state["history"][5] = norm
            assert refusal(rule, state) == (
                "AutoClip: state['history'][5] has to be nan, as each place after the 3 norms of "
                f"state['count'], found {norm}"
            )

    @pytest.mark.parametrize("value", [True, "9", 9.0, None, float64(9.0), np.ones(2)], ids=repr)
    def test_a_window_that_is_no_whole_number(self, value):
        rule = AutoClip(window=9)
        feed(rule, random_norms(3))
        assert refusal(rule, {**rule.state_dict(), "window": value}) == (
            f"AutoClip: state['window'] has to be 9, as this object's, found {value!r}"
        )
        one = AutoClip(window=1)
        assert refusal(one, {**one.state_dict(), "window": True}).endswith("found True")

    @pytest.mark.parametrize("key", ["mean", "variance"])
    @pytest.mark.parametrize("number", [-1.0, NAN, INF, -INF])
    def test_averages_of_zclip(self, key, number):
        rule = ZClip(warmup_steps=2)
        feed(rule, random_norms(12))
        found = refusal(rule, {**rule.state_dict(), key: float64(number)})
        assert found == f"ZClip: state['{key}'] has to {FINITE}, found {number}"

    def test_averages_of_nothing(self):
        rule = ZClip()
        fresh = rule.state_dict()
        assert refusal(rule, {**fresh, "mean": float64(5.0)}) == (
            "ZClip: state['mean'] has to be 0, as state['count'] is, found 5.0"
        )
        for count in (0.0, 3.0):
            changes = {"count": float64(count), "variance": float64(5.0)}
            assert refusal(rule, {**fresh, **changes}) == (
                "ZClip: state['variance'] has to be 0, as state['mean'] is, found 5.0"
            )

    @pytest.mark.parametrize("norm", [0.0, -1.0, NAN, -INF])
    def test_averages_of_adagc(self, norm):
        rule = AdaGC()
        feed(rule, random_norms(12))
        state = rule.state_dict()
        state["gamma"][1] = norm
        assert refusal(rule, state) == (
            "AdaGC: state['gamma'][1] has to be a norm greater than 0, or inf for none yet, "
            f"found {norm}"
        )

    def test_averages_of_adagc_without_steps(self):
        rule = AdaGC()
        count, gamma = float64(0.0), float64([INF, 0.5])
        assert refusal(rule, {"rule": "AdaGC", "count": count, "gamma": gamma}) == (
            "AdaGC: state['gamma'][1] has to be inf, as state['count'] is 0, found 0.5"
        )
        assert refusal(rule, {"rule": "AdaGC", "count": count + 5.0, "gamma": gamma[:0]}) == (
            "AdaGC: state['gamma'] has to hold one norm for each parameter of 5 steps, found 0"
        )

    @by_rule
    def test_text_numbers_and_tensors_without_numbers(self, make):
        rule = make()
        feed(rule, random_norms(12))
        state = rule.state_dict()
        name = type(rule).__name__
        for key, value in state.items():
            if not isinstance(value, torch.Tensor):
                continue
            form = f"be a tensor of {value.dim()} dimensions and dtype torch.float64"
            for wrong in ("1.0", True, 1, None, [1.0], np.float64(1.0), value.numpy()):
                found = refusal(rule, {**state, key: wrong})
                assert found == (
                    f"{name}: state[{key!r}] has to {form}, found {type(wrong).__name__}"
                )
            for wrong in (value.bool(), value.to(torch.complex128), value.long()):
                found = refusal(rule, {**state, key: wrong})
                assert found.endswith(f"{value.dim()} dimensions and dtype {wrong.dtype}")
            assert refusal(rule, {**state, key: value.to("meta")}) == (
                f"{name}: state[{key!r}] has to be a dense tensor that holds numbers, "
                "found layout torch.strided on device meta"
            )
            if value.dim():
                assert refusal(rule, {**state, key: value.to_sparse()}).endswith(
                    "that holds numbers, found layout torch.sparse_coo on device cpu"
                )

    @by_rule
    @pytest.mark.parametrize("value", [3, None, float64([1.0, 2.0]), np.ones(2), ["ZClip"]])
    def test_names_that_are_no_text(self, make, value):
        rule = make()
        name = type(rule).__name__
        found = refusal(rule, {**rule.state_dict(), "rule": value})
        assert found == f"{name}: state['rule'] has to be {name!r}, found {value!r}"

    @pytest.mark.parametrize("rule", [AGC(), FixedThreshold(1.0)], ids=lambda r: type(r).__name__)
    def test_states_of_rules_without_one(self, rule):
        name = type(rule).__name__
        rule.load_state_dict(rule.state_dict())
        for wrong in (None, [], "count"):
            with pytest.raises(TypeError) as caught:
                rule.load_state_dict(wrong)
            assert str(caught.value) == (
                f"{name}: state has to be a mapping, found {type(wrong).__name__}"
            )
        with pytest.raises(ValueError):
            rule.load_state_dict({"count": 1.0})

    @settings(deadline=None, max_examples=200)
    @given(st.data())
    def test_what_is_not_refused_makes_limits(self, data):
        rule = data.draw(st.sampled_from(list(RULES.values())))()
        feed(rule, random_norms(data.draw(st.sampled_from([0, 3, 7, 12]))))
        state, before = rule.state_dict(), rule.state_dict()
        tensors = [key for key, value in state.items() if isinstance(value, torch.Tensor)]
        for key in data.draw(st.lists(st.sampled_from(tensors), min_size=1)):
            if not state[key].numel():
                continue
            place = data.draw(st.integers(0, state[key].numel() - 1))
            state[key].view(-1)[place] = data.draw(
                st.sampled_from([0.0, -0.0, 1.0, 5.0, -1.0, 0.5, NAN, INF, 1e-320, 1e300])
            )
        try:
            rule.load_state_dict(state)
        except ValueError:
            for key in tensors:
                after = rule.state_dict()[key]
                assert torch.equal(after.view(torch.int64), before[key].view(torch.int64))
        for row in random_norms(12):
            assert (limits_of(rule, row) > 0.0).all()


class TestTaken:
    @by_rule
    def test_tensors_with_a_graph_or_without_own_memory(self, make):
        rule, loaded = make(), make()
        feed(rule, [[1.0, 1.0, 1.0]] * 12)
        state = {
            key: value[..., None].expand(*value.shape, 2)[..., 1].requires_grad_() * 1.0
            if isinstance(value, torch.Tensor)
            else value
            for key, value in rule.state_dict().items()
        }
        loaded.load_state_dict(state)
        rows = random_norms(12)
        assert feed(loaded, rows) == feed(rule, rows)
        tensors = [v for v in loaded.state_dict().values() if isinstance(v, torch.Tensor)]
        assert not any(tensor.requires_grad for tensor in tensors)

    def test_a_history_in_memory_that_repeats(self):
        rule, loaded = AutoClip(window=9), AutoClip(window=9)
        feed(rule, [[3.0, 4.0]] * 9)
        state = rule.state_dict()
        loaded.load_state_dict({**state, "history": float64([5.0]).expand(9)})
        rows = random_norms(12)
        assert feed(loaded, rows) == feed(rule, rows)


class TestOfEarlierVersions:
    """Which counted norms of 0."""

    @pytest.mark.parametrize("steps", [3, 12, 20])
    def test_autoclip_leaves_zeros_out(self, steps):
        # The ring is not full, or just full: nothing has been pushed out.
        rows = random_norms(steps)
        rows[::3] = [[0.0] * 3] * len(rows[::3])
        totals = [limits_of(AutoClip(), row).item() for row in rows]
        history = float64([0.0 if total == INF else total for total in totals])
        capacity = 20
        padding = torch.full((capacity - steps,), NAN, dtype=torch.float64)
        old = {"rule": "AutoClip", "window": 20, "count": float64(steps * 1.0)}
        loaded, expected = AutoClip(window=20), AutoClip(window=20)
        loaded.load_state_dict({**old, "history": torch.cat([history, padding])})
        feed(expected, rows)
        assert_same_state(loaded, expected)
        rows = random_norms(60, seed=1)
        assert feed(loaded, rows) == feed(expected, rows)

    def test_autoclip_keeps_what_a_full_ring_still_has_in_order(self):
        # 1 2 0 4 5 6 in a ring of 4: the next norm goes where 0 lies.
        loaded = AutoClip(window=4)
        history, count = float64([5.0, 6.0, 0.0, 4.0]), float64(6.0)
        loaded.load_state_dict(
            {"rule": "AutoClip", "window": 4, "count": count, "history": history}
        )
        state = loaded.state_dict()
        assert state["count"].item() == 3.0
        assert state["history"][:3].tolist() == [4.0, 5.0, 6.0] and state["history"][3].isnan()
        expected = AutoClip(window=4)
        feed(expected, [[4.0], [5.0], [6.0]])
        assert feed(loaded, [[float(n)] for n in range(7, 20)]) == feed(
            expected, [[float(n)] for n in range(7, 20)]
        )

    def test_autoclip_of_zeros_alone_starts_afresh(self):
        loaded = AutoClip(window=4)
        history = torch.zeros(4, dtype=torch.float64)
        old = {"rule": "AutoClip", "window": 4, "count": float64(9.0), "history": history}
        loaded.load_state_dict(old)
        rows = random_norms(20)
        assert feed(loaded, rows) == feed(AutoClip(window=4), rows)

    def test_zclip_of_zeros_alone_starts_afresh(self):
        loaded = ZClip(warmup_steps=5)
        old = {"rule": "ZClip", "mean": float64(0.0), "variance": float64(0.0)}
        loaded.load_state_dict({**old, "count": float64(5000.0)})
        rows = random_norms(40)
        assert feed(loaded, rows) == feed(ZClip(warmup_steps=5), rows)

    def test_zclip_keeps_averages_that_zeros_made_smaller(self):
        loaded = ZClip()
        state = {"mean": float64(0.3), "variance": float64(0.2), "count": float64(40.0)}
        loaded.load_state_dict({"rule": "ZClip", **state})
        assert {key: loaded.state_dict()[key] for key in state} == state
