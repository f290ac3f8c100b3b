"""Every suite here runs twice: see whereabouts."""

from __future__ import annotations

import pytest

import gradclip_ext


@pytest.fixture(autouse=True, params=["numbers on the host", "numbers on the device"])
def whereabouts(request, monkeypatch):
    """Both ways of the clipper, also without a GPU: with and without reading what it measured."""
    if request.param == "numbers on the device":
        monkeypatch.setattr(gradclip_ext.clipper, "_is_on_host", lambda _: False)
