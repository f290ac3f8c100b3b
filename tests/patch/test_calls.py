"""What is counted under the patch, and why the native engine declined."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gradclip_ext
from gradclip_ext import unpatch
from gradclip_ext._calls import Calls
from gradclip_ext._ops import declined
from gradclip_ext.patch import FUNCTIONS, patch_with


@pytest.fixture
def calls():
    calls = Calls()
    patch_with({name: calls.counted(name, function) for name, function in FUNCTIONS.items()})
    yield calls
    unpatch()


class Subclass(torch.Tensor):
    """Hides its memory from the native engine."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        plain = torch.utils._pytree.tree_map_only(cls, lambda tensor: tensor.inner, args)
        return function(*plain, **(kwargs or {}))


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def total_norm(tensor, norm_type=2.0, **arguments):
    torch.nn.utils.get_total_norm([torch.ones(2), tensor], norm_type, **arguments)


def under_a_mode():
    with Mode():
        total_norm(torch.ones(2))


def with_an_error():
    with pytest.raises(RuntimeError, match="non-finite"):
        total_norm(torch.tensor([torch.inf]), error_if_nonfinite=True)


def not_a_tensor():
    with pytest.raises(TypeError, match=r"tensors\[1\] has to be a torch.Tensor"):
        total_norm("weight")


def integers():
    with pytest.raises(TypeError):
        total_norm(torch.ones(2, dtype=torch.int32))


def on_meta():
    total_norm(torch.ones(2, device="meta"))


def dual():
    with torch.autograd.forward_ad.dual_level():
        total_norm(torch.autograd.forward_ad.make_dual(torch.ones(2), torch.ones(2)))


DECLINED = {
    "norm_type 3": lambda: total_norm(torch.ones(2), 3.0),
    "norm_type -1": lambda: total_norm(torch.ones(2), -1),
    "a dispatch mode, a function mode, functorch or a trace was active": under_a_mode,
    "layout sparse_coo": lambda: total_norm(torch.ones(2).to_sparse()),
    "dtype int32": integers,
    "dtype complex64 with norm_type 1": lambda: total_norm(
        torch.ones(2, dtype=torch.complex64), 1.0
    ),
    "type Subclass": lambda: total_norm(Subclass(torch.ones(2))),
    "an element of type str": not_a_tensor,
    "device meta, which this build has no engine for": on_meta,
    "a forward-mode derivative, an inference tensor, or other state of autograd": dual,
    "strides with gaps": lambda: total_norm(torch.ones(4)[::2]),
    "a norm that is not finite, and an error then": with_an_error,
}


@pytest.mark.parametrize("reason", DECLINED)
def test_reason(calls, reason):
    try:
        DECLINED[reason]()
    except AssertionError:
        raise
    except Exception:
        # The call is counted whatever becomes of it.
        assert reason.startswith("device meta")
    assert dict(calls.declined) == {reason: 1}
    assert dict(calls.counts) == {"get_total_norm": 1}


def test_reason_of_each_function(calls):
    def weight():
        result = torch.nn.Parameter(torch.zeros(4))
        result.grad = torch.ones(8)[::2]
        return [torch.nn.Parameter(torch.zeros(1)), result]

    torch.nn.utils.clip_grad_norm_(weight(), 1.0)
    torch.nn.utils.clip_grad_value_(weight(), 1.0)
    torch.nn.utils.clip_grads_with_norm_(weight(), 1.0, torch.tensor(2.0))
    torch.nn.utils.get_total_norm([parameter.grad for parameter in weight()[1:]])
    assert dict(calls.counts) == dict.fromkeys(FUNCTIONS, 1)
    assert dict(calls.declined) == {"strides with gaps": 4}


def test_first_reason_counts_once(calls):
    """A call that falls back several times, as one that also calls for a part, is one call."""
    mixed = [torch.ones(2).to_sparse(), torch.ones(4)[::2]]
    torch.nn.utils.get_total_norm(mixed)
    assert dict(calls.declined) == {"layout sparse_coo": 1}


def test_native_calls(calls):
    weight = torch.nn.Parameter(torch.zeros(2))
    for _ in range(3):
        weight.grad = torch.tensor([3.0, 4.0])
        assert torch.nn.utils.clip_grad_norm_(weight, 1.0).item() == 5.0
    assert torch.nn.utils.clip_grad_norm_([], 1.0).item() == 0.0
    assert dict(calls.counts) == {"clip_grad_norm_": 4}
    assert not calls.declined


def test_gradient_of_a_subclass_is_read_once(calls):
    class Computed(torch.nn.Parameter):
        reads = 0

        @property
        def grad(self):
            Computed.reads += 1
            return torch.full((4,), 2.0)[::2]

    computed = Computed(torch.zeros(2))
    assert gradclip_ext.clip_grad_norm_([computed], 1.0).item() == pytest.approx(8**0.5)
    expected, Computed.reads = Computed.reads, 0
    assert torch.nn.utils.clip_grad_norm_([computed], 1.0).item() == pytest.approx(8**0.5)
    assert Computed.reads == expected > 0
    assert dict(calls.declined) == {"gradients that Computed computes": 1}


def test_own_functions_of_the_package_are_not_counted(calls):
    gradclip_ext.get_total_norm([torch.ones(2)], 3.0)
    assert not calls.counts and not calls.declined


def test_time_is_that_of_the_calls(calls, monkeypatch):
    times = iter([10.0, 10.5, 20.0, 20.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    torch.nn.utils.get_total_norm([torch.ones(2)])
    torch.nn.utils.get_total_norm([torch.ones(2)], 3.0)
    assert calls.seconds == 0.75


def test_threads(calls):
    def clip(odd):
        for _ in range(200):
            torch.nn.utils.get_total_norm([torch.ones(2)], 3.0 if odd else 2.0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(clip, [False, True, False, True]))
    assert dict(calls.counts) == {"get_total_norm": 800}
    assert dict(calls.declined) == {"norm_type 3": 400}


def test_nobody_watches_without_the_patch():
    with mock.patch.object(declined, "_reason") as reason:
        gradclip_ext.get_total_norm([torch.ones(2)], 3.0)
    reason.assert_not_called()


@pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="cannot trace torch's own function either"
)
def test_a_compiler_traces_no_counting(calls):
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(tensor):
        return torch.nn.utils.get_total_norm([tensor], 3.0)

    for size in (1.0, 2.0, 3.0):
        assert compiled(torch.full((4,), size)).item() == pytest.approx(size * 4 ** (1 / 3))
    assert len(graphs) == 1
    assert not calls.counts and not calls.declined
    torch.compiler.reset()


def made(counts, declined=(), seconds=0.5, processes=1):
    calls = Calls()
    calls.counts.update(counts)
    calls.declined.update(dict(declined))
    calls.seconds = seconds
    calls.processes = processes
    return calls


class TestReport:
    def test_all_native(self):
        assert made({"clip_grad_norm_": 4}, seconds=0.002).report() == [
            "4 calls, 100 % native, 0.002 s in all, 500 us each",
            "clip_grad_norm_ 4",
        ]

    def test_several(self):
        calls = made({"a": 1, "b": 4}, {"norm_type 3": 1, "strides with gaps": 3}, processes=2)
        assert calls.report() == [
            "5 calls in 2 processes, 20 % native, 0.5 s in all, 1e+05 us each",
            "b 4, a 1",
            "4 went through torch's operations:",
            "  3: strides with gaps",
            "  1: norm_type 3",
        ]

    @pytest.mark.parametrize(
        ("count", "declined", "share"),
        [(100_000, 1, "99.9 %"), (100_000, 99_999, "0.1 %"), (3, 3, "0 %"), (3, 1, "66.7 %")],
    )
    def test_share(self, count, declined, share):
        report = made({"a": count}, {"b": declined}).report()
        assert f", {share} native, " in report[0]

    def test_of_several_processes(self):
        first, second = made({"a": 1}, {"c": 1}), made({"a": 2, "b": 3}, {"c": 2, "d": 1})
        launcher = made({}, seconds=0.0)
        launcher.add(first.as_dict())
        assert (launcher.processes, dict(launcher.counts)) == (1, {"a": 1})
        launcher.add(second.as_dict())
        assert (launcher.processes, dict(launcher.counts)) == (2, {"a": 3, "b": 3})
        assert dict(launcher.declined) == {"c": 3, "d": 1}
        assert launcher.seconds == 1.0
