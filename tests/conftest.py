"""Runs the tests that say nothing of a device on CUDA as well, where there is one or -m cuda asks.

They make their tensors without naming a device, so a default device is all it takes.
"""

from __future__ import annotations

import pytest
import torch

ON_EVERY_DEVICE = {
    "test_clip_grad_norm",
    "test_clipper",
    "test_errors",
    "test_family",
    "test_known_bugs",
    "test_lists",
    "test_properties",
    "test_textbook",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__ not in ON_EVERY_DEVICE:
        return
    if metafunc.definition.get_closest_marker("cpu_only"):
        return
    if not torch.cuda.is_available() and "cuda" not in metafunc.config.option.markexpr:
        return
    devices = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
    metafunc.parametrize("default_device", devices, indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def default_device(request):
    if getattr(request, "param", "cpu") == "cpu":
        yield
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    with torch.device(request.param):
        yield
