"""Norms of single gradients and the clipper that knows its parameters."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import reference as ref
import torch
from torch import nn

import gradclip_ext
from gradclip_ext import AGC, AdaGC, AutoClip, GradClipper, ZClip, grad_norms

by_order = pytest.mark.parametrize("order", ref.NATIVE_ORDERS, ids=lambda order: f"L{order:g}")
by_dtype = pytest.mark.parametrize("dtype", ref.NATIVE_DTYPES, ids=ref.name_of)


@pytest.fixture(autouse=True, params=["numbers on the host", "numbers on the device"])
def whereabouts(request, monkeypatch):
    """Both ways of the clipper, also without a GPU: with and without reading what it measured."""
    if request.param == "numbers on the device":
        monkeypatch.setattr(gradclip_ext._C, "is_on_host", lambda _: False)


def make_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    set_gradients(model, seed)
    return model


def set_gradients(model, seed=0, scale=1.0):
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = ref.random_gradient(parameter.shape, seed=100 * seed + index, scale=scale)


def gradients_of(model):
    return [parameter.grad for parameter in model.parameters()]


def clipped(gradients, coefficient):
    return [gradient.double() * coefficient for gradient in gradients]


def assert_gradients(model, expected):
    for gradient, other in zip(gradients_of(model), expected, strict=True):
        torch.testing.assert_close(gradient.double(), other, rtol=1e-6, atol=1e-12)


class TestGradNorms:
    @by_order
    @by_dtype
    def test_total_and_each(self, dtype, order):
        shapes = [(300, 700), (5,), (0,), (129, 100), (1,), (90_001,)]
        gradients = [ref.random_gradient(shape, dtype, seed) for seed, shape in enumerate(shapes)]
        gradients.insert(2, None)
        total, norms, names = grad_norms(ref.parameters(gradients), order)
        filled = [gradient for gradient in gradients if gradient is not None]
        assert total.dtype == norms.dtype == torch.float64
        assert norms.shape == (7,)
        assert names[6] == "parameters[6]"
        # The same pass, the same bits as without the norms of the parts.
        expected = gradclip_ext.get_total_norm(
            filled, order, dtype=None if dtype == torch.float64 else torch.float32
        )
        assert total.to(expected.dtype).item() == expected.item()
        for norm, gradient in zip(norms, gradients, strict=True):
            if gradient is None or gradient.numel() == 0:
                assert norm.item() == 0.0
            else:
                rounded = norm.to(torch.float64 if dtype == torch.float64 else torch.float32)
                ref.assert_norm(rounded, [gradient], order)

    def test_names_and_dtype(self):
        model = make_model()
        for source in (model, model.named_parameters()):
            found = grad_norms(source, dtype=torch.float32)
            assert found.names == ("0.weight", "0.bias", "2.weight")
            assert found.norms.dtype == found.total.dtype == torch.float32
            expected = [ref.reference_norm([gradient], 2.0) for gradient in gradients_of(model)]
            assert found.norms.tolist() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
    def test_gradients_that_are_not_native(self, order):
        strided = ref.random_gradient((6, 8))[:, ::2]
        sparse = torch.sparse_coo_tensor(
            [[0, 2]], [3.0, -4.0], (5,), check_invariants=True
        ).coalesce()
        plain = ref.random_gradient((11,), seed=1)
        parameters = [ref.Holder(gradient) for gradient in (strided, sparse, plain)]
        total, norms, _ = grad_norms(parameters, order)
        dense = [strided, sparse.to_dense(), plain]
        expected = [torch.linalg.vector_norm(gradient.double(), order).item() for gradient in dense]
        assert norms.tolist() == pytest.approx(expected, rel=1e-6)
        whole = torch.cat([gradient.double().flatten() for gradient in dense])
        assert total.item() == pytest.approx(
            torch.linalg.vector_norm(whole, order).item(), rel=1e-6
        )

    def test_no_gradient_at_all(self):
        total, norms, _ = grad_norms([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))])
        assert total.item() == 0.0
        assert norms.tolist() == [0.0, 0.0]

    def test_nan_is_found(self):
        model = make_model()
        model[0].bias.grad[1] = math.nan
        total, norms, names = grad_norms(model)
        assert total.isnan()
        assert [n for n, bad in zip(names, norms.isnan().tolist(), strict=True) if bad] == [
            "0.bias"
        ]

    def test_does_not_write(self):
        model = make_model()
        versions = [gradient._version for gradient in gradients_of(model)]
        before = copy.deepcopy(gradients_of(model))
        grad_norms(model)
        assert [gradient._version for gradient in gradients_of(model)] == versions
        assert all(
            torch.equal(one, other) for one, other in zip(gradients_of(model), before, strict=True)
        )


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


class TestNoticesChanges:
    def check(self, clipper, model):
        set_gradients(model, 3)
        before = gradients_of(model)
        assert clipper.clip_().item() == pytest.approx(ref.reference_norm(before, 2.0), rel=1e-5)
        assert len(clipper.parameters) == len(before)

    def test_added_replaced_and_deleted_in_a_module(self):
        model = make_model()
        clipper = GradClipper(model, math.inf)
        self.check(clipper, model)
        model.append(nn.Linear(3, 2))
        self.check(clipper, model)
        model[0].weight = nn.Parameter(torch.ones(4, 4))
        self.check(clipper, model)
        del model[3]
        self.check(clipper, model)
        model[0].register_parameter("bias", None)
        self.check(clipper, model)

    def test_group_added_and_list_replaced_in_an_optimizer(self):
        model, other = make_model(), nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clipper = GradClipper(optimizer, math.inf)
        assert len(clipper.parameters) == 3
        optimizer.add_param_group({"params": list(other.parameters())})
        set_gradients(other, 5)
        clipper.clip_()
        assert len(clipper.parameters) == 5
        optimizer.param_groups[1]["params"] = [other.weight]
        clipper.clip_()
        assert len(clipper.parameters) == 4

    def test_learning_rate_is_no_change(self, monkeypatch):
        optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
        clipper = GradClipper(optimizer, 1.0)
        monkeypatch.setattr(clipper._collection, "_collect", lambda: pytest.fail("collected again"))
        optimizer.param_groups[0]["lr"] = 0.01
        clipper.clip_()

    def test_other_number_of_groups_than_thresholds(self):
        model, other = make_model(), nn.Linear(2, 2)
        optimizer = torch.optim.SGD([{"params": model.parameters()}], lr=0.1)
        clipper = GradClipper(optimizer, [1.0])
        optimizer.add_param_group({"params": other.parameters()})
        clipper.clip_()  # one threshold is for all
        optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
        clipper = GradClipper(optimizer, [1.0, 2.0, 3.0])
        optimizer.add_param_group({"params": list(other.parameters())})
        with pytest.raises(ValueError) as error:
            clipper.clip_()
        assert "there are 4 parameter groups now, expected 3" in str(error.value)


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


class TestReportAndState:
    def test_report(self):
        model = make_model()
        clipper = GradClipper(model, 1.0)
        with pytest.raises(RuntimeError) as error:
            clipper.report()
        assert "before the first clip_()" in str(error.value)
        norms = [ref.reference_norm([gradient], 2.0) for gradient in gradients_of(model)]
        total = ref.reference_norm(gradients_of(model), 2.0)
        clipper.clip_()
        set_gradients(model, 1, 1e-3)
        clipper.clip_()
        set_gradients(model)
        clipper.clip_()
        report = clipper.report()
        assert report.names == ("0.weight", "0.bias", "2.weight")
        assert report.norms == pytest.approx(norms, rel=1e-6)
        assert report.total_norm == pytest.approx(total, rel=1e-6)
        assert report.coefficient == pytest.approx(1.0 / total, rel=1e-5)
        assert report.limits == (1.0,)
        assert (report.steps, report.clipped_steps, report.nonfinite_steps) == (3, 2, 0)
        numbers = report.as_dict()
        assert numbers["gradients/norm/0.bias"] == report.norms[1]
        assert numbers["gradients/limit"] == 1.0
        assert numbers["gradients/clipped_share"] == pytest.approx(2 / 3)
        assert all(type(value) is float for value in numbers.values())

    @pytest.mark.parametrize(
        "rule",
        [lambda: 0.5, AutoClip, lambda: ZClip(warmup_steps=2), lambda: AdaGC(warmup_steps=2)],
        ids=["number", "AutoClip", "ZClip", "AdaGC"],
    )
    @pytest.mark.parametrize("way", ["state_dict", "pickle"])
    def test_resumes(self, rule, way):
        def step(clipper, model, seed):
            set_gradients(model, seed, 1.0 + seed % 3)
            clipper.clip_()
            return [gradient.clone() for gradient in gradients_of(model)]

        model = make_model()
        clipper = GradClipper(model, rule())
        for seed in range(5):
            step(clipper, model, seed)
        if way == "pickle":
            resumed, resumed_model = pickle.loads(pickle.dumps((clipper, model)))
        else:
            resumed_model = make_model()
            resumed = GradClipper(resumed_model, rule())
            # As a checkpoint on a disk.
            resumed.load_state_dict(pickle.loads(pickle.dumps(clipper.state_dict())))
        for seed in range(5, 9):
            expected = step(clipper, model, seed)
            found = step(resumed, resumed_model, seed)
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one, other)
        assert resumed.report() == clipper.report()

    def test_state_of_another_model_or_rule(self):
        clipper = GradClipper(make_model(), AutoClip())
        clipper.clip_()
        state = clipper.state_dict()
        other = GradClipper(nn.Linear(2, 2), AutoClip())
        with pytest.raises(ValueError, match="another model: expected 2 parameters, found 3"):
            other.load_state_dict(state)
        with pytest.raises(ValueError, match="other rules: expected float, found AutoClip"):
            GradClipper(make_model(), 1.0).load_state_dict(state)
        with pytest.raises(ValueError, match="keys"):
            clipper.load_state_dict({"steps": 1})
        assert clipper.state_dict()["steps"] == 1


class TestBadArguments:
    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
    def test_thresholds(self, value):
        for arguments in ({"max_norm": value}, {"clip_value": value}):
            with pytest.raises(ValueError) as error:
                GradClipper(make_model(), **arguments)
            name = next(iter(arguments))
            assert f"GradClipper: {name} has to be a positive number, found {value}" in str(
                error.value
            )

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({}, "there is nothing to do"),
            ({"max_norm": 1.0, "nonfinite": "ignore"}, "nonfinite has to be one of 'propagate'"),
            ({"max_norm": [1.0, 2.0]}, "one entry for each of the 1 parameter groups, found 2"),
            ({"max_norm": 1.0, "weight_decay": -0.1}, "weight_decay has to be"),
            ({"max_norm": AGC(), "nonfinite": "skip"}, "cannot be combined with clip_value or AGC"),
        ],
    )
    def test_values(self, arguments, message):
        with pytest.raises(ValueError) as error:
            GradClipper(make_model(), **arguments)
        assert message in str(error.value)

    @pytest.mark.parametrize("rule", ["auto", None.__class__, True])
    def test_unknown_rule(self, rule):
        with pytest.raises(TypeError) as error:
            GradClipper(make_model(), rule)
        assert "max_norm has to be a number or a rule such as AutoClip()" in str(error.value)

    def test_sources(self):
        for source in ([], nn.ReLU(), iter(())):
            with pytest.raises(ValueError, match="there are no parameters"):
                GradClipper(source, 1.0)
        with pytest.raises(ValueError, match=r"groups\[1\] has no parameters"):
            GradClipper([{"params": [nn.Parameter(torch.ones(2))]}, {"params": []}], 1.0)
        with pytest.raises(TypeError, match=r"parameters\[1\] has to be a torch.Tensor, found 3"):
            GradClipper([nn.Parameter(torch.ones(2)), 3], 1.0)
        for source in (5, "model", {"weight": torch.ones(2)}):
            with pytest.raises(TypeError, match="expected a module"):
                GradClipper(source, 1.0)


def test_no_python_walk_of_the_parameters_each_step(monkeypatch):
    model = make_model()
    clipper = GradClipper(model, 1.0)
    monkeypatch.setattr(nn.Module, "named_parameters", lambda *_: pytest.fail("walked"))
    for seed in range(3):
        set_gradients_of(clipper.parameters, seed)
        clipper.clip_()


def set_gradients_of(parameters, seed):
    for index, parameter in enumerate(parameters):
        parameter.grad = ref.random_gradient(parameter.shape, seed=seed + index)
