"""The error for each wrong argument, word for word; and that nothing is changed then."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import reference as ref
import torch

import gradclip_ext

linear = torch.nn.Linear(2, 2)
CALLS = {
    "clip_grad_norm_": lambda given: gradclip_ext.clip_grad_norm_(given, 1.0),
    "clip_grads_with_norm_": lambda given: gradclip_ext.clip_grads_with_norm_(given, 1.0, 2.0),
    "clip_grad_value_": lambda given: gradclip_ext.clip_grad_value_(given, 1.0),
}
by_function = pytest.mark.parametrize("function", CALLS)

CONTAINERS = {
    "module": (linear, "found a Linear; pass module.parameters()"),
    "dict": (
        dict(linear.named_parameters()),
        "found a dict; iterating over it gives its keys, pass its .values()",
    ),
    "optimizer": (
        torch.optim.SGD(linear.parameters(), lr=1.0),
        "found a SGD; pass [p for group in optimizer.param_groups for p in group['params']] or "
        "model.parameters()",
    ),
    "string": ("weight", "found 'weight' (str); pass model.parameters()"),
    "number": (3, "found 3 (int); pass model.parameters()"),
    "None": (None, "found None; pass model.parameters()"),
}


@by_function
@pytest.mark.parametrize("kind", CONTAINERS)
def test_wrong_container(kind, function):
    given, text = CONTAINERS[kind]
    with pytest.raises(TypeError) as caught:
        CALLS[function](given)
    assert str(caught.value) == (
        f"{function}: parameters has to be an iterable of tensors or a single tensor, {text}"
    )


ITEMS = {
    "named_parameters": (
        lambda: linear.named_parameters(),
        "parameters[0] has to be a torch.Tensor, found a tuple; "
        "pass model.parameters() instead of model.named_parameters()",
    ),
    "parameter groups": (
        lambda: torch.optim.SGD(linear.parameters(), lr=1.0).param_groups,
        "parameters[0] has to be a torch.Tensor, found a dict; pass the parameters of the groups, "
        "[p for group in optimizer.param_groups for p in group['params']]",
    ),
    "modules": (
        lambda: linear.modules(),
        "parameters[0] has to be a torch.Tensor, found a Linear; pass module.parameters()",
    ),
    "keys": (
        lambda: list(linear.state_dict()),
        "parameters[0] has to be a torch.Tensor, found 'weight' (str); iterating over a dict or "
        "ParameterDict gives its keys, pass its .values()",
    ),
    "None": (
        lambda: [linear.weight, None],
        "parameters[1] has to be a torch.Tensor, found None",
    ),
    "number": (
        lambda: (linear.weight, linear.bias, 2.5),
        "parameters[2] has to be a torch.Tensor, found 2.5 (float)",
    ),
}


@by_function
@pytest.mark.parametrize("kind", ITEMS)
def test_wrong_item(kind, function):
    make, text = ITEMS[kind]
    with pytest.raises(TypeError) as caught:
        CALLS[function](make())
    assert str(caught.value) == f"{function}: {text}"


def test_get_total_norm_names_its_own_argument():
    with pytest.raises(TypeError) as caught:
        gradclip_ext.get_total_norm([torch.ones(2), None])
    assert str(caught.value) == "get_total_norm: tensors[1] has to be a torch.Tensor, found None"


@pytest.mark.parametrize("value", [-1.0, -1e-30, math.nan, -math.inf], ids=str)
def test_max_norm_negative_or_nan(value):
    gradient = torch.tensor([3.0, 4.0])
    text = f"max_norm has to be a number that is not negative, found {value}"
    with pytest.raises(ValueError) as caught:
        gradclip_ext.clip_grad_norm_(ref.parameter(gradient), value)
    assert str(caught.value) == f"clip_grad_norm_: {text}"
    with pytest.raises(ValueError) as caught:
        gradclip_ext.clip_grads_with_norm_(ref.parameter(gradient), value, 5.0)
    assert str(caught.value) == f"clip_grads_with_norm_: {text}"
    with pytest.raises(ValueError) as caught:
        gradclip_ext.clip_grad_value_(ref.parameter(gradient), value)
    assert str(caught.value) == f"clip_grad_value_: {text.replace('max_norm', 'clip_value')}"
    assert gradient.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda p: gradclip_ext.clip_grad_norm_(p, "one"),
            "clip_grad_norm_: max_norm has to be a number, found 'one' (str)",
        ),
        (
            lambda p: gradclip_ext.clip_grad_norm_(p, None),
            "clip_grad_norm_: max_norm has to be a number, found None",
        ),
        (
            lambda p: gradclip_ext.clip_grad_norm_(p, 10**400),
            f"clip_grad_norm_: max_norm has to be a number, found {10**400} (int)",
        ),
        (
            lambda p: gradclip_ext.clip_grad_norm_(p, torch.tensor(1j)),
            "clip_grad_norm_: max_norm has to be real, found a tensor of dtype torch.complex64",
        ),
        (
            lambda p: gradclip_ext.clip_grad_norm_(p, 1.0, [2]),
            "clip_grad_norm_: norm_type has to be a number, found a list",
        ),
        (
            lambda p: gradclip_ext.get_total_norm(p, dtype=torch.bfloat16),
            "get_total_norm: dtype has to be None, torch.float32 or torch.float64, "
            "found torch.bfloat16",
        ),
        (
            lambda p: gradclip_ext.clip_grad_norm_(p, 1.0, dtype="float32"),
            "clip_grad_norm_: dtype has to be None, torch.float32 or torch.float64, "
            "found 'float32'",
        ),
        (
            lambda p: gradclip_ext.clip_grads_with_norm_(p, 1.0, "five"),
            "clip_grads_with_norm_: total_norm has to be a number, found 'five' (str)",
        ),
    ],
    ids=[
        "max_norm str",
        "max_norm None",
        "huge",
        "complex",
        "norm_type",
        "dtype",
        "dtype str",
        "total_norm",
    ],
)
def test_wrong_type(call, text):
    parameter = ref.parameter(torch.tensor([3.0, 4.0]))
    with pytest.raises(TypeError) as caught:
        call([parameter])
    assert str(caught.value) == text
    assert parameter.grad.tolist() == [3.0, 4.0]


def test_tensor_argument_of_several_elements():
    parameter = ref.parameter(torch.tensor([3.0, 4.0]))
    with pytest.raises(ValueError) as caught:
        gradclip_ext.clip_grad_norm_(parameter, torch.ones(2))
    assert str(caught.value) == (
        "clip_grad_norm_: max_norm has to be a number or a tensor of one element, "
        "found a tensor of shape (2,)"
    )
    with pytest.raises(ValueError) as caught:
        gradclip_ext.clip_grad_value_(parameter, torch.ones(2))
    assert str(caught.value) == (
        "clip_grad_value_: clip_value has to be a number or a tensor of one element, "
        "found a tensor of shape (2,)"
    )
    with pytest.raises(ValueError) as caught:
        gradclip_ext.clip_grads_with_norm_(parameter, 1.0, torch.ones(3, 1))
    assert str(caught.value) == (
        "clip_grads_with_norm_: total_norm has to be a number or a tensor of one element, "
        "found a tensor of shape (3, 1)"
    )


TORCHS_TEXT = (
    "The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it "
    "cannot be clipped. To disable this error and scale the gradients by the non-finite norm "
    "anyway, set `error_if_nonfinite=False`"
)


class TestErrorIfNonfinite:
    @pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf, 3.0], ids=lambda p: f"L{p:g}")
    @pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
    def test_text_begins_with_torchs_and_names_the_culprit(self, value, norm_type):
        def make():
            bad = torch.ones(5, 4)
            bad[2, 1] = value
            return [ref.parameter(None), *ref.parameters([torch.ones(3), bad, bad.t().clone()])]

        ours = make()
        with pytest.raises(RuntimeError) as caught:
            gradclip_ext.clip_grad_norm_(ours, 1.0, norm_type, error_if_nonfinite=True)
        with pytest.raises(RuntimeError) as torchs:
            torch.nn.utils.clip_grad_norm_(make(), 1.0, norm_type, error_if_nonfinite=True)
        assert str(torchs.value) == TORCHS_TEXT.format(norm_type=norm_type)
        assert str(caught.value) == (
            str(torchs.value) + ". The first of 2 non-finite gradients (out of 3) is that of "
            "parameters[2].grad of shape (5, 4)."
        )
        for mine, other in zip(ours, make(), strict=True):
            assert mine.grad is other.grad is None or torch.equal(
                mine.grad.nan_to_num(7.0), other.grad.nan_to_num(7.0)
            )

    def test_get_total_norm(self):
        with pytest.raises(RuntimeError) as caught:
            gradclip_ext.get_total_norm(
                [torch.ones(3), torch.tensor([[math.nan]])], error_if_nonfinite=True
            )
        assert str(caught.value) == TORCHS_TEXT.format(norm_type=2.0) + (
            ". The first of 1 non-finite gradients (out of 2) is that of tensors[1] of shape "
            "(1, 1)."
        )

    def test_finite_gradients_whose_norm_overflows(self):
        gradient = torch.full((3,), 1e200, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="All 1 gradients are finite, but their norm is not"):
            gradclip_ext.clip_grad_norm_(ref.parameter(gradient), 1.0, error_if_nonfinite=True)
        assert gradient[0].item() == 1e200

    def test_judged_before_rounding_to_the_result_dtype(self):
        gradient = torch.full((10_000,), 1000.0, dtype=torch.float16)
        norm = gradclip_ext.clip_grad_norm_(ref.parameter(gradient), 1.0, error_if_nonfinite=True)
        assert norm.item() == math.inf
        assert gradient[0].item() == pytest.approx(0.01, rel=2**-10)

    def test_finite_norm_raises_nothing(self):
        for gradients in ([torch.ones(4)], [torch.ones(4, 2)[:, :1]], []):
            gradclip_ext.clip_grad_norm_(ref.parameters(gradients), 1.0, error_if_nonfinite=True)

    def test_sparse_culprit(self):
        weight = torch.nn.Parameter(torch.zeros(4))
        weight.grad = torch.sparse_coo_tensor([[1]], [math.nan], (4,), check_invariants=True)
        with pytest.raises(RuntimeError, match=r"is that of parameters\[0\].grad of shape \(4,\)"):
            gradclip_ext.clip_grad_norm_([weight], 1.0, error_if_nonfinite=True)


class TestNothingIsWrittenBeforeAnError:
    @by_function
    def test_overlapping_memory(self, function):
        first = torch.full((3,), 5.0)
        stretched = torch.full((1,), 5.0).expand(4)
        with pytest.raises(RuntimeError) as caught:
            CALLS[function](ref.parameters([first, stretched]))
        assert str(caught.value) == (
            f"{function}: parameters[1].grad: unsupported operation: more than one element of the "
            "written-to tensor refers to a single memory location. Please clone() the tensor "
            "before performing the operation."
        )
        assert first.tolist() == [5.0] * 3
        assert stretched.tolist() == [5.0] * 4

    def test_overlapping_memory_can_be_measured(self):
        assert gradclip_ext.get_total_norm([torch.full((1,), 2.0).expand(4)]).item() == 4.0

    def test_integer_gradient(self):
        first = torch.full((3,), 5.0)
        holder = torch.zeros(2, dtype=torch.int64)
        holder.grad = torch.ones(2, dtype=torch.int64)
        for function in ("clip_grad_norm_", "clip_grads_with_norm_"):
            with pytest.raises(TypeError) as caught:
                CALLS[function]([ref.parameter(first), holder])
            assert str(caught.value) == (
                f"{function}: parameters[1].grad has to have a floating point or complex dtype, "
                "found torch.int64"
            )
        with pytest.raises(TypeError, match=r"get_total_norm: tensors\[0\] has to have a floating"):
            gradclip_ext.get_total_norm([holder])
        assert first.tolist() == [5.0] * 3

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("kind", ["csr", "mkldnn", "float8"])
    def test_layouts_and_dtypes_that_torch_cannot_write(self, kind):
        bad = {
            "csr": lambda: torch.eye(3).to_sparse_csr(),
            "mkldnn": lambda: torch.ones(3, device="cpu").to_mkldnn(),
            "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
        }[kind]()
        first = torch.full((3,), 5.0)
        with pytest.raises((RuntimeError, NotImplementedError)):
            gradclip_ext.clip_grad_value_([ref.parameter(first), ref.Holder(bad)], 0.5)
        if kind == "float8":
            with pytest.raises((RuntimeError, NotImplementedError)):
                gradclip_ext.clip_grads_with_norm_(
                    [ref.parameter(first), ref.Holder(bad)], 0.5, 5.0
                )
        assert first.tolist() == [5.0] * 3

    @pytest.mark.filterwarnings("ignore")
    def test_sparse_values_that_share_memory(self):
        first = torch.full((4,), 5.0)
        sparse = torch.sparse_coo_tensor(
            torch.tensor([[0, 2]]), torch.full((1, 3), 7.0).expand(2, 3), (5, 3), is_coalesced=True
        )
        with pytest.raises(RuntimeError, match=r"parameters\[1\].grad: unsupported operation"):
            gradclip_ext.clip_grad_norm_([ref.parameter(first), ref.Holder(sparse)], 1.0)
        assert first.tolist() == [5.0] * 4

    @by_function
    def test_freed_storage(self, function):
        first = torch.full((3,), 5.0)
        freed = torch.ones(6)
        freed.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError) as caught:
            CALLS[function](ref.parameters([first]) + [ref.Holder(freed)])
        assert str(caught.value) == (
            f"{function}: parameters[1].grad of shape (6,) has no memory: its storage was resized "
            "to 0 bytes"
        )
        assert first.tolist() == [5.0] * 3


class TestWarnings:
    def test_exhausted_generator_warns_with_torchs_text_at_the_callers_line(self):
        with pytest.warns(UserWarning) as ours:
            norm = gradclip_ext.clip_grad_norm_((p for p in []), 1.0)
        assert norm.item() == 0.0
        text = "`parameters` is an empty generator, no gradient clipping will occur."
        assert [str(warning.message) for warning in ours] == [text]
        with warnings.catch_warnings(record=True) as torchs:
            warnings.simplefilter("always")
            torch.nn.utils.clip_grad_norm_((p for p in []), 1.0)
        # Torch 2.6 did not warn yet.
        assert {str(warning.message) for warning in torchs} <= {text}
        assert ours[0].filename == __file__

    def test_other_empty_iterables_do_not_warn(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradclip_ext.clip_grad_norm_([], 1.0)
            gradclip_ext.clip_grad_norm_(iter([]), 1.0)
            gradclip_ext.clip_grad_value_((p for p in []), 1.0)

    def test_non_leaf_parameter_warns_as_torch_does(self):
        leaf = torch.ones(3, requires_grad=True)
        with pytest.warns(UserWarning, match=re.escape("The .grad attribute of a Tensor that is")):
            norm = gradclip_ext.clip_grad_norm_([leaf * 2], 1.0)
        assert norm.item() == 0.0

    def test_an_error_while_iterating_is_not_hidden(self):
        def broken():
            yield linear.weight
            raise LookupError("from the generator")

        with pytest.raises(LookupError, match="from the generator"):
            gradclip_ext.clip_grad_norm_(broken(), 1.0)
