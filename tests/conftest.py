"""Runs each suite where its folder says: also on CUDA, if there is a GPU or -m cuda asks for it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import suites
import torch

pytest_plugins = ["borrowed"]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out the suites of frameworks where these are missing; see `make frameworks`."""
    is_folder_with_suites = collection_path.parent == suites.TESTS
    if is_folder_with_suites and collection_path.name in suites.WITH_FRAMEWORKS:
        return None if suites.frameworks_are_there() else True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if suites.folder_of(item.path) in suites.OF_THE_SOURCES:
            item.add_marker(pytest.mark.sources)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=_duration_class(items))


def _duration_class(items: list[pytest.Item]) -> Callable[[pytest.Item], int]:
    """Long tests first, so that short ones are left to fill the time of every process.

    Those that compile, install or train are long: the longer, the fewer of them are in a file.
    """
    counts = Counter(item.path for item in items)

    def duration_class(item: pytest.Item) -> int:
        is_long = item.get_closest_marker("sources") or item.get_closest_marker("install")
        return counts[item.path] if is_long else len(items)

    return duration_class


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
