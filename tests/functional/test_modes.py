"""Everything that intercepts torch's operations, and tensors that only look ordinary.

Each is handled or refused: never a crash, never a silent no-op.
"""

from __future__ import annotations

import pytest
import reference as ref
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import gradclip_ext
from gradclip_ext import _C

pytestmark = pytest.mark.cpu_only


def given():
    return ref.parameters([torch.full((4,), 3.0), torch.full((4, 4), 4.0)])


NORM = (4 * 9.0 + 16 * 16.0) ** 0.5


def check_clipped(parameters):
    assert parameters[0].grad.tolist() == pytest.approx([3.0 / NORM] * 4, rel=1e-5)
    assert parameters[1].grad.flatten().tolist() == pytest.approx([4.0 / NORM] * 16, rel=1e-5)


class Operations(TorchDispatchMode):
    """Records which operations ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket._qualified_op_name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


class TestDispatchModes:
    def test_a_dispatch_mode_sees_real_operations(self):
        parameters = given()
        with Operations() as operations:
            assert _C.observed()
            norm = gradclip_ext.clip_grad_norm_(parameters, 1.0)
        assert not _C.observed()
        assert norm.item() == pytest.approx(NORM, rel=1e-6)
        check_clipped(parameters)
        assert any("norm" in name for name in operations.names)
        assert any("mul_" in name for name in operations.names)

    def test_flop_counter_mode(self):
        parameters = given()
        with FlopCounterMode(display=False):
            norm = gradclip_ext.clip_grad_norm_(parameters, 1.0)
        assert norm.item() == pytest.approx(NORM, rel=1e-6)
        check_clipped(parameters)

    def test_operations_under_every_function(self):
        with Operations() as operations:
            gradclip_ext.get_total_norm([torch.ones(3)])
            measured = list(operations.names)
            gradclip_ext.clip_grads_with_norm_(given(), 1.0, 5.0)
            gradclip_ext.clip_grad_value_(given(), 1.0)
        assert measured
        assert any("clamp" in name for name in operations.names)

    def test_a_function_mode_sees_calls(self):
        class Seen(TorchFunctionMode):
            count = 0

            def __torch_function__(self, function, types, args=(), kwargs=None):
                Seen.count += 1
                return function(*args, **(kwargs or {}))

        parameters = given()
        with Seen():
            gradclip_ext.clip_grad_norm_(parameters, 1.0)
        check_clipped(parameters)
        assert Seen.count > 0


class TestFakeTensors:
    @pytest.mark.parametrize("inside", [True, False], ids=["in the mode", "outside the mode"])
    def test_fake_gradients(self, inside):
        with FakeTensorMode() as mode:
            parameters = given()
            if inside:
                norm = gradclip_ext.clip_grad_norm_(parameters, 1.0)
                gradclip_ext.clip_grad_value_(parameters, 1.0)
        if not inside:
            norm = gradclip_ext.clip_grad_norm_(parameters, 1.0)
            gradclip_ext.clip_grad_value_(parameters, 1.0)
        assert isinstance(norm, FakeTensor)
        assert norm.fake_mode is mode
        assert norm.shape == ()

    def test_meta_gradients(self):
        parameter = torch.nn.Parameter(torch.zeros(4, device="meta"))
        parameter.grad = torch.ones(4, device="meta")
        norm = gradclip_ext.clip_grad_norm_([parameter], 1.0)
        assert norm.device.type == "meta"

    def test_real_norm_beside_fake_gradients_is_refused_or_right(self):
        real = ref.parameters([torch.ones(3)])
        with FakeTensorMode():
            try:
                expected = torch.nn.utils.get_total_norm([real[0].grad])
            except Exception as error:
                with pytest.raises(type(error)):
                    gradclip_ext.get_total_norm([real[0].grad])
            else:
                found = gradclip_ext.get_total_norm([real[0].grad])
                assert type(found) is type(expected)


class TestFunctorch:
    def test_vmap(self):
        batch = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
        norms = torch.func.vmap(lambda g: gradclip_ext.get_total_norm([g], foreach=False))(batch)
        assert norms.tolist() == pytest.approx([5.0, 10.0])
        # Torch has no batching rule for the multi-tensor operations that foreach=None chooses.
        for module in (torch.nn.utils, gradclip_ext):
            with pytest.raises(RuntimeError, match="_foreach_norm"):
                torch.func.vmap(lambda g, module=module: module.get_total_norm([g]))(batch)

    def test_grad(self):
        gradient = torch.func.grad(lambda x: (gradclip_ext.get_total_norm([x]) * 0 + x).sum())(
            torch.ones(())
        )
        assert gradient.item() == 1.0

    def test_native_again_after_the_transform(self):
        torch.func.vmap(lambda x: x * 2)(torch.ones(2, 2))
        assert not _C.observed()


class TestTracing:
    @pytest.mark.filterwarnings("ignore")
    def test_jit_trace_records_operations(self):
        def clip(gradient):
            return gradclip_ext.get_total_norm([gradient])

        traced = torch.jit.trace(clip, (torch.tensor([3.0, 4.0]),))
        assert traced(torch.tensor([6.0, 8.0])).item() == 10.0
        assert not _C.observed()

    @pytest.mark.filterwarnings("ignore")
    def test_torch_compile_of_a_step(self):
        weight = torch.nn.Parameter(torch.zeros(3))

        def step(gradient):
            weight.grad = gradient
            norm = gradclip_ext.clip_grad_norm_([weight], 1.0)
            return norm, weight.grad * 1.0

        norm, clipped = torch.compile(step, backend="eager", fullgraph=ref.WITHOUT_GRAPH_BREAKS)(
            torch.tensor([2.0, 3.0, 6.0])
        )
        assert norm.item() == 7.0
        assert clipped.tolist() == pytest.approx([2 / 7, 3 / 7, 6 / 7], rel=1e-5)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(
        "call",
        [
            lambda ps: gradclip_ext.get_total_norm([p.grad for p in ps], 1.0, dtype=torch.float64),
            lambda ps: gradclip_ext.clip_grads_with_norm_(ps, 1.0, 70.0),
            lambda ps: gradclip_ext.clip_grad_value_(ps, 0.5),
            lambda ps: gradclip_ext.clip_grad_norm_(ps, torch.tensor(1.0)),
            lambda ps: gradclip_ext.clip_grad_norm_(ps, float("inf")),
        ],
        ids=["get_total_norm", "clip_grads_with_norm_", "clip_grad_value_", "tensor", "measure"],
    )
    def test_compiled_calls_do_what_eager_ones_do(self, call):
        eager, compiled = given(), given()
        expected = call(eager)
        found = torch.compile(call, backend="eager", fullgraph=ref.WITHOUT_GRAPH_BREAKS)(compiled)
        torch.testing.assert_close(found, expected)
        for one, two in zip(eager, compiled, strict=True):
            torch.testing.assert_close(two.grad, one.grad)

    def test_make_fx_traces_real_operations(self):
        from torch.fx.experimental.proxy_tensor import make_fx

        graph = make_fx(lambda g: gradclip_ext.get_total_norm([g]))(torch.ones(3))
        assert graph(torch.tensor([3.0, 4.0, 0.0])).item() == 5.0


class Wrapper(torch.Tensor):
    """A wrapper subclass: it looks like a strided CPU tensor but has no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrap(value):
            if isinstance(value, (list, tuple)):
                return type(value)(unwrap(item) for item in value)
            return value.inner if isinstance(value, Wrapper) else value

        return function(*unwrap(args), **(kwargs or {}))


class LoggingSubclass(torch.Tensor):
    """A plain subclass, as users create one with as_subclass."""


class OwnGradient(torch.nn.Parameter):
    """A parameter that keeps its gradient elsewhere."""

    @property
    def grad(self):
        return self.main_grad

    @grad.setter
    def grad(self, value):
        self.main_grad = value


class TestSubclasses:
    @pytest.mark.parametrize("mixed", [False, True], ids=["alone", "beside a plain one"])
    def test_wrapper_subclass(self, mixed):
        wrapped = Wrapper(torch.tensor([3.0, 4.0]))
        assert not _C.is_native(wrapped)
        gradients = [ref.Holder(wrapped)]
        expected = 5.0
        if mixed:
            gradients += ref.parameters([torch.tensor([12.0])])
            expected = 13.0
        norm = gradclip_ext.clip_grad_norm_(gradients, 1.0)
        assert norm.item() == pytest.approx(expected)
        assert wrapped.inner.tolist() == pytest.approx([3 / expected, 4 / expected], rel=1e-5)
        if mixed:
            assert gradients[1].grad.item() == pytest.approx(12 / 13, rel=1e-6)

    def test_plain_subclass_of_tensor(self):
        gradient = torch.tensor([3.0, 4.0]).as_subclass(LoggingSubclass)
        norm = gradclip_ext.get_total_norm([gradient])
        assert norm.item() == 5.0

    def test_parameter_with_its_own_grad_property(self):
        parameter = OwnGradient(torch.zeros(2))
        parameter.main_grad = torch.tensor([3.0, 4.0])
        assert gradclip_ext.clip_grad_norm_([parameter], 1.0).item() == 5.0
        assert parameter.main_grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)
        parameter.main_grad = None
        assert gradclip_ext.clip_grad_norm_([parameter], 1.0).item() == 0.0

    def test_an_error_in_a_grad_property_reaches_the_caller(self):
        class Broken(torch.nn.Parameter):
            @property
            def grad(self):
                raise LookupError("no gradient today")

        with pytest.raises(LookupError, match="no gradient today"):
            gradclip_ext.clip_grad_norm_([Broken(torch.zeros(2))], 1.0)

    def test_a_grad_property_that_empties_the_list(self):
        class Emptying(torch.nn.Parameter):
            @property
            def grad(self):
                del parameters[1:]
                return torch.tensor([3.0, 4.0])

        parameters = [Emptying(torch.zeros(2)), *ref.parameters([torch.ones(2)] * 50)]
        assert gradclip_ext.clip_grad_norm_(parameters, 10.0).item() == 5.0

    def test_a_grad_property_that_drops_the_gradients_before_it(self):
        class Dropping(torch.nn.Parameter):
            @property
            def grad(self):
                for parameter in before:
                    parameter.grad = None
                # Would lie where a gradient that nobody holds was.
                self.others = [torch.full((1000,), 7.0) for _ in before]
                return torch.tensor([3.0, 4.0])

        before = ref.parameters([torch.ones(1000) for _ in range(50)])
        norm = gradclip_ext.clip_grad_norm_([*before, Dropping(torch.zeros(2))], 1e6)
        assert norm.item() == pytest.approx((50_000 + 25) ** 0.5)


@pytest.mark.filterwarnings("ignore:.*(deprecated|prototype|experimental).*")
class TestOtherLayouts:
    def test_mkldnn(self):
        gradient = torch.tensor([[3.0, 4.0]]).to_mkldnn()
        assert not _C.is_native(gradient)
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.nn.utils.get_total_norm([gradient])
        with pytest.raises((RuntimeError, NotImplementedError)):
            gradclip_ext.get_total_norm([gradient])

    def test_quantized(self):
        gradient = torch.quantize_per_tensor(torch.tensor([3.0, 4.0]), 1.0, 0, torch.qint8)
        assert not _C.is_native(gradient)
        with pytest.raises((TypeError, RuntimeError)):
            gradclip_ext.get_total_norm([gradient])

    def test_nested(self):
        gradient = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        assert not _C.is_native(gradient)
        with pytest.raises((RuntimeError, NotImplementedError)):
            gradclip_ext.get_total_norm([gradient])

    def test_efficient_zero_tensor(self):
        zero = torch._efficientzerotensor((3,))
        assert not _C.is_native(zero)
        assert gradclip_ext.get_total_norm([zero, torch.tensor([2.0])]).item() == 2.0

    def test_complex_half_behaves_as_in_torch(self):
        gradient = torch.tensor([3 + 4j], dtype=torch.complex32)
        assert not _C.is_native(gradient)
        try:
            expected = torch.nn.utils.get_total_norm([gradient])
        except (RuntimeError, NotImplementedError):
            with pytest.raises((RuntimeError, NotImplementedError)):
                gradclip_ext.get_total_norm([gradient])
        else:
            assert gradclip_ext.get_total_norm([gradient]).item() == expected.item()


def test_foreach_true_where_there_is_no_foreach():
    holder = torch.nn.Parameter(torch.zeros(2, device="meta"))
    holder.grad = torch.ones(2, device="meta")
    plain = torch.tensor([5.0])
    calls = (
        lambda f: f.clip_grad_norm_([ref.parameter(plain), holder], 1.0, foreach=True),
        lambda f: f.clip_grad_value_([holder], 1.0, foreach=True),
        lambda f: f.clip_grads_with_norm_([holder], 1.0, torch.tensor(5.0), foreach=True),
    )
    for call in calls:
        with pytest.raises(RuntimeError) as torchs:
            call(torch.nn.utils)
        with pytest.raises(RuntimeError) as ours:
            call(gradclip_ext)
        assert str(ours.value) == str(torchs.value)
    assert plain.item() == 5.0


class TestDistributedTensors:
    @pytest.fixture
    def mesh(self):
        distributed = pytest.importorskip("torch.distributed")
        if not distributed.is_available():
            pytest.skip("this torch has no torch.distributed")
        from torch.distributed.device_mesh import init_device_mesh

        store = distributed.HashStore()
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        distributed.destroy_process_group()

    @pytest.mark.filterwarnings("ignore")
    def test_dtensors_behave_as_in_torch(self, mesh):
        from torch.distributed.tensor import DTensor, Shard, distribute_tensor

        def make():
            parameters = []
            for values in (torch.tensor([3.0, 4.0]), torch.full((2, 2), 6.0)):
                parameter = torch.nn.Parameter(
                    distribute_tensor(torch.zeros_like(values), mesh, [Shard(0)])
                )
                parameter.grad = distribute_tensor(values, mesh, [Shard(0)])
                parameters.append(parameter)
            return parameters

        ours, theirs = make(), make()
        norm = gradclip_ext.clip_grad_norm_(ours, 1.0)
        torch_norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        assert type(norm) is type(torch_norm) is DTensor
        assert norm.full_tensor().item() == torch_norm.full_tensor().item() == 13.0
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.grad.to_local(), other.grad.to_local())

    @pytest.mark.filterwarnings("ignore")
    def test_a_dtensor_beside_a_plain_gradient(self, mesh):
        # torch raises, because it cannot mix the two.
        from torch.distributed.tensor import Shard, distribute_tensor

        weight = torch.nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Shard(0)]))
        weight.grad = distribute_tensor(torch.tensor([3.0, 4.0]), mesh, [Shard(0)])
        plain = torch.tensor([12.0])
        norm = gradclip_ext.clip_grad_norm_([ref.parameter(plain), weight], 1.3)
        assert norm.item() == 13.0
        assert plain.item() == pytest.approx(1.2, rel=1e-6)
        assert weight.grad.to_local().tolist() == pytest.approx([0.3, 0.4], rel=1e-6)
