"""python -m gradclip_ext: the report, and that its self-check can fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

import gradclip_ext
from gradclip_ext import __main__ as main_module
from gradclip_ext import _built_with
from gradclip_ext.patch import FUNCTIONS


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The number of lines does not depend on the machine; tests that need a GPU make one up."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def gpus(monkeypatch):
    """Makes up GPUs of these compute capabilities, and a build for sm_80 and sm_90."""

    def make_up(*capabilities):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "made up")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(_built_with, "CUDA", "13.0")
        monkeypatch.setattr(_built_with, "CUDA_CODES", ("sm_80", "sm_90"))

    return make_up


@pytest.fixture
def checked(monkeypatch):
    """The devices that are checked, by a single check that fails on those in `failing`."""
    devices, failing = [], []

    def check(device):
        devices.append(str(device))
        if str(device) in failing:
            raise AssertionError("it is wrong here")

    monkeypatch.setattr(main_module, "_CHECKS", {"a check": check})
    return devices, failing


def test_report(capsys):
    assert main_module.main() == 0
    lines = capsys.readouterr().out.splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert facts["gradclip_ext"] == gradclip_ext.__version__
    assert facts["torch"] == torch.__version__
    assert f"  CPU kernels      {gradclip_ext._C.instruction_set()}" in lines
    assert facts["engines"].startswith(
        "CPU only (" if _built_with.CUDA is None else "CPU and CUDA ("
    )
    checks = [line for line in lines if line.endswith(" ok")]
    assert len(checks) == len(main_module._CHECKS) == 9
    assert lines[-1] == "All 9 checks passed."


def test_as_a_command():
    result = subprocess.run(
        [sys.executable, "-m", "gradclip_ext"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr
    assert "All 9 checks passed." in result.stdout


def test_the_import_is_small():
    """Without torch's compiler and DTensors, which take seconds: a program may need neither."""
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import gradclip_ext\n"
        "added = set(sys.modules) - before\n"
        "heavy = {'torch._dynamo', 'torch.distributed.tensor'}\n"
        "print('gradclip_ext.clipper' in added, added & heavy)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "True set()\n"), result.stderr


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


def test_compares_with_torchs_own_functions_under_the_patch(capsys, monkeypatch):
    right = gradclip_ext.clip_grad_norm_

    def wrong(*arguments):
        return right(*arguments) * 1.001

    monkeypatch.setattr(gradclip_ext, "clip_grad_norm_", wrong)
    monkeypatch.setitem(FUNCTIONS, "clip_grad_norm_", wrong)
    with gradclip_ext.patch():
        assert main_module.main() == 1
    out = capsys.readouterr().out
    assert re.search("L2 norm and clipping against torch.nn.utils +FAILED: norm", out)


@pytest.mark.parametrize(
    ("version", "codes", "text"),
    [
        (None, (), "none: CUDA gradients take the way through torch's operations"),
        ("13.0", ("sm_80", "compute_80"), "CUDA 13.0, for sm_80 compute_80"),
    ],
)
def test_cuda_engine(version, codes, text):
    assert main_module._cuda_engine(version, codes) == text


@pytest.mark.parametrize(
    ("capability", "text"),
    [
        pytest.param((8, 0), "8.0, runs sm_80", id="its own"),
        pytest.param((8, 9), "8.9, runs sm_86", id="of an older card of the same generation"),
        pytest.param((9, 0), "9.0, runs sm_90a", id="with a letter"),
        pytest.param(
            (12, 1), "12.1, its driver compiles compute_100 on first use", id="newer than all"
        ),
        pytest.param(
            (7, 5),
            "7.5, NOT COVERED: build again with TORCH_CUDA_ARCH_LIST=7.5",
            id="older than all",
        ),
    ],
)
def test_coverage(capability, text):
    codes = ("sm_80", "sm_86", "sm_90a", "sm_100", "compute_100")
    assert main_module._coverage(capability, codes) == text


def test_code_with_a_letter_does_not_cover_newer_gpus():
    assert "NOT COVERED" in main_module._coverage((9, 1), ("sm_90a", "compute_90a"))


def test_devices(gpus, monkeypatch):
    gpus((8, 0))
    assert main_module._here()["devices"].endswith(", cuda:0 (made up, 8.0, runs sm_80)")
    monkeypatch.setattr(_built_with, "CUDA", None)
    assert main_module._here()["devices"].endswith(", cuda:0 (made up)")


def test_every_covered_gpu_is_checked(gpus, checked, capsys):
    gpus((8, 0), (9, 0))
    assert main_module.main() == 0
    assert checked[0] == ["cpu", "cuda:0", "cuda:1"]
    lines = capsys.readouterr().out.splitlines()
    headings = [line for line in lines if line.startswith("self-check")]
    assert headings == ["self-check on cpu", "self-check on cuda:0", "self-check on cuda:1"]
    assert lines[-1] == "All 3 checks passed."


def test_a_failure_on_one_gpu_is_told_there(gpus, checked, capsys):
    gpus((8, 0), (9, 0))
    checked[1].append("cuda:1")
    assert main_module.main() == 1
    lines = capsys.readouterr().out.splitlines()
    (failure,) = [line for line in lines if "FAILED" in line]
    assert failure.endswith("FAILED: it is wrong here")
    assert lines.index("self-check on cuda:1") == lines.index(failure) - 1
    assert lines[-1] == "1 of 3 checks failed: do not use this installation."


def test_a_gpu_that_is_not_covered_is_told_in_one_line(gpus, checked, capsys):
    gpus((7, 5), (9, 0))
    assert main_module.main() == 1
    assert checked[0] == ["cpu", "cuda:1"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "All 2 checks passed."
    assert lines[-1] == "cuda:0 is 7.5, NOT COVERED: build again with TORCH_CUDA_ARCH_LIST=7.5"


@pytest.mark.parametrize("without", ["engine", "CUDA in torch"])
def test_a_gpu_that_no_engine_of_the_build_is_for_is_not_checked(
    gpus, checked, monkeypatch, without
):
    gpus((7, 5))
    if without == "engine":
        monkeypatch.setattr(_built_with, "CUDA", None)
    else:
        monkeypatch.setattr(torch.version, "cuda", None)
    assert main_module.main() == 0
    assert checked[0] == ["cpu"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_self_check_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    result = subprocess.run(
        [sys.executable, "-m", "gradclip_ext"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    checks = 9 * (1 + torch.cuda.device_count())
    assert f"All {checks} checks passed." in result.stdout
