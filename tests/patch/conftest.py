"""Every test here begins and ends with torch's own functions."""

from __future__ import annotations

import programs as running
import pytest
import torch

from gradclip_ext.patch import FUNCTIONS

FOUND = {name: getattr(torch.nn.utils, name) for name in FUNCTIONS}


def assert_torchs_own():
    for name, function in FOUND.items():
        assert getattr(torch.nn.utils, name) is function
        assert function.__closure__[0].cell_contents is function.__wrapped__, name


@pytest.fixture(autouse=True)
def no_patch_left():
    assert_torchs_own()
    yield
    assert_torchs_own()


@pytest.fixture(scope="session")
def metadata(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metadata")
    running.register(folder)
    return folder


@pytest.fixture
def programs(tmp_path, metadata):
    return running.Programs(tmp_path, metadata)
