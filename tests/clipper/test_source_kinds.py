"""Kinds of sources: wrapped optimizers, modules of every sort, gradients that are computed."""

from __future__ import annotations

import copy
import math

import pytest
import reference as ref
import torch
from models import gradients_of, set_gradients
from torch import nn

from gradclip_ext import GradClipper, adaptive_clip_grad_, grad_norms


def parameter(*numbers):
    result = nn.Parameter(torch.zeros(len(numbers)))
    result.grad = torch.tensor(numbers)
    return result


def sgd(*groups):
    return torch.optim.SGD([{"params": list(group)} for group in groups], lr=0.1)


class Delegating:
    """As Lightning's optimizers: everything that it lacks is that of the wrapped one."""

    def __init__(self, optimizer):
        self._optimizer = optimizer

    def __getattr__(self, name):
        if name == "_optimizer":
            raise AttributeError(name)
        return getattr(self._optimizer, name)


class WithProperty:
    """As DeepSpeed's; the list may be a new one each time, as in Megatron's chain of optimizers."""

    def __init__(self, optimizer):
        self.inner = optimizer

    @property
    def param_groups(self):
        return list(self.inner.param_groups)


class WithOptimizer:
    def __init__(self, optimizer):
        self.optimizer = optimizer


class Subclass(torch.optim.Optimizer):
    """As Accelerate's, which never runs the constructor of its base."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups


class TestWrappedOptimizers:
    @pytest.mark.parametrize(
        "wrap",
        [
            Delegating,
            WithProperty,
            WithOptimizer,
            Subclass,
            lambda optimizer: WithOptimizer(Delegating(WithOptimizer(optimizer))),
            lambda optimizer: [Delegating(optimizer)],
        ],
    )
    def test_is_clipped_and_watched(self, wrap):
        optimizer = sgd([parameter(3.0)])
        clipper = GradClipper(wrap(optimizer), math.inf)
        assert clipper.clip_().item() == 3.0
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.add_param_group({"params": [parameter(4.0)]})
        assert clipper.clip_().item() == 5.0
        assert grad_norms(wrap(optimizer)).total.item() == 5.0

    def test_another_one_wrapped(self):
        wrapper = WithOptimizer(sgd([parameter(3.0)]))
        clipper = GradClipper(wrapper, math.inf)
        wrapper.optimizer = sgd([parameter(4.0)])
        assert clipper.clip_().item() == 4.0

    def test_nothing_that_has_groups(self):
        in_itself, number = WithOptimizer(None), WithOptimizer(None)
        in_itself.optimizer = in_itself
        number.param_groups = 5
        for wrapper in (in_itself, number, WithOptimizer("adam"), torch.optim.SGD):
            with pytest.raises(TypeError, match="expected a module, named or plain parameters"):
                GradClipper(wrapper, 1.0)


class TestModules:
    def test_scripted(self):
        torch.manual_seed(0)
        scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
        for source in (scripted, nn.ModuleDict({"inner": scripted})):
            set_gradients(source, 3)
            before = copy.deepcopy(gradients_of(source))
            clipper = GradClipper(source, 0.5)
            norm = clipper.clip_()
            assert norm.item() == pytest.approx(ref.reference_norm(before, 2.0), rel=1e-6)
            after = ref.reference_norm(gradients_of(source), 2.0)
            assert after == pytest.approx(0.5, rel=1e-5)
            assert [name.removeprefix("inner.") for name in clipper.report().names] == [
                "0.weight",
                "0.bias",
                "1.weight",
                "1.bias",
            ]
            assert grad_norms(source).total.item() == pytest.approx(after, rel=1e-6)

    def test_scripted_module_that_gets_other_parameters(self):
        outer = nn.ModuleDict({"inner": torch.jit.script(nn.Linear(1, 1, bias=False))})
        clipper = GradClipper(outer, math.inf)
        outer["inner"].weight.grad = torch.tensor([[3.0]])
        outer["head"] = nn.Linear(1, 1, bias=False)
        outer["head"].weight.grad = torch.tensor([[4.0]])
        assert clipper.clip_().item() == 5.0
        outer["inner"].weight = nn.Parameter(torch.ones(1, 1))
        assert clipper.clip_().item() == 4.0

    @pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
    def test_lazy(self):
        model = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.Linear(3, 2))
        clipper = GradClipper(model, 0.5)
        measured = GradClipper(torch.optim.SGD(model.parameters(), lr=0.1), math.inf)
        assert clipper.clip_().item() == 0.0
        assert grad_norms(model).norms.tolist() == [0.0] * 4
        model(torch.ones(1, 5)).sum().backward()
        expected = ref.reference_norm(gradients_of(model), 2.0)
        assert measured.clip_().item() == pytest.approx(expected, rel=1e-6)
        assert clipper.clip_().item() == pytest.approx(expected, rel=1e-6)
        assert ref.reference_norm(gradients_of(model), 2.0) == pytest.approx(0.5, rel=1e-5)

    @pytest.mark.parametrize(
        "collect", [nn.ParameterList, lambda p: nn.ParameterDict(dict(zip("ab", p, strict=True)))]
    )
    def test_containers_of_parameters(self, collect):
        container = collect([parameter(3.0), parameter(4.0)])
        clipper = GradClipper(container, math.inf)
        assert clipper.clip_().item() == grad_norms(container).total.item() == 5.0
        if isinstance(container, nn.ParameterList):
            container.append(parameter(12.0))
        else:
            container["c"] = parameter(12.0)
        assert clipper.clip_().item() == 13.0

    # Torch has dynamically quantised layers on the CPU only.
    @pytest.mark.cpu_only
    @pytest.mark.filterwarnings("ignore")
    def test_quantised(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        set_gradients(quantised)
        expected = ref.reference_norm(gradients_of(quantised), 2.0)
        clipper = GradClipper(quantised, math.inf)
        assert clipper.clip_().item() == pytest.approx(expected, rel=1e-6)
        assert clipper.report().names == ("1.weight", "1.bias")
        with pytest.raises(ValueError, match="there are no parameters in what was passed"):
            GradClipper(quantised[0], 1.0)

    def test_group_whose_parameters_are_none(self):
        for params in (5, "weight"):
            with pytest.raises(TypeError) as error:
                GradClipper([{"params": params}], 1.0)
            assert "groups[0]['params'] has to be parameters, found" in str(error.value)


class Computed(torch.Tensor):
    """A parameter whose gradient is computed, with side effects."""

    compute = None

    @property
    def grad(self):
        return type(self).compute()


def computed(function):
    kind = type("Computed", (Computed,), {"compute": staticmethod(function)})
    return torch.zeros(1).as_subclass(kind)


class TestComputedGradients:
    @pytest.mark.parametrize("value", [3, "gradient", [1.0]])
    def test_that_are_no_tensors(self, value):
        broken = computed(lambda: value)
        with pytest.raises(TypeError) as error:
            GradClipper([("a", parameter(1.0)), ("b", broken)], 1.0).clip_()
        message = "GradClipper: b.grad has to be a torch.Tensor or None, found"
        assert str(error.value).startswith(message)
        with pytest.raises(
            TypeError, match=r"parameters\[0\].grad has to be a torch.Tensor or None"
        ):
            adaptive_clip_grad_([broken])
        with pytest.raises(TypeError) as error:
            grad_norms([("a", parameter(1.0)), ("b", broken)])
        assert "grad_norms: b.grad has to be a torch.Tensor or None" in str(error.value)
        with pytest.raises(TypeError) as error:
            grad_norms([parameter(1.0), broken])
        assert "grad_norms: parameters[1].grad has to be a torch.Tensor or None" in str(error.value)

    def test_that_change_the_optimizer(self):
        plain = parameter(3.0)
        added = parameter(4.0)
        optimizer = sgd([plain])

        def grow():
            if len(optimizer.param_groups) == 1:
                optimizer.add_param_group({"params": [added]})

        optimizer.param_groups[0]["params"].append(computed(grow))
        clipper = GradClipper(optimizer, math.inf)
        assert clipper.clip_().item() == 3.0
        assert clipper.clip_().item() == 5.0
