"""Whatever holds parameters: read once each, and noticed when it changes."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import reference as ref
import torch
from models import gradients_of, make_model
from torch import nn

from gradclip_ext import AdaGC, AutoClip, GradClipper, grad_norms


def parameter(*numbers):
    result = nn.Parameter(torch.zeros(len(numbers)))
    result.grad = torch.tensor(numbers)
    return result


def sgd(*groups):
    return torch.optim.SGD([{"params": list(group)} for group in groups], lr=0.1)


def head_is_left_out(name, parameter):
    return not name.startswith("2.")


class TestTied:
    """A parameter that comes twice counts once, where it comes first."""

    def sources(self, one, two):
        """Each holds `one`, `two`, `one`, and once more."""
        return {
            "list": [one, two, one, one],
            "tuple": (one, two, one, one),
            "pairs": [("a", one), ("b", two), ("c", one), ("a", one)],
            "group": [{"params": [one, two, one, one]}],
            "groups": [{"params": [one]}, {"params": [two, one]}, {"params": [one, two]}],
            "optimizers": [sgd([one]), sgd([two, one]), sgd([one])],
        }

    @pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
    @pytest.mark.parametrize("kind", ["list", "tuple", "pairs", "group", "groups", "optimizers"])
    def test_counts_once(self, kind):
        one, two = parameter(3.0, 0.0), parameter(0.0, 4.0)
        source = self.sources(one, two)[kind]
        measured = grad_norms(source)
        assert measured.total.item() == 5.0
        assert measured.norms.tolist() == [3.0, 4.0]
        assert len(measured.names) == 2
        clipper = GradClipper(source, 1.0)
        assert clipper.clip_().item() == 5.0
        assert one.grad.tolist() == pytest.approx([0.6, 0.0])
        assert two.grad.tolist() == pytest.approx([0.0, 0.8])
        assert clipper.report().norms == (3.0, 4.0)

    def test_decay_is_added_once(self):
        one = parameter(1.0)
        one.data.fill_(10.0)
        assert GradClipper([one, one], math.inf, weight_decay=0.5).clip_().item() == 6.0
        assert one.grad.item() == 6.0

    def test_first_name_wins(self):
        one, two = parameter(3.0), parameter(4.0)
        assert grad_norms([one, one, two]).names == ("parameters[0]", "parameters[2]")
        pairs = [("embedding", one), ("head", one), ("bias", two)]
        assert grad_norms(pairs).names == ("embedding", "bias")

    def test_belongs_to_the_first_group(self):
        one, two = parameter(3.0), parameter(4.0)
        groups = [{"params": [one]}, {"params": [one]}, {"params": [two, one]}]
        clipper = GradClipper(groups, [1.5, 0.001, 1.0])
        clipper.clip_()
        assert one.grad.item() == pytest.approx(1.5)
        assert two.grad.item() == pytest.approx(1.0)
        assert clipper.report().limits == (1.5, math.inf, 1.0)

    def test_tied_in_a_module(self):
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        model[1].weight = model[0].weight
        model[0].weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        assert GradClipper(model, 1.0).clip_().item() == 5.0
        pairs = model.named_parameters(remove_duplicate=False)
        assert grad_norms(pairs).names == ("0.weight",)


class TestReloadedOptimizer:
    def test_load_state_dict_then_a_new_group(self):
        old, new = parameter(3.0), parameter(4.0)
        optimizer = sgd([old])
        clipper = GradClipper(optimizer, 1.0)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.add_param_group({"params": [new]})
        assert clipper.clip_().item() == 5.0
        assert [old.grad.item(), new.grad.item()] == pytest.approx([0.6, 0.8])

    def test_load_state_dict_is_no_change(self, monkeypatch):
        optimizer = sgd([parameter(3.0)], [parameter(4.0)])
        clipper = GradClipper(optimizer, 1.0)
        optimizer.load_state_dict(optimizer.state_dict())
        monkeypatch.setattr(clipper._collection, "_collect", lambda: pytest.fail("collected again"))
        assert clipper.clip_().item() == 5.0

    @pytest.mark.parametrize("whole", [True, False], ids=["optimizer", "param_groups"])
    @pytest.mark.parametrize(
        "change, left",
        [
            (lambda groups, new: groups.append({"params": [new]}), [1.0, 2.0, 4.0, 8.0]),
            (lambda groups, new: groups.pop(), [1.0, 2.0]),
            (lambda groups, new: groups.pop(0), [4.0]),
            (lambda groups, new: groups.reverse(), [4.0, 1.0, 2.0]),
            (lambda groups, new: groups[0]["params"].reverse(), [2.0, 1.0, 4.0]),
            (lambda groups, new: groups[0]["params"].pop(), [1.0, 4.0]),
            (lambda groups, new: groups[1]["params"].append(new), [1.0, 2.0, 4.0, 8.0]),
            (lambda groups, new: groups[1].update(params=[new]), [1.0, 2.0, 8.0]),
            (lambda groups, new: groups[1].update(params=new), [1.0, 2.0, 8.0]),
            (lambda groups, new: groups[1].update(params=iter([new])), [1.0, 2.0, 8.0]),
            (lambda groups, new: groups.__setitem__(0, {"params": [new]}), [8.0, 4.0]),
            (lambda groups, new: groups[0].update(clip_grad=False), [4.0]),
        ],
    )
    def test_groups_that_change(self, change, left, whole):
        optimizer = sgd([parameter(1.0), parameter(2.0)], [parameter(4.0)])
        clipper = GradClipper(optimizer if whole else optimizer.param_groups, math.inf)
        clipper.clip_()
        change(optimizer.param_groups, parameter(8.0))
        clipper.clip_()
        assert list(clipper.report().norms) == left
        assert len(set(clipper.report().names)) == len(left)

    def test_other_groups_altogether(self):
        optimizer = sgd([parameter(3.0)])
        clipper = GradClipper(optimizer, math.inf)
        optimizer.param_groups = [{"params": [parameter(8.0)]}, {"params": [parameter(6.0)]}]
        assert clipper.clip_().item() == 10.0
        optimizer.param_groups = optimizer.param_groups[:1]
        assert clipper.clip_().item() == 8.0

    @pytest.mark.parametrize(
        "break_it, mend_it, message",
        [
            (
                lambda optimizer, saved: optimizer.param_groups.clear(),
                lambda optimizer, saved: optimizer.param_groups.extend(saved),
                "GradClipper: there are no parameters in what was passed",
            ),
            (
                lambda optimizer, saved: optimizer.param_groups.append(5),
                lambda optimizer, saved: optimizer.param_groups.pop(),
                "groups[2] has to be a dict with the key 'params', found 5 (int)",
            ),
            (
                lambda optimizer, saved: optimizer.param_groups.pop(),
                lambda optimizer, saved: optimizer.param_groups.append(saved[1]),
                "GradClipper: there are 1 parameter groups now, expected 2",
            ),
        ],
    )
    def test_error_leaves_all_as_it_was(self, break_it, mend_it, message):
        optimizer = sgd([parameter(3.0)], [parameter(4.0)])
        clipper = GradClipper(optimizer, [1.0, 2.0])
        clipper.clip_()
        report, saved = clipper.report(), list(optimizer.param_groups)
        break_it(optimizer, saved)
        for _ in range(2):  # not only the first time
            with pytest.raises((TypeError, ValueError)) as error:
                clipper.clip_()
            assert message in str(error.value)
        assert clipper.report().norms == report.norms
        mend_it(optimizer, saved)
        clipper.clip_()
        assert clipper.report().steps == 2

    def test_copies_watch_their_own_optimizer(self):
        for duplicate in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
            optimizer = sgd([parameter(3.0)])
            clipper = GradClipper(optimizer, math.inf)
            other, other_clipper = duplicate((optimizer, clipper))
            other.add_param_group({"params": [parameter(4.0)]})
            other.param_groups[0]["params"][0].grad = torch.tensor([3.0])
            assert other_clipper.clip_().item() == 5.0
            assert clipper.clip_().item() == 3.0


class TestSeveralOptimizers:
    def make(self):
        one, two, three = parameter(2.0), parameter(3.0), parameter(6.0)
        return [sgd([one]), torch.optim.AdamW([{"params": [two]}, {"params": [three]}])]

    @pytest.mark.parametrize("container", [list, tuple])
    def test_all_together(self, container):
        optimizers = self.make()
        clipper = GradClipper(container(optimizers), 1.0)
        assert clipper.clip_().item() == 7.0
        report = clipper.report()
        assert report.norms == (2.0, 3.0, 6.0)
        assert report.names == (
            "optimizers[0].groups[0]['params'][0]",
            "optimizers[1].groups[0]['params'][0]",
            "optimizers[1].groups[1]['params'][0]",
        )
        assert optimizers[0].param_groups[0]["params"][0].grad.item() == pytest.approx(2 / 7)
        assert grad_norms(container(optimizers)).names == report.names

    def test_a_threshold_for_each_group_of_each(self):
        optimizers = self.make()
        clipper = GradClipper(optimizers, [1.0, 1.5, math.inf])
        clipper.clip_()
        assert [p.grad.item() for p in clipper.parameters] == pytest.approx([1.0, 1.5, 6.0])
        assert clipper.report().limits == (1.0, 1.5, math.inf)
        with pytest.raises(ValueError) as error:
            GradClipper(optimizers, [1.0, 2.0])
        assert "one entry for each of the 3 parameter groups, found 2" in str(error.value)

    def test_changes_in_each(self):
        optimizers = self.make()
        clipper = GradClipper(optimizers, math.inf)
        for number, optimizer in enumerate(optimizers):
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.add_param_group({"params": [parameter(10.0 + number)]})
        clipper.clip_()
        assert clipper.report().norms == (2.0, 10.0, 3.0, 6.0, 11.0)
        del optimizers[0].param_groups[0]
        clipper.clip_()
        assert clipper.report().norms == (10.0, 3.0, 6.0, 11.0)
        optimizers.append(sgd([parameter(1.0)]))
        clipper.clip_()
        assert clipper.report().norms == (10.0, 3.0, 6.0, 11.0, 1.0)

    def test_names_of_named_parameters(self):
        one, two = make_model(), make_model()
        optimizers = [torch.optim.SGD(model.named_parameters(), lr=0.1) for model in (one, two)]
        names = grad_norms(optimizers).names
        assert names[:3] == ("0.weight", "0.bias", "2.weight")
        assert names[3:] == ("0.weight[1]", "0.bias[1]", "2.weight[1]")

    def test_something_else_among_them(self):
        with pytest.raises(TypeError) as error:
            GradClipper([sgd([parameter(1.0)]), nn.Linear(2, 2)], 1.0)
        assert str(error.value) == (
            "GradClipper: optimizers[1] has to be an optimizer like those before, found a Linear"
        )


class TestLeftOut:
    """Neither measured nor changed, by a group's key or by a predicate."""

    def test_by_key(self):
        kept, left = parameter(3.0), parameter(4.0)
        optimizer = torch.optim.SGD(
            [{"params": [kept]}, {"params": [left], "clip_grad": False}], lr=0.1
        )
        # What measures only, measures all.
        assert grad_norms(optimizer).total.item() == 5.0
        clipper = GradClipper(optimizer, 1.0)
        assert clipper.clip_().item() == 3.0
        assert [kept.grad.item(), left.grad.item()] == pytest.approx([1.0, 4.0])
        assert clipper.report().names == ("groups[0]['params'][0]",)
        assert clipper.parameters == [kept]

    def test_by_predicate(self):
        model = make_model()
        before = copy.deepcopy(gradients_of(model))
        clipper = GradClipper(model, 0.5, include=head_is_left_out, clip_value=0.1)
        norm = clipper.clip_()
        assert norm.item() == pytest.approx(ref.reference_norm(before[:2], 2.0), rel=1e-6)
        assert torch.equal(model[2].weight.grad, before[2])
        assert model[0].weight.grad.abs().max() <= 0.1
        assert clipper.report().names == ("0.weight", "0.bias")

    def test_predicate_gets_the_names_of_reports(self):
        seen = []
        GradClipper(torch.compile(make_model()), 1.0, include=lambda n, p: seen.append(n) or True)
        assert seen == ["0.weight", "0.bias", "2.weight"]

    def test_also_from_decay_and_from_policies(self):
        kept, left = parameter(math.nan), parameter(math.nan)
        left.data.fill_(5.0)
        groups = [{"params": [kept]}, {"params": [left], "clip_grad": False}]
        GradClipper(groups, 1.0, weight_decay=0.5, nonfinite="zero").clip_()
        assert kept.grad.item() == 0.0
        assert math.isnan(left.grad.item())
        kept.grad, left.grad = torch.tensor([1.0]), torch.tensor([1.0])
        GradClipper(groups, math.inf, weight_decay=0.5).clip_()
        assert left.grad.item() == 1.0

    def test_key_that_changes(self):
        optimizer = sgd([parameter(3.0)], [parameter(4.0)])
        clipper = GradClipper(optimizer, math.inf)
        assert clipper.clip_().item() == 5.0
        optimizer.param_groups[0]["clip_grad"] = False
        assert clipper.clip_().item() == 4.0
        optimizer.param_groups[0]["clip_grad"] = True
        assert clipper.clip_().item() == 5.0

    @pytest.mark.parametrize("rule", [AutoClip, AdaGC], ids=["AutoClip", "AdaGC"])
    def test_entry_of_a_group_that_is_left_out(self, rule):
        kept, left = parameter(3.0), parameter(4.0)
        for groups in (
            [{"params": [left], "clip_grad": False}, {"params": [kept]}],
            [{"params": [left]}, {"params": [kept]}],
        ):
            clipper = GradClipper(groups, [rule(), 1.0], include=lambda _, p: p is kept)
            kept.grad = torch.tensor([3.0])
            for _ in range(3):
                clipper.clip_()
            assert kept.grad.item() == pytest.approx(1.0, rel=1e-5)
            assert left.grad.item() == 4.0
            report = clipper.report()
            assert report.limits == (math.inf, 1.0)
            assert report.as_dict()["gradients/limit[1]"] == 1.0
            clipper.load_state_dict(clipper.state_dict())
        with pytest.raises(ValueError) as error:
            GradClipper(groups, [1.0], include=lambda _, p: p is kept)
        assert "one entry for each of the 2 parameter groups, found 1" in str(error.value)

    def test_all(self):
        for groups, include in (
            ([{"params": [parameter(1.0)], "clip_grad": False}], None),
            ([{"params": [parameter(1.0)]}], lambda name, parameter: False),
        ):
            with pytest.raises(ValueError) as error:
                GradClipper(groups, 1.0, include=include)
            assert str(error.value) == (
                "GradClipper: all parameters are left out, by 'clip_grad': False in their groups "
                "or by include"
            )

    @pytest.mark.parametrize("value", ["no", 2.0, torch.tensor(False), [False]])
    def test_key_that_is_no_bool(self, value):
        group = {"params": [parameter(1.0)], "clip_grad": value}
        with pytest.raises(TypeError, match=r"groups\[0\]\['clip_grad'\] has to be True or False"):
            GradClipper([group], 1.0)
        grad_norms([group])  # does not look at it

    def test_predicate_that_cannot_be_called(self):
        with pytest.raises(TypeError, match="include has to be a function of a name and a param"):
            GradClipper(make_model(), 1.0, include="2.*")
