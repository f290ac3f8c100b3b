"""grad_clipping against the formula in the books."""

from __future__ import annotations

import doctest
import math

import pytest
import reference as ref
import torch
from parametrize import by_dtype, by_layout, by_way
from reference import LAYOUTS, NATIVE_DTYPES

from gradclip_ext import textbook

pytestmark = pytest.mark.cpu_only


class Scratch:
    """A network as the book makes them from scratch: not a module, its parameters in a list."""

    def __init__(self, *gradients):
        self.params = ref.parameters(gradients)


def book_coefficient(gradients, theta):
    """d2l: norm = sqrt(sum of sum of squares); if norm > theta: grad *= theta / norm."""
    squares = 0.0
    for gradient in gradients:
        for value in ref.widened(gradient).abs().flatten().tolist():
            squares += value**2
    norm = math.sqrt(squares)
    return theta / norm if norm > theta else 1.0


class TestGradClipping:
    @by_way
    @by_dtype
    @pytest.mark.parametrize("theta", [0.0, 0.3, 1.0, 7.5, 1e4, math.inf])
    def test_clips_as_the_book_does(self, theta, dtype, mixed):
        gradients = [ref.random_gradient((5, 7), dtype, seed) for seed in range(3)]
        if mixed:
            gradients.append(ref.random_gradient((5, 14), dtype, 9)[:, ::2])
        before = [ref.widened(gradient) for gradient in gradients]
        originals = ref.copies(gradients)
        coefficient = book_coefficient(gradients, theta)
        norm = textbook.grad_clipping(Scratch(*gradients), theta)
        ref.assert_norm(norm, originals, 2.0)
        assert norm.dtype == dtype.to_real() and norm.dim() == 0
        for gradient, original in zip(gradients, before, strict=True):
            ref.assert_scaled(gradient, original, coefficient)

    @by_layout
    @by_dtype
    def test_layouts(self, dtype, layout):
        gradients = [LAYOUTS[layout](ref.random_gradient((6, 10), dtype, s)) for s in range(2)]
        before = [ref.widened(gradient) for gradient in gradients]
        coefficient = book_coefficient(gradients, 0.5)
        textbook.grad_clipping(Scratch(*gradients), 0.5)
        for gradient, original in zip(gradients, before, strict=True):
            ref.assert_scaled(gradient, original, coefficient)

    def test_mixed_dtypes(self):
        gradients = [ref.random_gradient((40,), dtype, 1) for dtype in NATIVE_DTYPES]
        before = [ref.widened(gradient) for gradient in gradients]
        coefficient = book_coefficient(gradients, 0.5)
        assert textbook.grad_clipping(Scratch(*gradients), 0.5).dtype == torch.float64
        for gradient, original in zip(gradients, before, strict=True):
            ref.assert_scaled(gradient, original, coefficient)

    @by_way
    def test_there_is_no_epsilon(self, mixed):
        # So small that an epsilon of 1e-6 would be most of the norm; powers of two are exact.
        small = 2.0**-40
        gradient = torch.tensor([3.0, 4.0], dtype=torch.float64) * small
        others = [torch.zeros(4, 4)[:, ::2]] if mixed else []
        norm = textbook.grad_clipping(Scratch(gradient, *others), 2.5 * small)
        assert norm.item() == 5.0 * small
        assert gradient.tolist() == [1.5 * small, 2.0 * small]

    @by_way
    @by_dtype
    def test_theta_equal_to_the_norm_changes_no_bit(self, dtype, mixed):
        gradients = [torch.tensor([3.0, -0.0, 4.0]).to(dtype)]
        if mixed:
            gradients.append(torch.zeros(4, 4, dtype=dtype)[:, ::2])
        originals = ref.copies(gradients)
        assert textbook.grad_clipping(Scratch(*gradients), 5.0).item() == 5.0
        ref.assert_unchanged(gradients, originals)
        assert torch.view_as_real(gradients[0].to(torch.complex128)).signbit()[1, 0]
        below = math.nextafter(5.0, 0.0)
        double = torch.tensor([3.0, 4.0], dtype=torch.float64)
        textbook.grad_clipping(Scratch(double), below)
        assert double[1].item() == 4.0 * (below / 5.0) < 4.0

    @by_dtype
    def test_below_theta_nothing_is_written(self, dtype):
        gradients = [ref.random_gradient((33,), dtype, s, scale=1e-3) for s in range(3)]
        originals = ref.copies(gradients)
        textbook.grad_clipping(Scratch(*gradients), 1.0)
        ref.assert_unchanged(gradients, originals)

    @by_way
    @pytest.mark.parametrize("theta", [0.0, 1e-300, 1.0, math.inf])
    def test_zero_gradients_stay_zero(self, theta, mixed):
        gradients = [torch.tensor([0.0, -0.0]), torch.zeros(4, 4)[:, ::2] if mixed else None]
        assert textbook.grad_clipping(Scratch(*gradients), theta).item() == 0.0
        assert gradients[0].signbit().tolist() == [False, True]

    @by_way
    def test_norm_that_is_not_finite(self, mixed):
        others = [torch.ones(4, 4)[:, ::2]] if mixed else []
        for bad in (math.nan, math.inf):
            gradient = torch.tensor([1.0, bad])
            norm = textbook.grad_clipping(Scratch(gradient, *others), 1.0)
            if math.isnan(bad):  # the book's `if norm > theta` is false
                assert norm.isnan() and gradient[0].item() == 1.0
            else:
                assert norm.isinf() and gradient[0].item() == 0.0
            assert gradient[1].isnan()

    def test_norm_beyond_the_dtype_still_clips(self):
        gradient = torch.full((16,), 60000.0, dtype=torch.float16)
        assert textbook.grad_clipping(Scratch(gradient), 4.0).isinf()
        assert gradient.tolist() == [1.0] * 16

    @pytest.mark.parametrize("coalesced", [False, True])
    def test_sparse(self, coalesced):
        sparse = torch.sparse_coo_tensor([[1, 3, 1]], [1.0, 4.0, 2.0], (5,))
        if coalesced:
            sparse = sparse.coalesce()
        dense = torch.tensor([0.0, 12.0])
        holder = Scratch()
        holder.params = [ref.Holder(sparse), ref.parameter(dense)]
        assert textbook.grad_clipping(holder, 6.5).item() == 13.0
        assert dense.tolist() == [0.0, 6.0]
        assert sparse.to_dense().tolist() == [0.0, 1.5, 0.0, 2.0, 0.0]

    def test_module_with_frozen_parameters(self):
        net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        net[0].weight.requires_grad_(False)
        net[1].bias.grad = None
        assert textbook.grad_clipping(net, 1.0).item() == 2.0
        assert net[0].bias.grad.tolist() == [0.5, 0.5]
        assert net[1].weight.grad.tolist() == [[0.5, 0.5]]
        assert net[0].weight.grad.eq(1.0).all()

    def test_module_is_taken_as_a_module_even_with_params(self):
        net = torch.nn.Linear(2, 1, bias=False)
        net.params = [ref.parameter(torch.tensor([1.0]))]
        net.weight.grad = torch.tensor([[3.0, 4.0]])
        textbook.grad_clipping(net, 2.5)
        assert net.weight.grad.tolist() == [[1.5, 2.0]]
        assert net.params[0].grad.item() == 1.0

    def test_plain_tensors_as_params(self):
        net = Scratch()
        net.params = [torch.tensor([1.0, 1.0], requires_grad=True)]
        (net.params[0] * torch.tensor([3.0, 4.0])).sum().backward()
        textbook.grad_clipping(net, 1)
        torch.testing.assert_close(net.params[0].grad, torch.tensor([0.6, 0.8]))
        net.params = net.params[0]
        assert textbook.grad_clipping(net, 0.5).item() == pytest.approx(1.0)

    @pytest.mark.parametrize(
        "net", [Scratch(), Scratch(None), torch.nn.ReLU()], ids=["empty", "no gradient", "module"]
    )
    def test_without_any_gradient(self, net):
        norm = textbook.grad_clipping(net, 1.0)
        assert norm.item() == 0.0 and norm.dim() == 0

    def test_result_does_not_require_grad(self):
        weight = torch.nn.Parameter(torch.tensor([2.0]))
        net = Scratch()
        net.params = [weight]
        (weight**3).backward(create_graph=True)
        assert not textbook.grad_clipping(net, 1.0).requires_grad

    def test_theta_may_be_any_number(self):
        for theta in (1, True, torch.tensor(1.0), torch.tensor([1]), torch.float32.itemsize / 4):
            gradient = torch.tensor([0.0, 2.0])
            textbook.grad_clipping(Scratch(gradient), theta)
            assert gradient[1].item() == 1.0

    @pytest.mark.parametrize(
        ("theta", "error", "found"),
        [
            (-1.0, ValueError, "that is not negative, found -1.0"),
            (math.nan, ValueError, "that is not negative, found nan"),
            (-math.inf, ValueError, "that is not negative, found -inf"),
            (torch.tensor(-2.0), ValueError, "that is not negative, found -2.0"),
            (None, TypeError, ", found None"),
            ("one", TypeError, ", found 'one' (str)"),
            (torch.ones(2), TypeError, ", found a Tensor"),
        ],
        ids=repr,
    )
    def test_wrong_theta(self, theta, error, found):
        gradient = torch.tensor([3.0, 4.0])
        with pytest.raises(error) as caught:
            textbook.grad_clipping(Scratch(gradient), theta)
        separator = "" if found.startswith(",") else " "
        assert str(caught.value) == (f"grad_clipping: theta has to be a number{separator}{found}")
        assert gradient.tolist() == [3.0, 4.0]

    @pytest.mark.parametrize("net", [[], None, torch.ones(2), Scratch], ids=lambda n: str(type(n)))
    def test_wrong_net(self, net):
        with pytest.raises(TypeError) as caught:
            textbook.grad_clipping(net, 1.0)
        assert str(caught.value) == (
            "grad_clipping: net has to be a torch.nn.Module or an object with an attribute params, "
            f"a list of tensors, found an object of type {type(net).__name__}; "
            "pass parameters themselves to gradclip_ext.clip_grad_norm_"
        )

    def test_wrong_params(self):
        net = Scratch(torch.tensor([3.0, 4.0]))
        net.params.append(2.5)
        with pytest.raises(TypeError) as caught:
            textbook.grad_clipping(net, 1.0)
        assert str(caught.value) == (
            "grad_clipping: net.params[1] has to be a torch.Tensor, found 2.5 (float)"
        )
        assert net.params[0].grad.tolist() == [3.0, 4.0]
        net.params = {"weight": net.params[0], 3: 4}
        with pytest.raises(TypeError) as caught:
            textbook.grad_clipping(net, 1.0)
        assert "net.params" in str(caught.value) and ".values()" in str(caught.value)

    def test_unwritable_gradient_leaves_the_others(self):
        net = torch.nn.Linear(3, 3)
        net.weight.grad = torch.full((3, 3), 5.0)
        net.bias.grad = torch.ones(1).expand(3)
        with pytest.raises(RuntimeError, match=r"^grad_clipping: net\.bias\.grad: unsupported"):
            textbook.grad_clipping(net, 1.0)
        assert net.weight.grad.eq(5.0).all()

    def test_integer_gradient(self):
        net = Scratch(torch.tensor([3.0]))
        net.params.append(ref.Holder(torch.tensor([4])))
        with pytest.raises(TypeError, match=r"^grad_clipping: net\.params\[1\]\.grad has to have"):
            textbook.grad_clipping(net, 1.0)
        assert net.params[0].grad.item() == 3.0

    def test_counts_as_written(self):
        for theta in (1.0, 100.0):
            gradient = torch.tensor([3.0, 4.0])
            version = gradient._version
            textbook.grad_clipping(Scratch(gradient), theta)
            assert gradient._version > version

    def test_compiles(self):
        gradient = torch.tensor([3.0, 4.0])
        net = Scratch(gradient)
        compiled = torch.compile(
            textbook.grad_clipping, backend="eager", fullgraph=ref.WITHOUT_GRAPH_BREAKS
        )
        norm = compiled(net, 2.5)
        assert norm.item() == 5.0 and norm.dtype == torch.float32
        torch.testing.assert_close(gradient, torch.tensor([1.5, 2.0]))

    @pytest.mark.cuda
    def test_on_a_gpu_nobody_waits(self):
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
        for extra in ([], [torch.ones(4, 4, device="cuda")[:, ::2]]):
            gradients = [ref.random_gradient((50,), seed=s).cuda() for s in range(3)] + extra
            before = [ref.widened(gradient) for gradient in gradients]
            coefficient = book_coefficient(gradients, 0.5)
            net = Scratch()
            net.params = [ref.Holder(gradient) for gradient in gradients]
            textbook.grad_clipping(net, 1e9)
            torch.cuda.set_sync_debug_mode("error")
            try:
                textbook.grad_clipping(net, 0.5)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for gradient, original in zip(gradients, before, strict=True):
                ref.assert_scaled(gradient, original, coefficient)


def test_examples_in_the_documentation():
    results = doctest.testmod(textbook)
    assert results.attempted > 10 and results.failed == 0
