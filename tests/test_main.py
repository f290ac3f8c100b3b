"""python -m gradclip_ext: the report, and that its self-check can fail."""

from __future__ import annotations

import subprocess
import sys

import torch

import gradclip_ext
from gradclip_ext import __main__ as main_module


def test_report(capsys):
    assert main_module.main() == 0
    lines = capsys.readouterr().out.splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert facts["gradclip_ext"] == gradclip_ext.__version__
    assert facts["torch"] == torch.__version__
    assert f"  CPU kernels      {gradclip_ext._C.instruction_set()}" in lines
    checks = [line for line in lines if line.endswith(" ok")]
    assert len(checks) == len(main_module._CHECKS) == 9
    assert lines[-1] == "All 9 checks passed."


def test_as_a_command():
    result = subprocess.run(
        [sys.executable, "-m", "gradclip_ext"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "All 9 checks passed." in result.stdout


def test_a_wrong_norm_fails_loudly(capsys, monkeypatch):
    right = gradclip_ext.clip_grad_norm_
    monkeypatch.setattr(gradclip_ext, "clip_grad_norm_", lambda *args: right(*args) * 1.001)
    assert main_module.main() == 1
    out = capsys.readouterr().out
    assert "norm and clipping in float32 against float64" in out
    assert "FAILED: norm: expected 458." in out
    assert "do not use this installation" in out


def test_a_missing_write_fails_loudly(capsys, monkeypatch):
    measure = gradclip_ext.get_total_norm
    monkeypatch.setattr(
        gradclip_ext,
        "clip_grad_norm_",
        lambda parameters, max_norm, norm_type=2.0: measure(
            [p.grad for p in parameters], norm_type
        ),
    )
    monkeypatch.setattr(gradclip_ext, "clip_grad_value_", lambda *args: None)
    assert main_module.main() == 1
    out = capsys.readouterr().out
    assert "FAILED: largest error of a scaled element" in out
    assert "FAILED: a limited gradient differs from torch's" in out
