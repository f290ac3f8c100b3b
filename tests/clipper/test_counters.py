"""What a clipper counts and reports is what it did."""

from __future__ import annotations

import math

import pytest
import reference as ref
import torch
from models import gradients_of, make_model, set_gradients
from torch import nn

from gradclip_ext import AGC, AdaGC, AutoClip, GradClipper, TimesLimit, ZClip


def weight_with(gradient):
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    weight.grad = torch.tensor(gradient)
    return weight


class TestCoefficient:
    def test_of_units(self):
        # The norm of the weights is 5, so that of the gradient may be 0.5 of its 5.
        weight = weight_with([3.0, 4.0])
        clipper = GradClipper([weight], AGC(0.1))
        clipper.clip_()
        assert weight.grad.tolist() == pytest.approx([0.3, 0.4])
        report = clipper.report()
        assert report.coefficient == pytest.approx(0.1)
        assert (report.clipped_steps, report.limits) == (1, (math.inf,))
        clipper.clip_()
        assert clipper.report().coefficient == 1.0
        assert clipper.report().clipped_steps == 1

    def test_of_the_smallest_unit_of_all(self):
        first, second = nn.Parameter(torch.eye(2)), nn.Parameter(torch.eye(2))
        first.grad = torch.tensor([[0.02, 0.0], [0.0, 0.001]])
        second.grad = torch.tensor([[0.001, 0.0], [0.0, 0.08]])
        clipper = GradClipper([first, second, nn.Parameter(torch.ones(2))], AGC(0.01))
        clipper.clip_()
        assert clipper.report().coefficient == pytest.approx(0.125)

    def test_of_elements(self):
        weight = weight_with([3.0, -4.0])
        clipper = GradClipper([weight], clip_value=1.0)
        clipper.clip_()
        assert weight.grad.tolist() == [1.0, -1.0]
        assert clipper.report().coefficient == pytest.approx(0.25)
        assert clipper.report().clipped_steps == 1
        clipper.clip_()
        assert (clipper.report().coefficient, clipper.report().clipped_steps) == (1.0, 1)

    def test_of_elements_after_the_norm(self):
        weight = weight_with([3.0, 4.0])
        clipper = GradClipper([weight], 2.5, clip_value=1.0)
        clipper.clip_()
        assert weight.grad.tolist() == pytest.approx([1.0, 1.0])
        assert clipper.report().coefficient == pytest.approx(0.25, rel=1e-5)

    def test_of_two_groups(self):
        first, second = weight_with([3.0, 4.0]), weight_with([6.0, 8.0])
        groups = [{"params": [first]}, {"params": [second]}]
        clipper = GradClipper(groups, [5.0, AGC(0.1)], clip_value=3.5)
        clipper.clip_()
        assert second.grad.tolist() == pytest.approx([0.3, 0.4])
        assert clipper.report().coefficient == pytest.approx(0.05)


def test_the_returned_norm_belongs_to_the_caller():
    model = make_model()
    clipper = GradClipper(model, 1.0)
    total = ref.reference_norm(gradients_of(model), 2.0)
    clipper.clip_().mul_(0.0)
    assert clipper.report().total_norm == pytest.approx(total, rel=1e-6)


class TestSkipping:
    def step(self, clipper, model, scale):
        set_gradients(model, 1, scale)
        before = [gradient.clone() for gradient in gradients_of(model)]
        clipper.clip_()
        return before

    def test_above_a_number(self):
        model = make_model()
        clipper = GradClipper(model, 1.0, skip_above=20.0)
        flag = clipper.found_inf
        self.step(clipper, model, 1.0)
        assert flag.item() == 0.0
        assert ref.reference_norm(gradients_of(model), 2.0) == pytest.approx(1.0, rel=1e-5)
        before = self.step(clipper, model, 10.0)
        assert flag.item() == 1.0
        assert all(torch.equal(a, b) for a, b in zip(gradients_of(model), before, strict=True))
        report = clipper.report()
        assert (report.skipped_steps, report.clipped_steps, report.nonfinite_steps) == (1, 1, 0)
        self.step(clipper, model, 1.0)
        assert flag.item() == 0.0
        assert report.as_dict()["gradients/skipped_steps"] == 1.0

    def test_above_a_multiple_of_the_limit(self):
        model = make_model()
        norm = ref.reference_norm(gradients_of(make_model(1)), 2.0)
        clipper = GradClipper(model, norm, skip_above=TimesLimit(3.0))
        for scale, skipped in ((2.9, 0), (3.1, 1), (2.0, 1), (1.0, 1)):
            set_gradients(model, 1, scale)
            clipper.clip_()
            assert clipper.report().skipped_steps == skipped

    @pytest.mark.parametrize("decay", [0.0, 0.5])
    @pytest.mark.parametrize("arguments", [{"skip_above": 20.0}, {"nonfinite": "skip"}], ids=repr)
    def test_a_skipped_step_keeps_every_bit(self, arguments, decay):
        model = make_model()
        clipper = GradClipper(model, 1.0, weight_decay=decay, **arguments)
        set_gradients(model, 1, 1e3)
        if "nonfinite" in arguments:
            with torch.no_grad():
                model[0].bias[0] = math.nan if decay else 0.0
            model[2].weight.grad[0, 0] = math.inf
        before = [gradient.clone() for gradient in gradients_of(model)]
        clipper.clip_()
        assert clipper.found_inf.item() == 1.0
        assert all(torch.equal(a, b) for a, b in zip(gradients_of(model), before, strict=True))

    def test_a_step_that_is_not_skipped_decays(self):
        model = make_model()
        expected = [p.grad.double() + 0.1 * p.detach().double() for p in model.parameters()]
        total = math.sqrt(sum((g**2).sum().item() for g in expected))
        clipper = GradClipper(model, 0.5, weight_decay=0.1, skip_above=1e6, nonfinite="skip")
        assert clipper.clip_().item() == pytest.approx(total, rel=1e-6)
        for found, gradient in zip(gradients_of(model), expected, strict=True):
            expected_gradient = gradient * (0.5 / (total + 1e-6))
            torch.testing.assert_close(found.double(), expected_gradient, rtol=1e-5, atol=1e-9)

    def test_too_many_in_a_row(self):
        model = make_model()
        clipper = GradClipper(model, 1.0, skip_above=20.0, max_skips_in_a_row=2)
        for scale in (1.0, 10.0, 10.0):
            self.step(clipper, model, scale)
        assert clipper.report().skipped_steps == 2
        self.step(clipper, model, 10.0)
        for ask in (clipper.report, clipper.state_dict):
            with pytest.raises(RuntimeError) as caught:
                ask()
            assert "steps 2 to 4 were skipped, 3 in a row, expected at most 2" in str(caught.value)
        clipper.max_skips_in_a_row = None
        assert clipper.report().skipped_steps == 3
        clipper.max_skips_in_a_row = 2
        self.step(clipper, model, 1.0)
        assert clipper.state_dict()["skips_in_a_row"] == 0

    def test_non_finite_steps_that_are_skipped_count(self):
        model = make_model()
        clipper = GradClipper(model, 1.0, nonfinite="skip", max_skips_in_a_row=0)
        model[0].bias.grad[0] = math.nan
        clipper.clip_()
        with pytest.raises(RuntimeError, match="steps 1 to 1 were skipped"):
            clipper.report()

    @pytest.mark.parametrize(
        "other", [{"clip_value": 1.0}, {"max_norm": AGC()}], ids=["value", "AGC"]
    )
    def test_cannot_be_combined_with_what_writes_elements(self, other):
        with pytest.raises(
            ValueError, match="skip_above cannot be combined with clip_value or AGC"
        ):
            GradClipper(make_model(), **{"max_norm": 1.0, **other}, skip_above=5.0)

    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
    def test_bad_numbers(self, value):
        with pytest.raises(ValueError, match="GradClipper: skip_above has to be a number greater"):
            GradClipper(make_model(), 1.0, skip_above=value)
        with pytest.raises(ValueError, match="TimesLimit: factor has to be a number that is at"):
            TimesLimit(value)
        with pytest.raises(TypeError, match="max_skips_in_a_row has to be a whole number"):
            GradClipper(make_model(), 1.0, max_skips_in_a_row=0.5)


class TestLastNorm:
    def test_a_checkpoint_says_whether_it_was_finite(self):
        model = make_model()
        clipper = GradClipper(model, 1.0)
        assert clipper.state_dict()["last_norm_is_finite"] == 1
        model[0].bias.grad[0] = math.nan
        clipper.clip_()
        assert clipper.state_dict()["last_norm_is_finite"] == 0
        set_gradients(model)
        clipper.clip_()
        assert clipper.state_dict()["last_norm_is_finite"] == 1


class TestFlag:
    @pytest.mark.parametrize("make", ["SGD", "Adam", "AdamW", "Adagrad"])
    def test_every_fused_optimizer_obeys(self, make):
        model = make_model()
        optimizer = getattr(torch.optim, make)(model.parameters(), lr=0.1, fused=True)
        clipper = GradClipper(model, 1.0, nonfinite="skip")
        optimizer.found_inf = clipper.found_inf
        for scale, moves in ((1.0, True), (math.inf, False), (1.0, True), (math.nan, False)):
            set_gradients(model, 2, scale)
            before = [parameter.detach().clone() for parameter in model.parameters()]
            clipper.clip_()
            try:
                optimizer.step()
            except RuntimeError as error:
                # In some releases that of Adagrad is for the CPU only.
                if "of supported devices" not in str(error):
                    raise
                pytest.skip(str(error))
            pairs = zip(model.parameters(), before, strict=True)
            assert any(not torch.equal(a, b) for a, b in pairs) == moves

    @pytest.mark.cpu_only
    def test_another_default_dtype(self):
        torch.set_default_dtype(torch.float64)
        try:
            clipper = GradClipper(nn.Linear(2, 2), 1.0)
        finally:
            torch.set_default_dtype(torch.float32)
        assert clipper.found_inf.dtype == torch.float32
        assert clipper.found_inf.shape == ()


class TestSkippedStepsAndRules:
    def fed(self, rule, norms, **arguments):
        weight = nn.Parameter(torch.ones(2))
        clipper = GradClipper([weight], rule, **arguments)
        for norm in norms:
            weight.grad = torch.tensor([norm, 0.0])
            clipper.clip_()
        return clipper

    @pytest.mark.parametrize("above", [100.0, TimesLimit(20.0)], ids=["number", "factor"])
    @pytest.mark.parametrize(
        "rule",
        [lambda: ZClip(warmup_steps=3), lambda: AutoClip(99.0), lambda: AdaGC(warmup_steps=2)],
        ids=["ZClip", "AutoClip", "AdaGC"],
    )
    def test_no_rule_takes_in_a_spike(self, rule, above):
        norms = [1.0, 1.1, 0.9, 1.0, 1.05]
        spiked = self.fed(rule(), [*norms[:4], 1e20, *norms[4:]], skip_above=above)
        plain = self.fed(rule(), norms, skip_above=above)
        assert spiked.report().skipped_steps == 1
        assert repr(spiked.state_dict()["rules"]) == repr(plain.state_dict()["rules"])

    @pytest.mark.parametrize("policy", ["propagate", "skip"])
    def test_nan_and_spikes_are_one_row(self, policy):
        norms = [1.0, 1e3, math.nan, 1e3, math.inf]
        clipper = self.fed(1.0, norms, skip_above=10.0, nonfinite=policy)
        state = clipper.state_dict()
        assert (state["skipped_steps"], state["skips_in_a_row"]) == (4, 4)
        assert state["nonfinite_steps"] == 2

    def test_coefficient_is_nan_in_any_order_of_groups(self):
        for place in (0, 1):
            weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
            for weight in weights:
                weight.grad = torch.ones(2)
            weights[place].grad[0] = math.nan
            clipper = GradClipper([{"params": [weight]} for weight in weights], [1.0, 1.0])
            clipper.clip_()
            assert math.isnan(clipper.report().coefficient)


class TestNormTypes:
    @pytest.mark.parametrize("norm_type", [0.0, 0.5, 3.0, -1.0, -math.inf])
    @pytest.mark.parametrize("arguments", [{}, {"weight_decay": 1e-30}, {"nonfinite": "raise"}])
    def test_groups_together_are_as_one(self, norm_type, arguments):
        def weights():
            result = [nn.Parameter(torch.ones(3)) for _ in range(4)]
            gradients = ([1.0, 0.5, 2.0], [3.0, 4.0, 5.0], [0.25, 7.0, 8.0])
            for weight, values in zip(result, gradients, strict=False):
                weight.grad = torch.tensor(values)
            return result

        a, b, c, d = weights()
        groups = [{"params": [a, b]}, {"params": [c]}, {"params": [d]}]
        split = GradClipper(groups, [math.inf] * 3, norm_type=norm_type, **arguments)
        whole = GradClipper(weights(), math.inf, norm_type=norm_type, **arguments)
        assert split.clip_().item() == pytest.approx(whole.clip_().item(), rel=1e-6)
        assert split.report().norms == pytest.approx(whole.report().norms, rel=1e-6)
