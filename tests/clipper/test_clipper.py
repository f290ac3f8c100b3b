"""The clipper that knows its parameters: steps of every kind, rules, and non-finite norms."""

from __future__ import annotations

import copy
import math

import pytest
import reference as ref
import torch
from models import assert_gradients, clipped, gradients_of, make_model, set_gradients
from parametrize import by_order
from torch import nn

import gradclip_ext
from gradclip_ext import AGC, AdaGC, AutoClip, GradClipper, ZClip, grad_norms

SOURCES = {
    "module": lambda model: model,
    "named parameters": lambda model: model.named_parameters(),
    "parameters": lambda model: model.parameters(),
    "list": lambda model: list(model.parameters()),
    "optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "parameter groups": lambda model: torch.optim.SGD(model.parameters(), lr=0.1).param_groups,
}


class TestClip:
    @pytest.mark.parametrize("source", SOURCES)
    def test_same_as_clip_grad_norm(self, source):
        ours, theirs = make_model(), make_model()
        clipper = GradClipper(SOURCES[source](ours), max_norm=0.5)
        for seed in range(3):
            set_gradients(ours, seed)
            set_gradients(theirs, seed)
            norm = clipper.clip_()
            expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
            assert norm.dtype == torch.float64
            assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
            assert_gradients(ours, [gradient.double() for gradient in gradients_of(theirs)])

    @by_order
    def test_orders(self, order):
        model = make_model()
        before = copy.deepcopy(gradients_of(model))
        norm = GradClipper(model, 0.5, norm_type=order).clip_()
        expected = ref.reference_norm(before, order)
        assert norm.item() == pytest.approx(expected, rel=1e-6)
        assert_gradients(model, clipped(before, ref.reference_coefficient(0.5, expected)))

    def test_quiet_step_leaves_every_bit(self):
        model = make_model()
        before = copy.deepcopy(gradients_of(model))
        GradClipper(model, 1e6).clip_()
        for gradient, other in zip(gradients_of(model), before, strict=True):
            assert torch.equal(gradient, other)

    def test_value_alone_and_after_the_norm(self):
        model = make_model()
        before = copy.deepcopy(gradients_of(model))
        GradClipper(model, clip_value=0.1).clip_()
        assert_gradients(model, [gradient.double().clamp(-0.1, 0.1) for gradient in before])
        set_gradients(model)
        GradClipper(model, 1.0, clip_value=0.1).clip_()
        coefficient = ref.reference_coefficient(1.0, ref.reference_norm(before, 2.0))
        assert_gradients(model, [g.clamp(-0.1, 0.1) for g in clipped(before, coefficient)])

    def test_a_threshold_for_each_group(self):
        model = make_model()
        before = copy.deepcopy(gradients_of(model))
        groups = [{"params": [model[0].weight, model[0].bias]}, {"params": [model[2].weight]}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        norm = GradClipper(optimizer, [0.5, math.inf]).clip_()
        first = ref.reference_norm(before[:2], 2.0)
        coefficient = ref.reference_coefficient(0.5, first)
        assert_gradients(model, [*clipped(before[:2], coefficient), before[2].double()])
        assert norm.item() == pytest.approx(ref.reference_norm(before, 2.0), rel=1e-6)

    def test_weight_decay_is_part_of_what_is_measured(self):
        model = make_model()
        expected = [p.grad.double() + 0.1 * p.detach().double() for p in model.parameters()]
        total = math.sqrt(sum((g**2).sum().item() for g in expected))
        norm = GradClipper(model, 0.5, weight_decay=0.1).clip_()
        assert norm.item() == pytest.approx(total, rel=1e-6)
        coefficient = ref.reference_coefficient(0.5, total)
        assert_gradients(model, [gradient * coefficient for gradient in expected])

    @by_order
    @pytest.mark.parametrize("dtype", [*ref.NATIVE_DTYPES, torch.complex64], ids=ref.name_of)
    def test_weight_decay_in_one_pass(self, dtype, order):
        # Around the borders of a run and of a worker, with none and with an empty gradient between.
        shapes = [(300, 700), (5,), (0,), (129, 100), (1,), (90_001,), (17, 3)]
        gradients = [ref.random_gradient(shape, dtype, seed) for seed, shape in enumerate(shapes)]
        values = [ref.random_gradient(shape, dtype, 50 + i) for i, shape in enumerate(shapes)]
        parameters = []
        for gradient, value in zip(gradients, values, strict=True):
            parameters.append(nn.Parameter(value))
            parameters[-1].grad = gradient.clone()
        parameters.insert(3, nn.Parameter(torch.ones(4)))
        versions = [p.grad._version for p in parameters if p.grad is not None]
        norm = GradClipper(parameters, math.inf, norm_type=order, weight_decay=0.1).clip_()
        after = [parameter.grad for parameter in parameters if parameter.grad is not None]
        assert all(g._version > v for g, v in zip(after, versions, strict=True))
        assert norm.item() == pytest.approx(ref.reference_norm(after, order), rel=2e-7)
        for found, gradient, value in zip(after, gradients, values, strict=True):
            expected = ref.widened(gradient) + 0.1 * ref.widened(value)
            # Two roundings of the sum, whose parts may cancel, to the dtype or to float32.
            size = ref.widened(gradient).abs() + 0.1 * ref.widened(value).abs()
            rounding = torch.finfo(dtype).eps
            assert ((ref.widened(found) - expected).abs() <= size * rounding).all()

    def test_weight_decay_where_parameter_and_gradient_lie_differently(self):
        parameter = nn.Parameter(torch.arange(12.0).view(3, 4))
        parameter.grad = torch.ones(4, 3).t()
        other = nn.Parameter(torch.ones(9))
        other.grad = torch.ones(10)[1:]
        norm = GradClipper([parameter, other], math.inf, weight_decay=0.5).clip_()
        expected = [1.0 + 0.5 * i for i in range(12)]
        assert parameter.grad.flatten().tolist() == expected
        assert other.grad.tolist() == [1.5] * 9
        total = math.sqrt(sum(e * e for e in expected) + 9 * 1.5**2)
        assert norm.item() == pytest.approx(total, rel=1e-6)

    def test_weight_decay_of_a_shared_gradient_and_of_many_parameters(self):
        parameter = nn.Parameter(torch.ones(3))
        parameter.grad = torch.ones(3)
        GradClipper([parameter, parameter], math.inf, weight_decay=0.5).clip_()
        assert parameter.grad.tolist() == [1.5] * 3
        many = [nn.Parameter(torch.full((3,), float(i))) for i in range(2500)]
        for one in many:
            one.grad = torch.ones(3)
        GradClipper(many, math.inf, weight_decay=2.0).clip_()
        assert all(one.grad.tolist() == [1.0 + 2.0 * i] * 3 for i, one in enumerate(many))

    def test_parameters_without_gradients(self):
        model = make_model()
        model[0].bias.grad = None
        clipper = GradClipper(model, 0.5)
        before = copy.deepcopy([model[0].weight.grad, model[2].weight.grad])
        clipper.clip_()
        coefficient = ref.reference_coefficient(0.5, ref.reference_norm(before, 2.0))
        found = [model[0].weight.grad, model[2].weight.grad]
        for gradient, other in zip(found, clipped(before, coefficient), strict=True):
            torch.testing.assert_close(gradient.double(), other, rtol=1e-6, atol=0)
        assert model[0].bias.grad is None
        assert clipper.report().norms[1] == 0.0

    def test_no_gradient_at_all(self):
        model = nn.Linear(2, 2)
        assert GradClipper(model, 1.0).clip_().item() == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["NaN", "inf"])
class TestNonfinite:
    def broken(self, bad):
        model = make_model()
        model[0].bias.grad[1] = bad
        return model, copy.deepcopy(gradients_of(model))

    def test_propagate_is_torchs(self, bad):
        model, before = self.broken(bad)
        GradClipper(model, 1.0).clip_()
        torch.nn.utils.clip_grad_norm_(parameters := ref.parameters(before), 1.0)
        for gradient, other in zip(gradients_of(model), parameters, strict=True):
            torch.testing.assert_close(gradient, other.grad, equal_nan=True)

    @pytest.mark.parametrize("decay", [0.0, 0.1])
    def test_raise_names_the_culprit_and_changes_nothing(self, bad, decay):
        model, before = self.broken(bad)
        clipper = GradClipper(model, 1.0, nonfinite="raise", weight_decay=decay)
        with pytest.raises(RuntimeError) as error:
            clipper.clip_()
        assert "is that of 0.bias of shape (5,)" in str(error.value)
        for gradient, other in zip(gradients_of(model), before, strict=True):
            assert torch.equal(gradient.nan_to_num(7.0), other.nan_to_num(7.0))

    def test_zero_clears_all(self, bad):
        model, _ = self.broken(bad)
        clipper = GradClipper(model, 1.0, nonfinite="zero")
        clipper.clip_()
        assert all((gradient == 0).all() for gradient in gradients_of(model))
        set_gradients(model)
        clipper.clip_()
        after = ref.reference_norm(gradients_of(model), 2.0)
        assert after == pytest.approx(1.0, rel=1e-5)
        assert clipper.report().nonfinite_steps == 1

    def test_zero_clears_gradients_that_are_not_native(self, bad):
        gradient = torch.ones(8)
        gradient[4] = bad
        parameter = ref.Holder(gradient[::2])
        GradClipper([parameter], 1.0, nonfinite="zero").clip_()
        assert gradient[::2].tolist() == [0.0] * 4
        assert gradient[1::2].tolist() == [1.0] * 4

    def test_skip_leaves_all_and_sets_the_flag(self, bad):
        model, before = self.broken(bad)
        clipper = GradClipper(model, 1.0, nonfinite="skip")
        flag = clipper.found_inf
        clipper.clip_()
        for gradient, other in zip(gradients_of(model), before, strict=True):
            assert torch.equal(gradient.nan_to_num(7.0), other.nan_to_num(7.0))
        assert flag.tolist() == [1.0]
        set_gradients(model)
        clipper.clip_()
        assert flag.tolist() == [0.0]
        assert clipper.found_inf is flag

    def test_flag_makes_a_fused_optimizer_leave_the_parameters(self, bad):
        model, _ = self.broken(bad)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        clipper = GradClipper(model, 1.0, nonfinite="skip")
        optimizer.found_inf = clipper.found_inf
        before = copy.deepcopy(list(model.parameters()))
        clipper.clip_()
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
        set_gradients(model)
        clipper.clip_()
        optimizer.step()
        assert not torch.equal(model[0].weight, before[0])

    def test_a_rule_is_not_poisoned(self, bad):
        model, _ = self.broken(bad)
        clipper = GradClipper(model, AutoClip(50.0), nonfinite="zero")
        clipper.clip_()
        set_gradients(model)
        norm = ref.reference_norm(gradients_of(model), 2.0)
        clipper.clip_()
        assert clipper.report().limits == (pytest.approx(norm, rel=1e-6),)


class TestRules:
    @pytest.mark.parametrize("rule", [AutoClip(30.0), ZClip(warmup_steps=5)], ids=["Auto", "Z"])
    def test_limit_of_all(self, rule):
        model = make_model()
        other = copy.deepcopy(rule)
        clipper = GradClipper(model, rule)
        for seed in range(20):
            set_gradients(model, seed, 20.0 if seed == 15 else 1.0)
            before = copy.deepcopy(gradients_of(model))
            total, norms, _ = grad_norms(model)
            limit = other.limits(total, norms).item()
            clipper.clip_()
            coefficient = ref.reference_coefficient(limit, total.item())
            assert_gradients(model, clipped(before, coefficient))
            assert clipper.report().limits == (limit,)
        assert 1 <= clipper.report().clipped_steps < 20

    def test_limit_of_each(self):
        model = make_model()
        rule = AdaGC(warmup_steps=2)
        other = copy.deepcopy(rule)
        clipper = GradClipper(model, rule)
        for seed in range(6):
            set_gradients(model, seed, 5.0 if seed == 4 else 1.0)
            before = copy.deepcopy(gradients_of(model))
            total, norms, _ = grad_norms(model)
            limits = other.limits(total, norms)
            clipper.clip_()
            expected = [
                gradient.double() * min(1.0, limit / norm)
                for gradient, limit, norm in zip(
                    before, limits.tolist(), norms.tolist(), strict=True
                )
            ]
            assert_gradients(model, expected)

    def test_units(self):
        model, other = make_model(), make_model()
        GradClipper(model, AGC(0.01, exclude=("2.*",))).clip_()
        gradclip_ext.adaptive_clip_grad_([other[0].weight, other[0].bias], 0.01)
        for one, two in zip(gradients_of(model), gradients_of(other), strict=True):
            assert torch.equal(one, two)

    def test_own_rule(self):
        class Half:
            per_parameter = False
            epsilon = 0.0

            def limits(self, total, norms):
                return total / 2

            def state_dict(self):
                return {}

            def load_state_dict(self, state):
                pass

        model = make_model()
        before = copy.deepcopy(gradients_of(model))
        GradClipper(model, Half()).clip_()
        assert_gradients(model, clipped(before, 0.5))
