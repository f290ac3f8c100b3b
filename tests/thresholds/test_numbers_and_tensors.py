"""Rules compute with numbers where the host knows them, else with tensors: both ways alike."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from models import Watching, make_model, set_gradients
from rules import assert_same_state, by_rule, feed, random_norms, with_nonfinite

from gradclip_ext import AdaGC, AutoClip, GradClipper, TimesLimit, ZClip, _ops

pytestmark = pytest.mark.cpu_only

ROWS, _ = with_nonfinite(random_norms(120))
# Where torch fuses the multiplication and the addition of lerp, the last bits differ.
EQUAL = {"rel": 1e-13, "nan_ok": True}


def by_watching(rule, rows):
    with Watching():
        return feed(rule, rows)


def flat(limits):
    return [
        number for limit in limits for number in (limit if isinstance(limit, list) else [limit])
    ]


class TestNumbersAndTensors:
    @by_rule
    def test_the_same_limits(self, make):
        assert flat(feed(make(), ROWS)) == pytest.approx(flat(by_watching(make(), ROWS)), **EQUAL)

    @by_rule
    @pytest.mark.parametrize("every", [1, 2, 7])
    def test_taking_turns(self, make, every):
        rule, expected = make(), flat(feed(make(), ROWS))
        found = []
        for begin in range(0, len(ROWS), every):
            some = ROWS[begin : begin + every]
            found += (by_watching if begin // every % 2 else feed)(rule, some)
        assert flat(found) == pytest.approx(expected, **EQUAL)

    @by_rule
    def test_the_same_state(self, make):
        on_host, in_tensors = make(), make()
        feed(on_host, ROWS)
        by_watching(in_tensors, ROWS)
        one, two = on_host.state_dict(), in_tensors.state_dict()
        assert one.keys() == two.keys()
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                assert (value.dtype, value.dim()) == (torch.float64, two[key].dim())
                assert value.tolist() == pytest.approx(two[key].tolist(), **EQUAL)
            else:
                assert value == two[key]

    @by_rule
    @pytest.mark.parametrize("ways", [(feed, by_watching), (by_watching, feed)], ids=["to", "from"])
    def test_saved_in_one_and_loaded_into_the_other(self, make, ways):
        first, then = ways
        rule, expected = make(), flat(feed(make(), ROWS))
        found = flat(first(rule, ROWS[:40]))
        loaded = make()
        then(loaded, ROWS[3:9])
        loaded.load_state_dict(rule.state_dict())
        assert_same_state(rule, loaded)
        assert found + flat(then(loaded, ROWS[40:])) == pytest.approx(expected, **EQUAL)

    @by_rule
    def test_limits_are_new_tensors(self, make):
        rule, other = make(), make()
        for row in ROWS:
            norms = torch.tensor(row, dtype=torch.float64)
            total = torch.linalg.vector_norm(norms)
            limits = rule.limits(total, norms)
            assert limits.tolist() == pytest.approx(feed(other, [row])[0], nan_ok=True)
            # None of these is part of the state.
            for tensor in (limits, norms, total):
                tensor.fill_(-7.0)


class TestStatesAreSnapshots:
    @by_rule
    def test_steps_do_not_change_what_was_saved(self, make):
        rule = make()
        feed(rule, ROWS[:30])
        state = rule.state_dict()
        before = pickle.dumps({key: repr(value) for key, value in state.items()})
        feed(rule, ROWS[30:])
        assert pickle.dumps({key: repr(value) for key, value in state.items()}) == before

    @by_rule
    def test_of_a_fresh_rule_that_was_loaded(self, make):
        rule = make()
        rule.load_state_dict(make().state_dict())
        assert feed(rule, ROWS) == feed(make(), ROWS)

    @by_rule
    def test_copies_share_nothing(self, make):
        rule = make()
        feed(rule, ROWS[:30])
        copies = [copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))]
        state = repr(rule.state_dict())
        for each in copies:
            feed(each, ROWS[30:])
        assert repr(rule.state_dict()) == state


def test_a_large_history_is_that_of_numpy():
    rule = AutoClip(37.0, window=50)
    rows = [[abs(row[0]) + 0.1] for row in random_norms(400)]
    found = feed(rule, rows)
    for step in (0, 1, 48, 49, 50, 51, 399):
        past = torch.tensor(rows[max(0, step - 49) : step + 1], dtype=torch.float64)
        assert found[step] == pytest.approx(torch.quantile(past, 0.37).item(), rel=1e-12)


def test_equal_norms_leave_the_history_one_by_one():
    rule = AutoClip(50.0, window=3)
    assert feed(rule, [[2.0], [2.0], [2.0], [8.0], [8.0], [8.0]]) == [2.0, 2.0, 2.0, 2.0, 8.0, 8.0]


@by_rule
@pytest.mark.parametrize("total", [0.0, 1.0, math.inf])
def test_no_parameters(make, total):
    for watching in (False, True):
        limits = (by_watching if watching else feed)(make(), [[]] * 3)
        rule = make()
        asked = rule.limits(torch.tensor(total), torch.empty(0))
        assert len(limits) == 3
        assert asked.shape == ((0,) if rule.per_parameter else ())


class TestInAClipper:
    @pytest.mark.parametrize(
        "make", [AutoClip, lambda: ZClip(warmup_steps=3), AdaGC], ids=["AutoClip", "ZClip", "AdaGC"]
    )
    def test_looking_for_spikes_leaves_the_rule_as_it_is(self, make):
        model = make_model()
        rule, other = make(), make()
        looking = GradClipper(model, rule, skip_above=TimesLimit(1e6))
        plain = GradClipper(model, other)
        for seed in range(6):
            for clipper in (looking, plain):
                set_gradients(model, seed)
                clipper.clip_()
            assert repr(rule.state_dict()) == repr(other.state_dict())
        before = repr(rule.state_dict())
        set_gradients(model, 7, scale=1e9)
        looking.clip_()
        assert repr(rule.state_dict()) == before

    @pytest.mark.parametrize("base", [AutoClip, ZClip, AdaGC])
    def test_a_subclass_with_limits_of_its_own(self, base):
        class Halved(base):
            def limits(self, total, norms):
                assert isinstance(total, torch.Tensor) and total.dtype == torch.float64
                return super().limits(total, norms) / 2.0

        model = make_model()
        plain, halved = GradClipper(model, base()), GradClipper(model, Halved())
        for seed in range(4):
            for clipper in (plain, halved):
                set_gradients(model, seed)
                clipper.clip_()
            expected = [limit / 2.0 for limit in plain.report().limits]
            assert list(halved.report().limits) == pytest.approx(expected)

    def test_limits_that_are_replaced_on_the_object(self):
        model, rule, asked = make_model(), ZClip(), []
        own = rule.limits
        rule.limits = lambda total, norms: asked.append(total) or own(total, norms)
        clipper = GradClipper(model, rule)
        clipper.clip_()
        assert len(asked) == 1 and isinstance(asked[0], torch.Tensor)

    def test_the_graph_is_not_recorded_for_rules_of_the_users_own(self):
        class Learned:
            per_parameter = False
            epsilon = 0.0

            def __init__(self):
                self.limit = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

            def limits(self, total, norms):
                assert not torch.is_grad_enabled()
                return self.limit * 2.0

            def state_dict(self):
                return {}

            def load_state_dict(self, state):
                pass

        model = make_model()
        assert not GradClipper(model, Learned()).clip_().requires_grad
        assert torch.is_grad_enabled()

    def test_found_inf_is_set_right_whatever_was_written_to_it(self):
        model = make_model()
        clipper = GradClipper(model, 1.0, nonfinite="skip")
        for number, value, expected in ((1.0, 5.0, 0.0), (math.nan, 0.0, 1.0), (1.0, 1.0, 0.0)):
            set_gradients(model)
            model[0].bias.grad[0] = number
            clipper.found_inf.fill_(value)
            clipper.clip_()
            assert clipper.found_inf.item() == expected


@pytest.mark.parametrize(
    "number",
    [
        torch.tensor(2.5, dtype=torch.float64),
        torch._neg_view(torch.tensor(-2.5, dtype=torch.float64)),
        torch._neg_view(torch.tensor([-2.5])),
        torch.tensor([1.0, 2.5, 3.0], dtype=torch.float64)[1],
        torch.tensor(2.5, dtype=torch.bfloat16),
    ],
    ids=["plain", "negated", "negated float32", "view", "bfloat16"],
)
def test_numbers_are_read_as_item_reads_them(number):
    assert _ops.known(number) == number.item() == 2.5


class TestAveragesKnownToBeComplete:
    """AdaGC remembers which averages it knows to be complete; those of another state may not be."""

    def test_a_new_parameter(self):
        rule = AdaGC(warmup_steps=0, relative_limit=2.0)
        feed(rule, [[1.0, 1.0]] * 3)
        rule.rearrange([0, 1, None])
        assert feed(rule, [[1.0, 1.0, 50.0]]) == [[2.0, 2.0, math.inf]]
        assert rule.state_dict()["gamma"].tolist() == [1.0, 1.0, 50.0]

    def test_a_loaded_state(self):
        rule = AdaGC(warmup_steps=0, relative_limit=2.0)
        other = AdaGC(warmup_steps=0, relative_limit=2.0)
        feed(other, [[1.0, 0.0]])
        feed(rule, [[1.0, 1.0]] * 3)
        rule.load_state_dict(other.state_dict())
        assert feed(rule, [[1.0, 50.0]]) == [[2.0, math.inf]]
        assert rule.state_dict()["gamma"].tolist() == [1.0, 50.0]

    def test_a_parameter_without_a_gradient(self):
        rule = AdaGC(warmup_steps=0, relative_limit=2.0)
        feed(rule, [[1.0, 1.0], [1.0, 0.0]])
        assert rule.state_dict()["gamma"].tolist() == [1.0, 1.0]


def test_a_quiet_step_of_adagc_reports_1_and_changes_nothing_but_versions():
    model = make_model()
    set_gradients(model)
    clipper = GradClipper(model, AdaGC(warmup_steps=0, relative_limit=2.0))
    clipper.clip_()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    versions = [parameter.grad._version for parameter in model.parameters()]
    clipper.clip_()
    assert clipper.report().coefficient == 1.0
    for parameter, gradient, version in zip(model.parameters(), before, versions, strict=True):
        assert torch.equal(parameter.grad, gradient)
        assert parameter.grad._version > version
