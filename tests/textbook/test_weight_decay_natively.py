"""add_weight_decay_ natively: the bits of torch's own add_, and what it leaves to the fallback."""

from __future__ import annotations

import pytest
import reference as ref
import torch
from parametrize import by_border_size, by_layout, by_native_dtype
from torch.utils._python_dispatch import TorchDispatchMode

from gradclip_ext import add_weight_decay_
from gradclip_ext._ops import weight_decay as by_hand

by_wide_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ref.name_of)


def made(shape, dtype=torch.float32, seed=0):
    parameter = torch.nn.Parameter(ref.random_gradient(shape, dtype, seed))
    parameter.grad = ref.random_gradient(shape, dtype, seed + 100)
    return parameter


@pytest.fixture
def natively(monkeypatch):
    """The native engine has to take the list."""

    def declined(*_):
        raise AssertionError("the native engine declined")

    monkeypatch.setattr(by_hand, "add_weight_decay_", declined)


def added(parameters, weight_decay):
    return [p.grad.add(p.detach(), alpha=weight_decay) for p in parameters]


@by_wide_dtype
@by_border_size
@pytest.mark.usefixtures("natively")
def test_the_bits_of_torch(size, dtype):
    # With a list that is not empty as a whole.
    parameters = [made((size,), dtype), made((3,), dtype, 1)]
    for weight_decay in (0.03, 1e-4, 3.0):
        expected = added(parameters, weight_decay)
        add_weight_decay_(parameters, weight_decay)
        ref.assert_unchanged([p.grad for p in parameters], expected)


# Torch rounds the factor to 16 bits, too, and at the end of a tensor the product.
@pytest.mark.cpu_only
@by_border_size
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=ref.name_of)
def test_the_bits_of_torch_in_16_bits(size, dtype):
    parameters = [made((3,)), made((size,), dtype)]
    expected = added(parameters, 0.03)
    add_weight_decay_(parameters, 0.03)
    ref.assert_unchanged([p.grad for p in parameters], expected)


@by_native_dtype
def test_values(dtype):
    parameters = [made(shape, dtype, seed) for seed, shape in enumerate([(70, 300), (), (5,)])]
    expected = [ref.widened(p.grad) + 0.03 * ref.widened(p) for p in parameters]
    add_weight_decay_(parameters, 0.03)
    for parameter, wanted in zip(parameters, expected, strict=True):
        epsilon = torch.finfo(dtype).eps
        torch.testing.assert_close(ref.widened(parameter.grad), wanted, rtol=epsilon, atol=epsilon)


@pytest.mark.usefixtures("natively")
def test_a_list_of_several_dtypes():
    parameters = [
        made(shape, dtype, seed)
        for seed, dtype in enumerate([torch.float32, torch.float64])
        for shape in ((70, 300), (), (5,), (0, 3), (100_001,))
    ]
    parameters.insert(3, torch.nn.Parameter(torch.ones(3)))
    with_gradients = [p for p in parameters if p.grad is not None]
    versions = [p.grad._version for p in with_gradients]
    expected = added(with_gradients, 0.1)
    add_weight_decay_(parameters, 0.1)
    ref.assert_unchanged([p.grad for p in with_gradients], expected)
    assert [p.grad._version for p in with_gradients] == [v + 1 for v in versions]
    assert parameters[3].grad is None


@by_layout
@by_wide_dtype
def test_layouts(layout, dtype):
    parameter = torch.nn.Parameter(ref.LAYOUTS[layout](ref.random_gradient((6, 10), dtype)))
    parameter.grad = ref.LAYOUTS[layout](ref.random_gradient((6, 10), dtype, 1))
    expected = added([parameter], 0.1)
    add_weight_decay_(parameter, 0.1)
    ref.assert_unchanged([parameter.grad], expected)


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_a_gradient_with_another_alignment_than_its_parameter(shift):
    parameter = torch.nn.Parameter(ref.random_gradient((1000,)))
    parameter.grad = ref.random_gradient((1000 + shift,), seed=1)[shift:]
    expected = added([parameter], 0.1)
    add_weight_decay_(parameter, 0.1)
    ref.assert_unchanged([parameter.grad], expected)


def special():
    memory = ref.random_gradient((30,))
    twice = made((5,))
    same = ref.random_gradient((5,), seed=8)
    tied, view, other_dtype = (made((5,), seed=seed) for seed in range(3))
    tied.grad = view.grad = same
    chained = torch.nn.Parameter(memory[:10])
    chained.grad = ref.random_gradient((10,), seed=9)
    last = made((10,), seed=10)
    last.grad = memory[:10]
    other_dtype.data = other_dtype.data.double()
    transposed = made((4, 6))
    transposed.grad = transposed.grad.t().contiguous().t()
    return {
        "a parameter twice": [twice, twice],
        "a gradient twice": [tied, view],
        "a gradient that is a parameter": [chained, last],
        "another dtype": [other_dtype],
        "another layout": [transposed],
        "complex": [made((5,), torch.complex64)],
    }


@pytest.mark.parametrize("kind", special())
def test_what_the_fallback_adds(kind):
    mine, others = special()[kind], special()[kind]
    add_weight_decay_(mine, 0.1)
    # Each once, and one after the other, since some share memory.
    for parameter in dict.fromkeys(others):
        values = parameter.detach().to(parameter.grad.dtype)
        parameter.grad.add_(values, alpha=0.1)
    ref.assert_unchanged([p.grad for p in mine], [p.grad for p in others])


def test_a_dispatch_mode_sees_the_operations():
    class Watching(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            self.seen += 1
            return function(*arguments, **(keywords or {}))

    parameter = made((40, 33))
    expected = added([parameter], 0.1)
    with Watching() as watching:
        add_weight_decay_(parameter, 0.1)
    assert watching.seen > 0
    ref.assert_unchanged([parameter.grad], expected)


@pytest.mark.cpu_only
@pytest.mark.usefixtures("natively")
@by_wide_dtype
def test_the_same_bits_for_any_number_of_threads(dtype):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            parameters = [made((700, 300), dtype), made((5,), dtype, 1), made((90_001,), dtype, 2)]
            expected = added(parameters, 0.03)
            add_weight_decay_(parameters, 0.03)
            ref.assert_unchanged([p.grad for p in parameters], expected)
    finally:
        torch.set_num_threads(before)
