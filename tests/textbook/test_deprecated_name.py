"""clip_grad_norm, the name that torch.nn.utils has deprecated."""

from __future__ import annotations

import inspect
import math
import warnings
from pathlib import Path

import pytest
import reference as ref
import torch

import gradclip_ext
from gradclip_ext import textbook

pytestmark = pytest.mark.cpu_only


class TestDeprecatedName:
    @pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
    def test_is_the_function_of_the_new_name(self, order):
        old = [ref.random_gradient((9, 9), seed=s) for s in range(3)]
        new = ref.copies(old)
        with pytest.warns(FutureWarning):
            norm = textbook.clip_grad_norm(ref.parameters(old), 0.5, order, True, False)
        assert torch.equal(
            norm, gradclip_ext.clip_grad_norm_(ref.parameters(new), 0.5, order, True, False)
        )
        ref.assert_unchanged(old, new)

    def test_warns_as_torch_does(self):
        found = []
        for function in (textbook.clip_grad_norm, torch.nn.utils.clip_grad_norm):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                line = inspect.currentframe().f_lineno + 1
                function(ref.parameter(torch.tensor([3.0])), 1.0)
            assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, line)]
            found.append((caught[0].category, str(caught[0].message)))
        assert Path(__file__).name == "test_deprecated_name.py"
        ours, theirs = found
        assert ours == (
            FutureWarning,
            "`gradclip_ext.clip_grad_norm` is now deprecated "
            "in favor of `gradclip_ext.clip_grad_norm_`.",
        )
        assert theirs == (
            FutureWarning,
            ours[1]
            .replace("gradclip_ext.textbook", "torch.nn.utils")
            .replace("gradclip_ext", "torch.nn.utils"),
        )

    def test_signature_is_torchs(self):
        ours = inspect.signature(textbook.clip_grad_norm).parameters.values()
        theirs = inspect.signature(torch.nn.utils.clip_grad_norm).parameters.values()
        assert [(p.name, p.default, p.kind) for p in ours] == [
            (p.name, p.default, p.kind) for p in theirs
        ]

    def test_errors_come_through(self):
        gradient = torch.tensor([3.0, math.nan])
        with pytest.warns(FutureWarning), pytest.raises(ValueError, match="max_norm"):
            textbook.clip_grad_norm(ref.parameter(gradient), -1.0)
        with pytest.warns(FutureWarning), pytest.raises(RuntimeError, match="non-finite"):
            textbook.clip_grad_norm(ref.parameter(gradient), 1.0, error_if_nonfinite=True)
        assert gradient[0].item() == 3.0
