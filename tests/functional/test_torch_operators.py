"""The operators that a graph of torch.compile holds, called without a compiler.

A graph may be run with other tensors than it was traced with: other layouts, alignments, storages.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import reference as ref
import torch
from parametrize import by_layout, by_native_dtype, by_norm_type

import gradclip_ext
from gradclip_ext import _C

total_norm = torch.ops.gradclip_ext.total_norm
finite_total_norm_ = torch.ops.gradclip_ext.finite_total_norm_
scale_ = torch.ops.gradclip_ext.scale_
clamp_ = torch.ops.gradclip_ext.clamp_


def number(value, device=None):
    return torch.tensor(value, dtype=torch.float64, device=device)


def on_cpu(value):
    return number(value, "cpu")


def matrix(dtype, seed=0):
    return ref.random_gradient((6, 8), dtype, seed)


def given(kind):
    """Tensors to check the operators with."""
    bucket = ref.random_gradient((40,), torch.float32, 4)
    return {
        "plain": lambda: [matrix(torch.float32), matrix(torch.bfloat16, 1)],
        "gaps": lambda: [ref.LAYOUTS["every_second_column"](matrix(torch.float32)), bucket],
        "bucket": lambda: [bucket[:16], bucket[16:].view(4, 6)],
        "empty": lambda: [torch.zeros(0), torch.zeros(3, 0)],
        "with gradients": lambda: [torch.nn.Parameter(matrix(torch.float64))],
    }[kind]()


CHECKED = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


class TestOpcheck:
    @pytest.mark.parametrize("kind", ["plain", "gaps", "bucket", "empty", "with gradients"])
    def test_total_norm(self, kind):
        torch.library.opcheck(total_norm.default, (given(kind), 2.0), test_utils=CHECKED)
        with torch.no_grad():
            torch.library.opcheck(total_norm.default, (given(kind), math.inf, torch.float64))

    @pytest.mark.parametrize("kind", ["plain", "gaps", "bucket", "empty"])
    def test_finite_total_norm(self, kind):
        tensors = given(kind)
        names = [f"name {i}" for i in range(len(tensors))]
        torch.library.opcheck(finite_total_norm_.default, (tensors[0], tensors, 1.0, None, names))

    @pytest.mark.parametrize("kind", ["plain", "gaps", "bucket", "empty"])
    def test_scale(self, kind):
        torch.library.opcheck(scale_.default, (given(kind), number(0.5)))

    @pytest.mark.parametrize("kind", ["plain", "gaps", "bucket", "empty"])
    def test_clamp(self, kind):
        torch.library.opcheck(clamp_.default, (given(kind), on_cpu(0.5)))


class TestLayouts:
    @by_layout
    @by_norm_type
    @by_native_dtype
    def test_total_norm(self, dtype, norm_type, layout):
        tensors = [matrix(dtype), ref.LAYOUTS[layout](matrix(dtype, 1))]
        before = [tensor.clone() for tensor in tensors]
        norm = total_norm(tensors, norm_type)
        assert norm.dtype == torch.float64 and norm.shape == ()
        assert norm.device == tensors[0].device
        exactly = dtype == torch.float64 or norm_type == math.inf
        tolerance = 1e-15 if exactly else ref.CHAIN_ERROR[norm_type]
        assert norm.item() == pytest.approx(ref.reference_norm(tensors, norm_type), rel=tolerance)
        ref.assert_unchanged(tensors, before)

    @by_norm_type
    def test_total_norm_for_a_result_in_float64(self, norm_type):
        tensors = [ref.random_gradient((10_001,), torch.float32, 1)]
        norm = total_norm(tensors, norm_type, torch.float64)
        assert norm.item() == pytest.approx(ref.reference_norm(tensors, norm_type), rel=1e-15)

    @by_layout
    @by_native_dtype
    def test_scale_and_clamp(self, dtype, layout):
        tensors = [matrix(dtype), ref.LAYOUTS[layout](matrix(dtype, 1))]
        before = [ref.widened(tensor) for tensor in tensors]
        versions = [tensor._version for tensor in tensors]
        scale_(tensors, number(0.3))
        for tensor, expected, version in zip(tensors, before, versions, strict=True):
            ref.assert_scaled(tensor, expected, 0.3)
            assert tensor._version > version
        expected = [tensor.clone().clamp_(-0.25, 0.25) for tensor in tensors]
        clamp_(tensors, on_cpu(0.25))
        ref.assert_unchanged(tensors, expected)

    @pytest.mark.parametrize("layout", ["contiguous", "every_second_column"])
    def test_one_that_is_listed_twice_counts_twice(self, layout):
        tensor = ref.LAYOUTS[layout](torch.full((4, 4), 8.0))
        other = torch.ones(3)
        assert total_norm([tensor, other, tensor], 1.0).item() == 2 * 4 * 4 * 8 + 3
        scale_([tensor, other, tensor], number(0.5))
        assert tensor.unique().tolist() == [2.0] and other.unique().tolist() == [0.5]

    def test_gaps_are_not_written(self):
        storage = torch.full((8, 8), 3.0)
        scale_([storage[:, ::2], torch.ones(2)], number(0.5))
        assert storage[:, ::2].unique().tolist() == [1.5]
        assert storage[:, 1::2].unique().tolist() == [3.0]

    @by_native_dtype
    def test_a_coefficient_too_small_for_float32(self, dtype):
        if dtype == torch.float16:
            pytest.skip("has no numbers that are large enough")
        tensor = torch.full((5,), 2.0**100, dtype=dtype)
        scale_([tensor], number(2.0**-180))
        assert tensor.double().unique().tolist() == [2.0**-80]

    def test_complex_numbers_and_lazy_views(self):
        values = ref.random_gradient((7,), torch.complex64, 3)
        lazy = values.clone().conj()
        assert lazy.is_conj()
        assert total_norm([lazy], 2.0).item() == pytest.approx(values.abs().norm().item(), rel=1e-6)
        scale_([lazy], number(0.5))
        assert torch.equal(lazy, values.conj() * 0.5)
        negated = torch._neg_view(torch.ones(4))
        scale_([negated], number(0.5))
        assert negated.tolist() == [-0.5] * 4
        clamp_([negated], on_cpu(0.25))
        assert negated.tolist() == [-0.25] * 4

    def test_in_inference_mode(self):
        with torch.inference_mode():
            tensors = [torch.ones(4), torch.ones(4, 4)[:, ::2]]
            assert total_norm(tensors, 1.0).item() == 12.0
            scale_(tensors, number(0.5))
        assert total_norm(tensors, 1.0).item() == 6.0

    def test_the_number_may_be_on_the_cpu(self):
        tensor = torch.ones(4)
        scale_([tensor], on_cpu(0.5))
        assert tensor.tolist() == [0.5] * 4


class TestErrors:
    """Each says what is wrong, and changes nothing."""

    def check(self, text, operator, *arguments):
        tensors = [t for t in arguments[0] if not t.is_meta and t.dtype != torch.int64]
        before = [tensor.clone() for tensor in tensors]
        with pytest.raises(RuntimeError, match=text):
            operator(*arguments)
        ref.assert_unchanged(tensors, before)

    @pytest.mark.parametrize("layout", ["contiguous", "every_second_column"])
    def test_elements_that_share_memory(self, layout):
        first = ref.LAYOUTS[layout](torch.ones(4, 4))
        expanded = torch.ones(1).expand(4)
        text = "more than one element of the written-to tensor"
        self.check(text, scale_, [first, expanded], number(0.5))
        self.check(text, clamp_, [first, expanded], on_cpu(0.5))

    def test_lists(self):
        with pytest.raises(RuntimeError, match="expected a list of tensors, found none"):
            scale_([], number(0.5))
        integers = torch.ones(3, dtype=torch.int64)
        self.check(
            "no tensor can have dtype Long here", scale_, [torch.ones(3), integers], number(1)
        )
        complex_one = torch.ones(3, dtype=torch.complex64)
        self.check("dtype ComplexFloat", clamp_, [torch.ones(3), complex_one], on_cpu(1.0))
        self.check("dtype ComplexFloat", total_norm, [torch.ones(3), complex_one], 1.0)

    def test_numbers(self):
        tensors = [torch.ones(3)]
        text = "expected a float64 number"
        self.check(text, scale_, tensors, torch.tensor(0.5))
        self.check(text, scale_, tensors, torch.tensor([0.5, 0.5], dtype=torch.float64))
        self.check("norm_type has to be 1, 2 or inf, found 3", total_norm, tensors, 3.0)
        self.check(text, clamp_, tensors, torch.tensor(0.5, device="cpu"))

    def test_names(self):
        with pytest.raises(RuntimeError, match="expected 1 names, found 2"):
            finite_total_norm_(torch.ones(1), [torch.ones(1)], 2.0, None, ["one", "two"])

    def test_a_norm_that_is_not_finite(self):
        tensors = [torch.ones(2), torch.tensor([[1.0, math.inf]])]
        for norm_type, order in [(1.0, "1.0"), (2.0, "2.0"), (math.inf, "inf")]:
            with pytest.raises(RuntimeError) as error:
                finite_total_norm_(tensors[0], tensors, norm_type, None, ["a", "b"])
            assert f"norm of order {order} " in str(error.value)
            assert str(error.value).endswith("(out of 2) is that of b of shape (1, 2).")


@pytest.mark.cpu_only
def test_a_second_copy_of_the_library_is_refused(tmp_path):
    # Torch would otherwise end the process, or find the operators of either copy.
    path = Path(_C.__file__)
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    code = f"""
import importlib.util
import torch, gradclip_ext
spec = importlib.util.spec_from_file_location("_C", {str(copy)!r})
try:
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
except ImportError as error:
    assert "gradclip_ext" in str(error), error
    print("refused")
assert torch.ops.gradclip_ext.total_norm([torch.ones(4)], 2.0).item() == 2.0
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(gradclip_ext.__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0 and result.stdout == "refused\n", result.stderr
