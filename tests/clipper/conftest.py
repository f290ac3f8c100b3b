"""Every suite here runs twice: see whereabouts."""

from __future__ import annotations

import pytest
from models import Watching


@pytest.fixture(autouse=True, params=["numbers on the host", "numbers in tensors"])
def whereabouts(request):
    """Both kinds of scalars, even without a GPU, on which they would always be tensors."""
    if request.param == "numbers on the host":
        yield
    else:
        with Watching():
            yield
