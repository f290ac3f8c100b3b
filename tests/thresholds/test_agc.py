"""AGC and adaptive_clip_grad_ against the paper's formula, unit by unit."""

from __future__ import annotations

import math
import pickle

import pytest
import reference as ref
import torch
from reference import name_of

from gradclip_ext.thresholds import AGC, adaptive_clip_grad_

pytestmark = pytest.mark.cpu_only

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
