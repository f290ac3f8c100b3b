"""Norms of individual gradients."""

from __future__ import annotations

import copy
import math

import pytest
import reference as ref
import torch
from models import gradients_of, make_model
from parametrize import by_native_dtype, by_norm_type
from torch import nn

import gradclip_ext
from gradclip_ext import grad_norms


class TestGradNorms:
    @by_norm_type
    @by_native_dtype
    def test_total_and_each(self, dtype, norm_type):
        shapes = [(300, 700), (5,), (0,), (129, 100), (1,), (90_001,)]
        gradients = [ref.random_gradient(shape, dtype, seed) for seed, shape in enumerate(shapes)]
        gradients.insert(2, None)
        total, norms, names = grad_norms(ref.parameters(gradients), norm_type)
        filled = [gradient for gradient in gradients if gradient is not None]
        assert total.dtype == norms.dtype == torch.float64
        assert norms.shape == (7,)
        assert names[6] == "parameters[6]"
        # The same bits as in a pass without the norms of the parts.
        expected = gradclip_ext.get_total_norm(
            filled, norm_type, dtype=None if dtype == torch.float64 else torch.float32
        )
        assert total.to(expected.dtype).item() == expected.item()
        for norm, gradient in zip(norms, gradients, strict=True):
            if gradient is None or gradient.numel() == 0:
                assert norm.item() == 0.0
            else:
                rounded = norm.to(torch.float64 if dtype == torch.float64 else torch.float32)
                ref.assert_norm(rounded, [gradient], norm_type)

    def test_names_and_dtype(self):
        model = make_model()
        for source in (model, model.named_parameters()):
            found = grad_norms(source, dtype=torch.float32)
            assert found.names == ("0.weight", "0.bias", "2.weight")
            assert found.norms.dtype == found.total.dtype == torch.float32
            expected = [ref.reference_norm([gradient], 2.0) for gradient in gradients_of(model)]
            assert found.norms.tolist() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
    def test_gradients_that_are_not_native(self, norm_type):
        strided = ref.random_gradient((6, 8))[:, ::2]
        sparse = torch.sparse_coo_tensor(
            [[0, 2]], [3.0, -4.0], (5,), check_invariants=True
        ).coalesce()
        plain = ref.random_gradient((11,), seed=1)
        parameters = [ref.Holder(gradient) for gradient in (strided, sparse, plain)]
        total, norms, _ = grad_norms(parameters, norm_type)
        dense = [strided, sparse.to_dense(), plain]
        expected = [
            torch.linalg.vector_norm(gradient.double(), norm_type).item() for gradient in dense
        ]
        assert norms.tolist() == pytest.approx(expected, rel=1e-6)
        whole = torch.cat([gradient.double().flatten() for gradient in dense])
        assert total.item() == pytest.approx(
            torch.linalg.vector_norm(whole, norm_type).item(), rel=1e-6
        )

    @pytest.mark.parametrize("order", [0.0, 0.5, 3.0, -1.0])
    def test_orders_whose_norm_of_one_norm_is_another(self, order):
        gradients = [torch.tensor(numbers) for numbers in ([1.0, 0.0, 2.0], [3.0], [0.0, 0.0])]
        gradients.append(torch.tensor([1e200, 1e-200], dtype=torch.float64))
        if order < 0.0:
            gradients = [gradient for gradient in gradients if (gradient != 0).all()]
        total, norms, _ = grad_norms(ref.parameters([*gradients, None]), order)
        expected = [torch.linalg.vector_norm(g.double(), order).item() for g in gradients]
        assert norms.tolist() == [*expected, 0.0]
        assert total.item() == torch.nn.utils.get_total_norm(gradients, order).item()

    def test_number_of_elements_that_are_not_zero(self):
        gradients = [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 5.0])]
        total, norms, _ = grad_norms(ref.parameters(gradients), 0)
        assert norms.tolist() == [2.0, 1.0]
        assert total.item() == torch.nn.utils.get_total_norm(gradients, 0).item() == 2.0
        total, norms, _ = grad_norms(ref.parameters(gradients[:1]), 0)
        assert (total.item(), norms.tolist()) == (1.0, [2.0])

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


class Computed(torch.Tensor):
    """A parameter whose gradient is computed, with side effects."""

    @property
    def grad(self):
        return self.compute()


def computed(function):
    result = torch.zeros(1).as_subclass(Computed)
    result.compute = function
    return result


class TestComputedGradients:
    @pytest.mark.parametrize("change", [list.clear, lambda items: items.extend(items[:1] * 1000)])
    def test_that_change_the_list(self, change):
        items = [ref.Holder(torch.tensor([3.0])), ref.Holder(torch.tensor([4.0]))]
        items.insert(1, computed(lambda: change(items)))
        measured = grad_norms(items)
        assert len(measured.names) == len(measured.norms)
        assert measured.norms[0].item() == 3.0

    def test_that_are_others_each_time(self):
        answers = iter([torch.tensor([3.0]), None, 5, "gone"])
        _, norms, _ = grad_norms([computed(lambda: next(answers)), ref.Holder(torch.ones(1))], 3)
        assert norms.tolist() == [3.0, 1.0]

    @pytest.mark.parametrize("is_native", [True, False], ids=["native", "fallback"])
    @pytest.mark.parametrize("place", [0, 1])
    def test_that_take_memory_away(self, is_native, place):
        def take_away():
            big.grad.untyped_storage().resize_(0)

        big = ref.Holder(torch.ones(100_000))
        items = [big]
        items.insert(place, computed(take_away))
        if not is_native:
            sparse = torch.sparse_coo_tensor([[0]], [1.0], (1,), check_invariants=True)
            items.append(ref.Holder(sparse))
        with pytest.raises(RuntimeError, match=r"parameters\[.\].grad of shape .* has no memory"):
            grad_norms(items)


@pytest.mark.parametrize("count", [1349, 1400, 1601])
def test_the_bits_of_the_norm_alone_for_lists_of_several_launches(count):
    gradients = [ref.random_gradient((1 + i % 97,), torch.float64, seed=i) for i in range(count)]
    expected = gradclip_ext.get_total_norm(gradients)
    total, norms, _ = grad_norms(ref.parameters(gradients))
    assert total.item() == expected.item()
    assert norms[-1].item() == pytest.approx(ref.reference_norm(gradients[-1:], 2.0), rel=1e-15)
