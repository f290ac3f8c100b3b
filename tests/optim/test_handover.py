"""Which optimizers and gradients take the coefficient into the step, and what happens to others."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from scaling import (
    Calls,
    copies,
    gradients,
    make_parameters,
    make_scaler,
    one_rank,
    same,
    scale_gradients,
    stage,
    ulps,
    values,
)
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gradclip_ext import _handover, _owners, clip_and_step, clip_grad_norm_

# Counts passes that are made where the host knows the coefficient.
pytestmark = pytest.mark.cpu_only

MAX_NORM = 0.5


def obstacle(optimizer, scaler=None):
    """Why the step of an optimizer cannot clip; None if it can."""
    return _handover.obstacles(_owners.read_owners([optimizer], "test"), scaler)[0]


def adamw(parameters, **settings):
    return AdamW(parameters, lr=0.1, **{"fused": True, **settings})


def assert_equal_to_clip_then_step(make, mine, monkeypatch, handed, max_norm=MAX_NORM):
    """Clips and steps twice the same, once by the two calls, and counts the passes of the other."""
    theirs = copies(mine)
    optimizer, other = make(mine), make(theirs)
    calls = Calls(monkeypatch)
    norm = clip_and_step(optimizer, max_norm)
    assert (calls.counts["scale_"] == 0) == handed
    assert norm.item() == clip_grad_norm_(theirs, max_norm).item()
    other.step()
    for one, another in zip(gradients(mine), gradients(theirs), strict=True):
        assert ulps(one, another) <= 1
    for one, another in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, another, rtol=0, atol=1e-5 * 0.1)
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


class TestGradients:
    """torch's kernels ignore strides: they would step wrongly, or write behind a gradient."""

    @pytest.fixture
    def parameters(self):
        return make_parameters(shapes=((6, 4), (8,)))

    def test_ordinary_ones_are_handed_over(self, parameters, monkeypatch):
        assert obstacle(adamw(parameters)) is None
        assert_equal_to_clip_then_step(adamw, parameters, monkeypatch, handed=True)

    def test_transposed(self, parameters):
        # torch's own step takes it for contiguous, so there is nothing to compare with.
        parameters[0].grad = parameters[0].grad.t().contiguous().t()
        assert obstacle(adamw(parameters)) == (
            "the gradient of parameters[0] has shape (6, 4) and strides (1, 6), its parameter "
            "(6, 4) and (4, 1)"
        )
        expected = parameters[0].grad.clone()
        norm = clip_and_step(adamw(parameters), MAX_NORM)
        torch.testing.assert_close(parameters[0].grad, expected * (MAX_NORM / norm.item()))

    def test_with_gaps(self, parameters):
        memory = torch.full((16,), 7.0)
        memory[::2] = parameters[1].grad
        parameters[1].grad = memory[::2]
        assert "strides (2,), its parameter (8,) and (1,)" in obstacle(adamw(parameters))
        clip_and_step(adamw(parameters), MAX_NORM)
        assert memory[1::2].tolist() == [7.0] * 8

    def test_channels_last_like_its_parameter(self, monkeypatch):
        parameters = make_parameters(shapes=((2, 3, 4, 5), (2, 1, 1, 1)))
        for parameter in parameters:
            gradient = parameter.grad.to(memory_format=torch.channels_last)
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
            parameter.grad = gradient
        # Strides of dimensions of size 1 do not say where anything lies.
        parameters[1].grad = parameters[1].grad.contiguous(memory_format=torch.contiguous_format)
        assert obstacle(adamw(parameters)) is None
        assert_equal_to_clip_then_step(adamw, parameters, monkeypatch, handed=True)

    def test_a_view_into_a_bucket(self, parameters, monkeypatch):
        # As of DistributedDataParallel with gradient_as_bucket_view.
        bucket = torch.cat([parameter.grad.flatten() for parameter in parameters])
        parameters[0].grad = bucket[:24].view(6, 4)
        parameters[1].grad = bucket[24:]
        assert obstacle(adamw(parameters)) is None
        assert_equal_to_clip_then_step(adamw, parameters, monkeypatch, handed=True)

    def test_two_that_share_memory(self, parameters):
        memory = torch.randn(30)
        parameters[0].grad, parameters[1].grad = memory[:24].view(6, 4), memory[20:28]
        assert obstacle(adamw(parameters)) == (
            "the gradient of parameters[1] shares memory with the gradient of parameters[0]"
        )

    def test_of_the_parameters_own_memory(self, parameters):
        parameters[1].grad = parameters[1].data
        assert "shares memory" in obstacle(adamw(parameters))

    def test_one_gradient_of_two_parameters(self, monkeypatch):
        parameters = make_parameters(shapes=((8,), (8,)))
        parameters[0].grad = parameters[1].grad
        assert "shares memory" in obstacle(adamw(parameters))
        theirs = copies(parameters)
        theirs[0].grad = theirs[1].grad
        norm = clip_and_step(adamw(parameters), MAX_NORM)
        assert norm.item() == clip_grad_norm_(theirs, MAX_NORM).item()
        adamw(theirs).step()
        assert same(values(parameters), values(theirs))

    @pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
    def test_a_parameter_listed_twice(self, monkeypatch):
        parameters = make_parameters(shapes=((8,),))
        theirs = copies(parameters)
        twice, other = adamw([parameters[0]] * 2), adamw([theirs[0]] * 2)
        assert "shares memory" in obstacle(twice)
        norm = clip_and_step(twice, MAX_NORM)
        # As from model.parameters(), which gives each once.
        assert norm.item() == clip_grad_norm_(theirs, MAX_NORM).item()
        other.step()
        assert same(values(parameters), values(theirs))

    def test_float64(self, monkeypatch):
        parameters = make_parameters(torch.float64)
        assert "is torch.float64, which a float32" in obstacle(adamw(parameters))
        assert_equal_to_clip_then_step(adamw, parameters, monkeypatch, handed=False)

    def test_float64_among_others(self, monkeypatch):
        parameters = make_parameters() + make_parameters(torch.float64)
        assert "parameters[4] is torch.float64" in obstacle(adamw(parameters))
        assert_equal_to_clip_then_step(adamw, parameters, monkeypatch, handed=False)

    def test_sparse(self):
        parameters = make_parameters(shapes=((6, 4),))
        parameters[0].grad = parameters[0].grad.to_sparse()
        optimizer = SGD(parameters, lr=0.1, fused=True)
        assert "of layout torch.sparse_coo" in obstacle(optimizer)

    def test_negated_view(self, parameters):
        parameters[1].grad = torch._neg_view(parameters[1].grad)
        assert "is not a plain, dense tensor" in obstacle(adamw(parameters))

    def test_a_subclass(self, parameters):
        class Own(torch.Tensor):
            pass

        # It may make something else of the step's operation.
        parameters[1].grad = parameters[1].grad.as_subclass(Own)
        assert "is not a plain, dense tensor like its parameter" in obstacle(adamw(parameters))

    def test_without_gradients_and_empty(self, monkeypatch):
        parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0)), *make_parameters()]
        parameters[1].grad = torch.ones(0)
        assert obstacle(adamw(parameters)) is None
        theirs = copies(parameters)
        clip_and_step(adamw(parameters), MAX_NORM)
        assert parameters[0].grad is None and parameters[0].tolist() == [1.0] * 3
        clip_grad_norm_(theirs, MAX_NORM)
        adamw(theirs).step()
        for one, other in zip(parameters, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)

    def test_the_ways_to_look_agree(self, monkeypatch):
        # Without the native function, which is asked first.
        from gradclip_ext import _C

        monkeypatch.setattr(_C, "fit_fused_step", lambda parameters: False)
        assert obstacle(adamw(make_parameters())) is None


class TestOptimizers:
    @pytest.fixture
    def parameters(self):
        return make_parameters()

    @pytest.mark.parametrize("cls", [RMSprop, NAdam])
    def test_those_that_cannot(self, parameters, cls, monkeypatch):
        make = functools.partial(cls, lr=0.1)
        assert obstacle(make(parameters)) == (
            f"{cls.__name__}.step is not that of torch's Adam, AdamW, SGD or Adagrad, and may "
            "ignore grad_scale"
        )
        assert_equal_to_clip_then_step(make, parameters, monkeypatch, handed=False)

    @pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
    def test_muon(self, monkeypatch):
        parameters = make_parameters(shapes=((6, 4), (3, 5)))
        make = functools.partial(torch.optim.Muon, lr=0.1)
        assert "Muon.step is not" in obstacle(make(parameters))
        assert_equal_to_clip_then_step(make, parameters, monkeypatch, handed=False)

    @pytest.mark.parametrize("cls", [AdamW, Adam, SGD, Adagrad])
    def test_that_are_not_fused(self, parameters, cls, monkeypatch):
        make = functools.partial(cls, lr=0.1)
        assert obstacle(make(parameters)) == "param_groups[0] is not fused"
        assert_equal_to_clip_then_step(make, parameters, monkeypatch, handed=False)

    def test_a_fused_group_and_a_plain_one(self, parameters, monkeypatch):
        # With grad_scale set, the plain group raises after the fused one has stepped.
        def make(parameters):
            plain = {"params": parameters[2:], "fused": False}
            return adamw([{"params": parameters[:2]}, plain])

        assert obstacle(make(parameters)) == "param_groups[1] is not fused"
        assert_equal_to_clip_then_step(make, parameters, monkeypatch, handed=False)

    def test_a_subclass_without_a_step_of_its_own(self, parameters, monkeypatch):
        class Mine(AdamW):
            pass

        make = functools.partial(Mine, lr=0.1, fused=True)
        assert_equal_to_clip_then_step(make, parameters, monkeypatch, handed=True)

    def test_a_subclass_with_a_step_of_its_own(self, parameters, monkeypatch):
        seen = []

        class Mine(AdamW):
            def step(self, closure=None):
                seen.append(gradients(parameters))
                return super().step(closure)

        make = functools.partial(Mine, lr=0.1, fused=True)
        assert "Mine.step is not that of torch's" in obstacle(make(parameters))
        assert_equal_to_clip_then_step(make, parameters, monkeypatch, handed=False)
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in seen[0]))
        assert norm == pytest.approx(MAX_NORM, rel=1e-5)

    def test_a_wrapped_step_that_looks_like_torchs(self, parameters, monkeypatch):
        # functools.wraps leads inspect.unwrap to torch's function all the same.
        class Mine(AdamW):
            @functools.wraps(AdamW.step)
            def step(self, closure=None):
                with torch.no_grad():
                    for parameter in parameters:
                        parameter.grad.clamp_(-0.01, 0.01)
                return AdamW.step(self, closure)

        assert "Mine.step is not" in obstacle(Mine(parameters, fused=True))

    def test_a_step_replaced_on_the_object(self, parameters):
        optimizer = adamw(parameters)
        original = optimizer.step

        @functools.wraps(original)
        def step(*arguments):
            return original(*arguments)

        optimizer.step = step
        assert "AdamW.step is not" in obstacle(optimizer)

    def test_a_learning_rate_scheduler_may_count_the_steps(self, parameters, monkeypatch):
        optimizer = adamw(parameters)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        assert obstacle(optimizer) is None
        calls = Calls(monkeypatch)
        clip_and_step(optimizer, MAX_NORM)
        scheduler.step()  # warns if no step was counted
        assert calls.counts["scale_"] == 0
        assert optimizer.param_groups[0]["lr"] == 0.05

    def test_a_step_pre_hook_sees_clipped_gradients(self, parameters, monkeypatch):
        def make(parameters):
            optimizer = adamw(parameters)
            optimizer.register_step_pre_hook(lambda *_: seen.append(gradients(parameters)))
            return optimizer

        seen = []
        assert obstacle(make(parameters)) == (
            "a step pre-hook would see gradients that are not clipped yet"
        )
        assert_equal_to_clip_then_step(make, parameters, monkeypatch, handed=False)
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in seen[0]))
        assert norm == pytest.approx(MAX_NORM, rel=1e-5)

    def test_a_step_pre_hook_of_all_optimizers(self, parameters):
        handle = register_optimizer_step_pre_hook(lambda *_: None)
        try:
            assert obstacle(adamw(parameters)) is not None
        finally:
            handle.remove()
        assert obstacle(adamw(parameters)) is None

    def test_step_post_hooks_are_called(self, parameters, monkeypatch):
        called = []

        def make(parameters):
            optimizer = adamw(parameters)
            optimizer.register_step_post_hook(lambda *_: called.append(gradients(parameters)))
            return optimizer

        assert_equal_to_clip_then_step(make, parameters, monkeypatch, handed=True)
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in called[0]))
        assert norm == pytest.approx(MAX_NORM, rel=1e-5)

    def test_a_grad_scale_that_is_no_tensor(self, parameters):
        optimizer = adamw(parameters)
        optimizer.grad_scale = 2.0
        assert obstacle(optimizer) == "its own grad_scale is not a tensor of one element"

    def test_a_scaler_with_a_step_of_its_own(self, parameters):
        class Mine(torch.amp.GradScaler):
            def step(self, optimizer, *arguments):
                optimizer.grad_scale = None
                return optimizer.step(*arguments)

        scaler = make_scaler(cls=Mine)
        assert obstacle(adamw(parameters), scaler) == "Mine.step may replace grad_scale"
        assert obstacle(adamw(parameters), make_scaler()) is None


class LikeAccelerate(torch.optim.Optimizer):
    """Holds an optimizer, and passes on what it is asked, as AcceleratedOptimizer does."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure=None):
        self.optimizer.step(closure)


class LikeFabric:
    """Takes over all attributes of an optimizer, and its class as a base, as Fabric's does."""

    def __init__(self, optimizer):
        self.__dict__ = {k: v for k, v in vars(optimizer).items() if k != "step"}
        self.__class__ = type("FabricAdamW", (type(self), type(optimizer)), {})
        self.wrapped = optimizer

    def step(self, closure=None):
        return self.wrapped.step(closure)


class LikeLightning:
    """Its class is also that of the optimizer, as LightningOptimizer's."""

    def __init__(self, optimizer):
        self.wrapped = optimizer
        self.__class__ = type("LightningAdamW", (type(self), type(optimizer)), {})

    def step(self, closure=None, **_):
        return self.wrapped.step(closure)

    def __getattr__(self, name):
        return getattr(self.wrapped, name)


@pytest.mark.parametrize("wrapper", [LikeAccelerate, LikeFabric, LikeLightning])
class TestWrappers:
    """grad_scale set on a wrapper never reaches the optimizer: gradients would stay unclipped."""

    def test_gradients_are_clipped_first(self, wrapper, monkeypatch):
        parameters = make_parameters()
        inner = adamw(parameters)
        assert isinstance(wrapper(inner), torch.optim.Optimizer)
        assert "step is not that of torch's" in obstacle(wrapper(inner))
        assert_equal_to_clip_then_step(
            lambda p: wrapper(adamw(p)), parameters, monkeypatch, handed=False
        )
        assert not {"grad_scale", "found_inf"} & set(vars(inner))

    @pytest.mark.parametrize("overflow", [False, True], ids=["finite", "overflow"])
    def test_with_a_scaler(self, wrapper, overflow):
        mine = make_parameters()
        scale_gradients(mine)
        if overflow:
            mine[1].grad[3] = math.inf
        theirs = copies(mine)
        optimizer, scaler = wrapper(adamw(mine)), make_scaler()
        clip_and_step(optimizer, MAX_NORM, scaler=scaler)
        other, other_scaler = adamw(theirs), make_scaler()
        other_scaler.unscale_(other)
        clip_grad_norm_(theirs, MAX_NORM)
        other_scaler.step(other)
        for one, another in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, another, rtol=0, atol=1e-6)
        assert stage(scaler, optimizer) == "STEPPED"
        for one in (scaler, other_scaler):
            one.update()
        assert scaler.state_dict() == other_scaler.state_dict()


@pytest.mark.cpu_only
class TestDTensors:
    @staticmethod
    def distributed(parameters, mesh):
        from torch.distributed.tensor import Shard, distribute_tensor

        result = []
        for parameter in parameters:
            whole = distribute_tensor(parameter.detach().clone(), mesh, [Shard(0)])
            result.append(nn.Parameter(whole))
            result[-1].grad = distribute_tensor(parameter.grad.clone(), mesh, [Shard(0)])
        return result

    @pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
    @pytest.mark.parametrize("cls", [Adam, AdamW])
    def test_adam_and_adamw(self, cls, scaled, monkeypatch):
        with one_rank() as mesh:
            theirs = make_parameters(shapes=((4, 3), (5,)))
            mine = self.distributed(theirs, mesh)
            make = functools.partial(cls, lr=0.1, fused=True)
            optimizer, other = make(mine), make(theirs)
            assert obstacle(optimizer) is None
            scaler = make_scaler() if scaled else None
            if scaled:
                scale_gradients(mine)
            before = mine[0].grad._version
            norm = clip_and_step(optimizer, MAX_NORM, scaler=scaler)
            # Nothing but the step wrote.
            assert mine[0].grad._version == before
            torch.testing.assert_close(norm, clip_grad_norm_(theirs, MAX_NORM))
            other.step()
            for one, another in zip(mine, theirs, strict=True):
                torch.testing.assert_close(one.full_tensor(), another, rtol=0, atol=1e-6)
                torch.testing.assert_close(one.grad.full_tensor(), another.grad)

    def test_others_and_partial_ones(self):
        from torch.distributed.tensor import DTensor, Partial

        with one_rank() as mesh:
            mine = self.distributed(make_parameters(shapes=((4, 3), (5,))), mesh)
            assert "but a DTensor" in obstacle(SGD(mine, fused=True))
            assert "but a DTensor" in obstacle(Adagrad(mine, fused=True))
            assert obstacle(adamw(mine)) is None
            mine[0].grad = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])
            assert "but a DTensor" in obstacle(adamw(mine))
