"""Norms of single gradients."""

from __future__ import annotations

import copy
import math

import pytest
import reference as ref
import torch
from models import gradients_of, make_model
from parametrize import by_native_dtype, by_order
from torch import nn

import gradclip_ext
from gradclip_ext import grad_norms


class TestGradNorms:
    @by_order
    @by_native_dtype
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
