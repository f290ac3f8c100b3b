"""Runs each suite where its folder says: also on CUDA, if there is a GPU or -m cuda asks for it."""

from __future__ import annotations

import pytest
import suites
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if suites.folder_of(item.path) in suites.OF_THE_SOURCES:
            item.add_marker(pytest.mark.sources)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if suites.folder_of(metafunc.definition.path) not in suites.ON_EVERY_DEVICE:
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
