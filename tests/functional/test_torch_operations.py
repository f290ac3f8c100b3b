"""What torch's operations are asked to do, where the native engine does not work.

On a GPU some of them race or round where they do not on the CPU. What is asked of them can be seen
anywhere: by a dispatch mode, on the CPU and on the meta device.
"""

from __future__ import annotations

import pytest
import reference as ref
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gradclip_ext
from gradclip_ext._ops import torch_ops

pytestmark = pytest.mark.cpu_only


class Calls(TorchDispatchMode):
    """Records each operation and its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function.overloadpacket.__name__, args))
        return function(*args, **(kwargs or {}))

    def of(self, prefix):
        return [args for name, args in self.calls if name.startswith(prefix)]


def clip(gradients, **options):
    parameters = ref.parameters(gradients)
    with Calls() as calls:
        gradclip_ext.clip_grad_norm_(parameters, 1.0, 3.0, **options)
    return calls


def clamp(gradients, **options):
    parameters = ref.parameters(gradients)
    with Calls() as calls:
        gradclip_ext.clip_grad_value_(parameters, 1.0, **options)
    return calls


def lists():
    storage = torch.full((100,), 2.0)
    gradient = torch.full((5, 3), 2.0)
    return {
        "the same twice": [gradient, torch.ones(2), gradient],
        "views of the same": [gradient, gradient.view(15)],
        "views that overlap": [storage[:60], storage[40:]],
        "a view inside of another": [storage, storage[10:20]],
        "overlapping views with gaps": [storage[::2], storage[10:50]],
        "columns of a matrix": [storage.view(10, 10)[:, :4], storage.view(10, 10)[:, 4:]],
    }


@pytest.mark.parametrize("write, prefix", [(clip, "_foreach_mul"), (clamp, "_foreach_clamp")])
@pytest.mark.parametrize("case", list(lists()))
def test_no_multi_tensor_operation_writes_memory_that_tensors_share(case, write, prefix):
    # On a GPU it would do so in parallel.
    calls = write(lists()[case], foreach=True)
    assert not calls.of(prefix)
    one_by_one = calls.of("mul_" if write is clip else "clamp_")
    assert len(one_by_one) == len(lists()[case])


def test_the_same_gradient_twice_with_multi_tensor_operations():
    gradient = torch.full((4,), 2.0)
    norm = gradclip_ext.clip_grad_norm_(
        ref.parameters([gradient, gradient]), 1.0, 3.0, foreach=True
    )
    assert norm.item() == pytest.approx(4.0, rel=1e-6)
    assert gradient.tolist() == pytest.approx([2.0 / 16.0] * 4, rel=1e-5)


@pytest.mark.parametrize("write, prefix", [(clip, "_foreach_mul"), (clamp, "_foreach_clamp_max")])
def test_views_side_by_side_in_one_storage_share_nothing(write, prefix):
    # As DDP's buckets hold the gradients.
    storage = torch.full((100,), 2.0)
    views = [storage[60:], storage[:20].view(4, 5), storage[20:20], storage[20:60]]
    (call,) = write(views, foreach=True).of(prefix)
    assert len(call[0]) == len(views)


def test_weight_decay_of_a_gradient_in_the_memory_of_a_parameter(monkeypatch):
    monkeypatch.setattr(torch_ops.torch_private, "has_foreach_support", lambda *_: True)
    first, second = (torch.nn.Parameter(torch.full((3,), value)) for value in (1.0, 2.0))
    first.grad, second.grad = second.data, torch.full((3,), 8.0)
    with Calls() as calls:
        gradclip_ext.add_weight_decay_([first, second], 0.5)
    assert not calls.of("_foreach_add")
    # In the order of the list.
    assert second.data.tolist() == [2.5] * 3
    assert second.grad.tolist() == [9.25] * 3


NARROW = [torch.bfloat16, torch.float16, torch.float32, torch.complex64]


@pytest.mark.parametrize("dtype", NARROW, ids=ref.name_of)
@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("shape", [(), (6,), (4, 6)], ids=str)
def test_no_coefficient_is_rounded_on_a_gpu(dtype, foreach, shape):
    # There, unlike on the CPU, mul_ converts a 0-dim factor to the dtype of the result first.
    gradient = torch.ones(shape, dtype=dtype, device="meta")
    coefficient = torch.ones((), dtype=torch.float64, device="meta")
    with Calls() as calls:
        torch_ops.scale_([gradient, gradient.clone()], coefficient, foreach)
    products = calls.of("mul")
    assert len(products) == 2
    for arguments in products:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        assert [tensor.dtype for tensor in arguments] == [wide, torch.float64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ref.name_of)
def test_other_orders_keep_torchs_rounding(dtype):
    # The coefficient itself has 16 bits there, as torch's has.
    gradient = torch.ones(6, dtype=dtype, device="meta")
    with Calls() as calls:
        torch_ops.scale_([gradient], torch.ones((), dtype=dtype, device="meta"), None)
    ((written, factor),) = calls.of("mul_")
    assert written.dtype == factor.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ref.name_of)
@pytest.mark.parametrize("value", [1.0, 1e-35])
def test_a_number_of_the_host_reaches_a_gpu_without_a_copy(dtype, value, monkeypatch):
    # A copy from ordinary memory waits for the GPU, and cannot be captured in a graph.
    monkeypatch.setattr(torch_ops, "observed", lambda: False)
    coefficient = torch.tensor(value, dtype=torch.float64)
    gradient = torch.ones(4, dtype=dtype, device="meta")
    with Calls() as calls:
        torch_ops.scale_([gradient], coefficient, None)
        torch_ops.scale_in_float64_([gradient], coefficient)
    copies = [arguments for name, arguments in calls.calls if name in ("_to_copy", "copy_")]
    assert all(tensor.is_meta for call in copies for tensor in call if torch.is_tensor(tensor))
    assert len(calls.of("full")) == 2
