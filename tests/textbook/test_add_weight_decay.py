"""add_weight_decay_ against the formula in the books, and against what torch.optim.SGD does."""

from __future__ import annotations

import math

import pytest
import reference as ref
import torch
from parametrize import by_layout
from reference import COMPLEX_DTYPES, LAYOUTS, NATIVE_DTYPES, name_of

from gradclip_ext import textbook

pytestmark = pytest.mark.cpu_only


def weights_and_gradients(dtypes=NATIVE_DTYPES + COMPLEX_DTYPES):
    parameters = []
    for seed, dtype in enumerate(dtypes * 2):
        parameter = torch.nn.Parameter(ref.random_gradient((4, 6), dtype, seed))
        parameter.grad = ref.random_gradient((4, 6), dtype, seed + 100)
        parameters.append(parameter)
    return parameters


# Each a gradient and its parameter, where that is not torch.zeros(3).
BAD_GRADIENTS = {
    "sparse": (
        lambda: (torch.sparse_coo_tensor([[0]], [1.0], (3,)), None),
        TypeError,
        ": weight_decay option is not compatible with sparse gradients, "
        "found the layout torch.sparse_coo",
    ),
    "shape": (
        lambda: (torch.ones(1), None),
        ValueError,
        " has to have the shape of its parameter, (3,), found (1,)",
    ),
    "integer": (
        lambda: (torch.ones(3, dtype=torch.int64), None),
        TypeError,
        " has to have a floating point or complex dtype, found torch.int64",
    ),
    "real": (
        lambda: (torch.ones(3), torch.zeros(3, dtype=torch.complex64)),
        TypeError,
        " has to be complex like its parameter, found torch.float32",
    ),
    "expanded": (
        lambda: (torch.ones(1).expand(3), None),
        RuntimeError,
        ": unsupported operation: more than one element of the written-to tensor refers to a "
        "single memory location. Please clone() the tensor before performing the operation.",
    ),
}


def bad_parameter(gradient, parameter=None):
    holder = ref.Holder(gradient)
    holder.data = torch.zeros(3) if parameter is None else parameter
    return holder


class TestAddWeightDecay:
    @pytest.mark.parametrize("weight_decay", [1e-4, 0.1, 3])
    def test_values(self, weight_decay):
        parameters = weights_and_gradients()
        expected = [
            ref.widened(parameter.grad) + weight_decay * ref.widened(parameter)
            for parameter in parameters
        ]
        assert textbook.add_weight_decay_(parameters, weight_decay) is None
        for parameter, wanted in zip(parameters, expected, strict=True):
            epsilon = torch.finfo(parameter.dtype).eps
            torch.testing.assert_close(
                ref.widened(parameter.grad), wanted, rtol=2 * epsilon, atol=10 * epsilon
            )

    @pytest.mark.parametrize("foreach", [False, True])
    def test_is_what_sgd_does(self, foreach):
        ours, theirs = weights_and_gradients(), weights_and_gradients()
        textbook.add_weight_decay_((parameter for parameter in ours), 0.03)
        torch.optim.SGD(ours, lr=0.1, foreach=foreach).step()
        torch.optim.SGD(theirs, lr=0.1, weight_decay=0.03, foreach=foreach).step()
        ref.assert_unchanged(ours, theirs)

    def test_parameters_are_only_read(self):
        parameters = weights_and_gradients()
        originals = ref.copies([parameter.detach() for parameter in parameters])
        versions = [parameter._version for parameter in parameters]
        textbook.add_weight_decay_(parameters, 0.1)
        ref.assert_unchanged(parameters, originals)
        assert versions == [parameter._version for parameter in parameters]
        assert not any(parameter.grad.requires_grad for parameter in parameters)

    def test_passes_over_what_has_no_gradient(self):
        with_one, without = ref.parameters([torch.tensor([1.0]), None])
        with_one.data.fill_(2.0)
        textbook.add_weight_decay_([without, with_one], 0.5)
        assert without.grad is None and with_one.grad.item() == 2.0
        textbook.add_weight_decay_([without], 0.5)
        textbook.add_weight_decay_([], 0.5)
        textbook.add_weight_decay_(with_one, 0.5)
        assert with_one.grad.item() == 3.0

    def test_zero_writes_nothing(self):
        parameters = weights_and_gradients()
        parameters[0].data.fill_(math.inf)  # 0 * inf is NaN
        sparse = ref.Holder(torch.sparse_coo_tensor([[0]], [1.0], (3,)))
        versions = [parameter.grad._version for parameter in parameters]
        originals = ref.copies([parameter.grad for parameter in parameters])
        textbook.add_weight_decay_([*parameters, sparse], 0)
        ref.assert_unchanged([parameter.grad for parameter in parameters], originals)
        assert versions == [parameter.grad._version for parameter in parameters]

    @by_layout
    def test_layouts(self, layout):
        gradient = LAYOUTS[layout](ref.random_gradient((6, 10), seed=1))
        # Not the strides of the gradient, which may be any.
        parameter = torch.nn.Parameter(ref.random_gradient(gradient.shape, seed=2))
        parameter.grad = gradient
        expected = gradient.add(parameter.detach(), alpha=0.1)
        textbook.add_weight_decay_(parameter, 0.1)
        assert torch.equal(gradient, expected)

    def test_lazily_conjugated_gradient(self):
        gradient = torch.tensor([1.0 + 2.0j]).conj()
        parameter = torch.nn.Parameter(torch.tensor([10.0 + 10.0j]))
        parameter.grad = gradient
        textbook.add_weight_decay_(parameter, 0.5)
        assert gradient.item() == 6.0 + 3.0j

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64], ids=name_of)
    def test_gradient_of_another_dtype(self, dtype):
        gradient = torch.tensor([1.0, 2.0, 3.0]).to(dtype)
        holder = ref.Holder(gradient)
        holder.data = torch.tensor([10.0, 20.0, 30.0])
        textbook.add_weight_decay_([holder, *weights_and_gradients()], 0.5)
        assert gradient.dtype == dtype and gradient.tolist() == [6.0, 12.0, 18.0]

    def test_listed_twice_counts_once(self):
        parameter = ref.parameter(torch.tensor([1.0]))
        parameter.data.fill_(2.0)
        textbook.add_weight_decay_([parameter, parameter], 0.5)
        assert parameter.grad.item() == 2.0

    def test_compiles(self):
        parameters, originals = weights_and_gradients(), weights_and_gradients()
        compiled = torch.compile(
            textbook.add_weight_decay_, backend="eager", fullgraph=ref.WITHOUT_GRAPH_BREAKS
        )
        compiled(parameters, 0.1)
        textbook.add_weight_decay_(originals, 0.1)
        ref.assert_unchanged([p.grad for p in parameters], [p.grad for p in originals])

    @pytest.mark.parametrize(
        ("weight_decay", "error", "text"),
        [
            (-0.1, ValueError, "a number that is not negative, found -0.1"),
            (math.nan, ValueError, "a number that is not negative, found nan"),
            (None, TypeError, "a number, found None"),
            (
                1e6,
                ValueError,
                "a number that the dtype of parameters[2].grad, torch.float16, can hold, "
                "found 1000000.0",
            ),
        ],
        ids=str,
    )
    def test_wrong_weight_decay(self, weight_decay, error, text):
        parameters = weights_and_gradients()
        originals = ref.copies([parameter.grad for parameter in parameters])
        with pytest.raises(error) as caught:
            textbook.add_weight_decay_(parameters, weight_decay)
        assert str(caught.value) == f"add_weight_decay_: weight_decay has to be {text}"
        ref.assert_unchanged([parameter.grad for parameter in parameters], originals)

    @pytest.mark.parametrize("kind", BAD_GRADIENTS)
    def test_bad_gradient_leaves_the_others(self, kind):
        make, error, text = BAD_GRADIENTS[kind]
        good = weights_and_gradients()
        originals = ref.copies([parameter.grad for parameter in good])
        with pytest.raises(error) as caught:
            textbook.add_weight_decay_([*good, bad_parameter(*make())], 0.1)
        assert str(caught.value) == f"add_weight_decay_: parameters[{len(good)}].grad{text}"
        ref.assert_unchanged([parameter.grad for parameter in good], originals)

    def test_freed_memory(self):
        good = ref.parameter(torch.tensor([1.0]))
        freed = ref.parameter(torch.ones(3))
        freed.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=r"^add_weight_decay_: parameters\[1\] of shape"):
            textbook.add_weight_decay_([good, freed], 0.1)

    def test_wrong_parameters(self):
        net = torch.nn.Linear(2, 2)
        with pytest.raises(
            TypeError, match=r"^add_weight_decay_: parameters has .* a Linear; pass"
        ):
            textbook.add_weight_decay_(net, 0.1)
        with pytest.raises(TypeError, match=r"^add_weight_decay_: parameters\[0\] has .* a tuple"):
            textbook.add_weight_decay_(net.named_parameters(), 0.1)
