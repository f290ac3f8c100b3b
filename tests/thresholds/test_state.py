"""The state of a rule: it continues with the same bits, and one that does not fit is refused."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from rules import assert_same_state, by_rule, feed, limits_of, random_norms, with_nonfinite

from gradclip_ext.thresholds import AdaGC, AutoClip

pytestmark = pytest.mark.cpu_only


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
