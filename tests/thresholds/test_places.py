"""Where a rule's state is born, and where it goes: modes, devices, defaults, copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from rules import assert_same_state, by_rule, feed, limits_of, random_norms

from gradclip_ext.thresholds.rule import FixedThreshold

pytestmark = pytest.mark.cpu_only

ROWS = random_norms(60)


def tensors_of(state):
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


class TestInferenceMode:
    @by_rule
    @pytest.mark.parametrize("steps", [0, 1, 12])
    def test_steps_inside_and_then_outside(self, make, steps):
        rule, expected = make(), feed(make(), ROWS)
        found = feed(rule, ROWS[:steps])
        with torch.inference_mode():
            found += feed(rule, ROWS[steps : steps + 3])
            state = rule.state_dict()
        assert not any(tensor.is_inference() for tensor in tensors_of(state).values())
        found += feed(rule, ROWS[steps + 3 :])
        assert found == expected

    @by_rule
    def test_state_loaded_inside(self, make):
        original, loaded = make(), make()
        feed(original, ROWS[:12])
        with torch.inference_mode():
            state = {
                key: value.clone() if isinstance(value, torch.Tensor) else value
                for key, value in original.state_dict().items()
            }
            loaded.load_state_dict(state)
        assert feed(loaded, ROWS[12:]) == feed(original, ROWS[12:])

    def test_a_number_as_rule(self):
        rule = FixedThreshold(2.0)
        with torch.inference_mode():
            limits_of(rule, [1.0], device="meta")
            assert not limits_of(rule, [1.0]).is_inference()
        assert limits_of(rule, [1.0]).item() == 2.0


class TestDefaults:
    @by_rule
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_another_default_dtype(self, make, dtype):
        expected = feed(make(), ROWS)
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            rule = make()
            assert feed(rule, ROWS) == expected
            loaded = make()
            loaded.load_state_dict(rule.state_dict())
        finally:
            torch.set_default_dtype(before)
        assert {t.dtype for t in tensors_of(loaded.state_dict()).values()} == {torch.float64}
        assert_same_state(rule, loaded)

    @by_rule
    def test_another_default_device(self, make):
        # "meta" holds no numbers, so that nothing that lands there by default can go unnoticed.
        expected = feed(make(), ROWS)
        with torch.device("meta"):
            rule = make()
            found = feed(rule, ROWS[:12])
            loaded = make()
            loaded.load_state_dict(rule.state_dict())
            found += feed(loaded, ROWS[12:30])
        found += feed(loaded, ROWS[30:])
        assert found == expected

    def test_a_number_as_rule(self):
        with torch.device("meta"):
            rule = FixedThreshold(2.0)
        assert limits_of(rule, [1.0]).item() == 2.0


class TestMeta:
    @by_rule
    @pytest.mark.parametrize("steps", [0, 12])
    def test_measures_nothing_there(self, make, steps):
        rule, expected = make(), feed(make(), ROWS)
        found = feed(rule, ROWS[:steps])
        for _ in range(3):
            norms = torch.empty(3, device="meta")
            limits = rule.limits(norms.norm(), norms)
            assert limits.is_meta and limits.dtype == torch.float64
            assert limits.shape == ((3,) if rule.per_parameter else ())
        assert found + feed(rule, ROWS[steps:]) == expected

    def test_a_number_as_rule(self):
        rule = FixedThreshold(2.0)
        assert limits_of(rule, [1.0], device="meta").is_meta
        assert limits_of(rule, [1.0]).item() == 2.0


class TestCopies:
    @by_rule
    @pytest.mark.parametrize("steps", [0, 4, 30])
    def test_after_steps_inside_inference_mode(self, make, steps):
        rule = make()
        with torch.inference_mode():
            feed(rule, ROWS[:steps])
        copies = [copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))]
        # Both go on from the bits of the original, and none writes into another.
        expected = feed(rule, ROWS[steps:])
        for other in copies:
            assert feed(other, ROWS[steps:]) == expected

    @by_rule
    def test_state_is_loaded_with_weights_only(self, make):
        rule, other = make(), make()
        feed(rule, ROWS[:12])
        file = io.BytesIO()
        torch.save({"rules": [rule.state_dict()]}, file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True)["rules"][0])
        assert feed(other, ROWS[12:]) == feed(rule, ROWS[12:])
