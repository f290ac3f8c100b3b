"""Clipping inside a graph of torch.compile: what eager calls do, natively and without graph breaks.

With the backend aot_eager, which runs the graph that Inductor would get; test_inductor.py has what
depends on Inductor.
"""

from __future__ import annotations

import math

import pytest
import reference as ref
import torch
from parametrize import by_native_dtype, by_norm_type
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import gradclip_ext

pytestmark = pytest.mark.filterwarnings("ignore")

SHAPES = [(4,), (3, 5), (), (0, 7), (100, 33)]
OPERATORS = {"total_norm", "finite_total_norm_", "scale_", "clamp_"}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def given(dtype=torch.float32, seed=0, shapes=SHAPES):
    return ref.parameters(
        [ref.random_gradient(shape, dtype, seed + i) for i, shape in enumerate(shapes)]
    )


class Graphs(CompileCounterWithBackend):
    """A backend that counts its graphs, and knows the operators of this package in the last one."""

    def __init__(self, backend="aot_eager"):
        super().__init__(backend)

    def compiled(self, function):
        return torch.compile(function, backend=self, fullgraph=True)

    def operators(self):
        names = [
            str(node.target).split(".")
            for node in self.graphs[-1].graph.nodes
            if node.op == "call_function"
        ]
        return [parts[1] for parts in names if parts[0] == "gradclip_ext"]


def check_clipped(parameters, before, norm, norm_type=2.0, max_norm=1.0):
    ref.assert_norm(norm, before, norm_type)
    coefficient = ref.reference_coefficient(max_norm, ref.reference_norm(before, norm_type))
    for parameter, gradient in zip(parameters, before, strict=True):
        ref.assert_scaled(parameter.grad, gradient, coefficient)


class Net:
    """A network of the book, which holds its parameters in a list."""

    def __init__(self, params):
        self.params = params


CALLS = {
    "clip": lambda ps, x: gradclip_ext.clip_grad_norm_(ps, x),
    "finite": lambda ps, x: gradclip_ext.clip_grad_norm_(ps, x, error_if_nonfinite=True),
    "L1, float64": lambda ps, x: gradclip_ext.clip_grad_norm_(ps, x, 1.0, dtype=torch.float64),
    "largest, float32": lambda ps, x: gradclip_ext.clip_grad_norm_(
        ps, x, "inf", dtype=torch.float32
    ),
    "max_norm in a tensor": lambda ps, x: gradclip_ext.clip_grad_norm_(ps, torch.tensor(0.75)),
    "measured only": lambda ps, x: gradclip_ext.clip_grad_norm_(ps, math.inf),
    "get_total_norm": lambda ps, x: gradclip_ext.get_total_norm([p.grad for p in ps]),
    "clip_grads_with_norm_": lambda ps, x: gradclip_ext.clip_grads_with_norm_(ps, x, 7.0 + x),
    "norm in a tensor": lambda ps, x: gradclip_ext.clip_grads_with_norm_(
        ps, x, torch.tensor([7.0])
    ),
    "clip_grad_value_": lambda ps, x: gradclip_ext.clip_grad_value_(ps, x),
    "grad_clipping": lambda ps, x: gradclip_ext.grad_clipping(Net(ps), x),
    "one twice": lambda ps, x: gradclip_ext.clip_grad_norm_([ps[0], *ps], x),
}


class TestResults:
    @by_norm_type
    @by_native_dtype
    def test_norm_and_gradients(self, dtype, norm_type):
        parameters = given(dtype)
        before = [ref.widened(p.grad) for p in parameters]
        graphs = Graphs()
        norm = graphs.compiled(lambda ps: gradclip_ext.clip_grad_norm_(ps, 1.0, norm_type))(
            parameters
        )
        assert graphs.operators() == ["total_norm", "scale_"]
        assert norm.dtype == dtype and norm.device == parameters[0].grad.device
        check_clipped(parameters, before, norm, norm_type)

    @pytest.mark.cpu_only
    @pytest.mark.parametrize("name", CALLS)
    @by_native_dtype
    def test_the_bits_of_an_eager_call(self, dtype, name):
        eager, compiled = given(dtype), given(dtype)
        graphs = Graphs()
        expected = CALLS[name](eager, 0.8)
        found = graphs.compiled(CALLS[name])(compiled, 0.8)
        assert graphs.operators()
        assert (found is None) == (expected is None)
        if found is not None:
            assert torch.equal(found, expected) and found.dtype == expected.dtype
        for one, other in zip(compiled, eager, strict=True):
            assert torch.equal(one.grad, other.grad)

    def test_dtypes_mixed_and_parameters_without_a_gradient(self):
        gradients = [ref.random_gradient((30,), dtype, 3) for dtype in ref.NATIVE_DTYPES]
        parameters = ref.parameters(gradients)
        before = [ref.widened(gradient) for gradient in gradients]
        frozen = nn.Parameter(torch.zeros(3))
        norm = Graphs().compiled(lambda ps: gradclip_ext.clip_grad_norm_(ps, 1.0))(
            [frozen, *parameters]
        )
        assert norm.dtype == torch.float64
        check_clipped(parameters, before, norm)

    def test_parameters_from_a_generator(self):
        model = nn.Linear(4, 3)
        gradients = [ref.random_gradient(p.shape, seed=i) for i, p in enumerate(model.parameters())]
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        before = [ref.widened(gradient) for gradient in gradients]
        norm = Graphs().compiled(lambda m: gradclip_ext.clip_grad_norm_(m.parameters(), 1.0))(model)
        check_clipped(list(model.parameters()), before, norm)

    @pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
    def test_empty_gradients_alone(self, dtype, norm_type):
        parameters = ref.parameters([torch.zeros(0, dtype=dtype), torch.zeros(3, 0, dtype=dtype)])
        norm = Graphs().compiled(lambda ps: gradclip_ext.clip_grad_norm_(ps, 1.0, norm_type))(
            parameters
        )
        assert norm.item() == 0.0
        assert norm.dtype == (torch.float32 if dtype.is_complex else dtype)

    @pytest.mark.parametrize("parameters", [[], [nn.Parameter(torch.zeros(2))]], ids=["", "frozen"])
    @pytest.mark.parametrize("name", [name for name in CALLS if name != "one twice"])
    def test_no_gradient(self, name, parameters):
        if name == "get_total_norm":
            parameters = []
        expected = CALLS[name](parameters, 1.0)
        found = Graphs().compiled(CALLS[name])(parameters, 1.0)
        assert (found is None) == (expected is None)
        assert found is None or (found.item() == 0.0 and found.dtype == expected.dtype)

    @pytest.mark.parametrize("dtype", ref.COMPLEX_DTYPES, ids=ref.name_of)
    @by_norm_type
    def test_complex_gradients(self, dtype, norm_type):
        real = torch.float32 if dtype == torch.complex64 else torch.float64
        gradients = [ref.random_gradient((50,), dtype, 1), ref.random_gradient((9,), real, 2)]
        parameters = ref.parameters(gradients)
        before = [ref.widened(gradient) for gradient in gradients]
        graphs = Graphs()
        norm = graphs.compiled(lambda ps: gradclip_ext.clip_grad_norm_(ps, 1.0, norm_type))(
            parameters
        )
        assert graphs.operators() == ["total_norm", "scale_"]
        assert norm.dtype == real
        check_clipped(parameters, before, norm, norm_type)

    def test_a_norm_that_torch_gets_wrong(self):
        # A float32 sum of equal squares, which stops growing.
        parameters = ref.parameters([torch.full((1 << 24,), 0.1)])
        expected = 0.1 * 2**12
        norm = Graphs().compiled(lambda ps: gradclip_ext.clip_grad_norm_(ps, math.inf))(parameters)
        assert norm.item() == pytest.approx(expected, rel=2e-7)


class TestSchedules:
    @pytest.mark.parametrize(
        "name",
        ["clip", "L1, float64", "finite", "clip_grads_with_norm_", "clip_grad_value_"]
        + ["grad_clipping"],
    )
    def test_two_graphs_for_a_number_that_changes(self, name):
        if name == "clip_grad_value_" and torch.zeros(0).is_cuda:
            pytest.skip("torch's own operations clamp on a GPU")
        graphs = Graphs()
        compiled = graphs.compiled(CALLS[name])
        for step in range(12):
            one, other = given(seed=step), given(seed=step)
            compiled(one, 0.5 + 0.1 * step)
            CALLS[name](other, 0.5 + 0.1 * step)
            for parameter, expected in zip(one, other, strict=True):
                torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-6, atol=0.0)
        assert graphs.frame_count <= 2

    def test_one_graph_for_a_number_in_a_tensor(self):
        graphs = Graphs()
        compiled = graphs.compiled(gradclip_ext.clip_grad_norm_)
        for step in range(12):
            parameters = given(seed=step)
            before = [ref.widened(p.grad) for p in parameters]
            norm = compiled(parameters, torch.tensor(0.5 + step))
            check_clipped(parameters, before, norm, max_norm=0.5 + step)
        assert graphs.frame_count == 1


class TestNonfinite:
    def raised(self, call, parameters):
        before = [p.grad.clone() for p in parameters]
        with pytest.raises(RuntimeError) as error:
            call(parameters)
        for parameter, gradient in zip(parameters, before, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0, equal_nan=True)
        return str(error.value)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
    @by_norm_type
    def test_error_of_an_eager_call(self, norm_type, shape, value):
        parameters = [nn.Parameter(torch.zeros(2)), *given(), *given()]
        parameters += ref.parameters([torch.full(shape, value), torch.full((7,), value)])
        with_gradients = parameters[1:]

        def call(ps):
            return gradclip_ext.clip_grad_norm_(
                [parameters[0], *ps], 1.0, norm_type, error_if_nonfinite=True
            )

        expected = self.raised(call, with_gradients)
        assert f"The first of 2 non-finite gradients (out of {len(with_gradients)})" in expected
        graphs = Graphs()
        # Torch 2.6 adds which node of the graph it was.
        assert self.raised(graphs.compiled(call), with_gradients).startswith(expected)
        assert graphs.operators() == ["finite_total_norm_", "scale_"]

    def test_finite_gradients_whose_norm_is_not(self):
        parameters = ref.parameters([torch.full((2,), 1e200, dtype=torch.float64)])

        def call(ps):
            return gradclip_ext.get_total_norm([p.grad for p in ps], error_if_nonfinite=True)

        expected = self.raised(call, parameters)
        assert self.raised(Graphs().compiled(call), parameters).startswith(expected)

    def test_raised_where_nobody_uses_the_norm(self):
        def call(ps):
            gradclip_ext.get_total_norm([p.grad for p in ps], error_if_nonfinite=True)
            return 1

        with pytest.raises(RuntimeError, match="non-finite"):
            Graphs().compiled(call)(ref.parameters([torch.tensor([1.0, math.nan])]))

    def test_without_error(self):
        parameters = ref.parameters([torch.tensor([1.0, math.nan]), torch.ones(3)])
        norm = Graphs().compiled(lambda ps: gradclip_ext.clip_grad_norm_(ps, 1.0))(parameters)
        assert norm.isnan() and all(p.grad.isnan().all() for p in parameters)


def bucket_views(shapes):
    """Parameters whose gradients share a storage, as DDP lays them out, and what they hold."""
    sizes = [math.prod(shape) for shape in shapes]
    bucket = ref.random_gradient((sum(sizes),), torch.float32, 5)
    gradients = [part.view(shape) for part, shape in zip(bucket.split(sizes), shapes, strict=True)]
    return ref.parameters(gradients), [ref.widened(gradient) for gradient in gradients]


class TestSharedStorages:
    def test_views_of_a_bucket_are_written_one_by_one(self):
        parameters, before = bucket_views([(4,), (3, 5), (100, 33)])
        graphs = Graphs()
        norm = graphs.compiled(lambda ps: gradclip_ext.clip_grad_norm_(ps, 1.0))(parameters)
        check_clipped(parameters, before, norm)
        # Inductor of torch 2.6 would lose what is written.
        own = ["scale_"] * 3 if ref.WITHOUT_GRAPH_BREAKS else []
        assert graphs.operators() == ["total_norm", *own]

    def test_gradients_that_overlap(self):
        def clip(parameters):
            norm = gradclip_ext.get_total_norm([p.grad for p in parameters])
            gradclip_ext.clip_grads_with_norm_(parameters, 1.0, 4.0)
            return norm

        memory, other = torch.ones(30), torch.ones(30)
        expected = clip(ref.parameters([other[:20], other[10:]]))
        norm = Graphs().compiled(clip)(ref.parameters([memory[:20], memory[10:]]))
        assert norm.item() == expected.item()
        assert torch.equal(memory, other)
        assert memory[15].item() == pytest.approx(1 / 16, rel=1e-6)


class TestWhatIsLeftToTorch:
    def operators_of(self, call, *arguments):
        graphs = Graphs()
        graphs.compiled(call)(*arguments)
        return graphs.operators()

    @pytest.mark.skipif(not ref.WITHOUT_GRAPH_BREAKS, reason="torch's function breaks the graph")
    def test_other_orders(self):
        parameters = given(shapes=[(2,), (3,)])
        assert not self.operators_of(
            lambda ps: gradclip_ext.clip_grad_norm_(ps, 1.0, 3.0), parameters
        )

    def test_transforms(self):
        batch = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
        graphs = Graphs()
        norms = graphs.compiled(
            torch.func.vmap(lambda g: gradclip_ext.get_total_norm([g], dtype=torch.float64))
        )(batch)
        assert norms.tolist() == pytest.approx([5.0, 10.0])
        assert not graphs.operators()

    @pytest.mark.parametrize("strict", [False, True])
    def test_exported_programs_need_nothing_but_torch(self, strict):
        if strict and not ref.WITHOUT_GRAPH_BREAKS:
            pytest.skip("cannot tell export from compilation")

        class Norm(nn.Module):
            def forward(self, gradient):
                return gradclip_ext.get_total_norm([gradient])

        program = torch.export.export(Norm(), (torch.ones(2),), strict=strict)
        assert "gradclip_ext" not in str(program.graph)
        assert program.module()(torch.tensor([3.0, 4.0])).item() == 5.0


class TestGraphBreaks:
    def step_of(self, kind):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
        model(torch.randn(3, 4)).pow(2).sum().mul(9.0).backward()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clipper = gradclip_ext.GradClipper(model, gradclip_ext.AutoClip())
        scaler = torch.amp.GradScaler(model[0].weight.device.type, init_scale=8.0)
        scaler.scale(torch.ones(()))
        step = {
            "clip_": clipper.clip_,
            "step": lambda: clipper.step(optimizer),
            "report": lambda: (clipper.clip_(), clipper.report().total_norm)[0],
            "state_dict": lambda: (clipper.clip_(), clipper.state_dict())[0],
            "clip_and_step": lambda: gradclip_ext.clip_and_step(optimizer, 1.0),
            "unscale": lambda: gradclip_ext.unscale_and_clip_grad_norm_(scaler, optimizer, 1.0),
        }[kind]
        return model, step

    KINDS = ("clip_", "step", "report", "state_dict", "clip_and_step", "unscale")

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_decides_in_python_runs_outside_of_the_graphs(self, kind):
        eager, eager_step = self.step_of(kind)
        model, step = self.step_of(kind)
        graphs = CompileCounterWithBackend("eager")

        def compiled(x):
            doubled = x * 2
            norm = step()
            return doubled + norm

        found = torch.compile(compiled, backend=graphs)(torch.ones(()))
        assert torch.equal(found, 2 + eager_step())
        for one, other in zip(model.parameters(), eager.parameters(), strict=True):
            assert torch.equal(one, other) and torch.equal(one.grad, other.grad)
        # What is before and what is after.
        assert graphs.frame_count == 2

    @pytest.mark.parametrize("kind", KINDS)
    def test_without_graph_breaks_torch_names_the_function(self, kind):
        _, step = self.step_of(kind)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=kind) as error:
            torch.compile(lambda x: x * step(), backend="eager", fullgraph=True)(torch.ones(()))
        if ref.WITHOUT_GRAPH_BREAKS:
            assert "decides in Python what to do" in str(error.value)

    def test_a_clipper_compiles_nothing(self):
        _, step = self.step_of("clip_")
        graphs = CompileCounterWithBackend("eager")
        compiled = torch.compile(lambda: step(), backend=graphs)
        for _ in range(12):
            compiled()
        assert graphs.frame_count == 0
