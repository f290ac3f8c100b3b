"""Every suite here runs twice: see whereabouts."""

from __future__ import annotations

import pytest
from torch.overrides import TorchFunctionMode


class Watching(TorchFunctionMode):
    """Observes every operation, so that nothing is read on the host and nothing runs natively."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True, params=["numbers on the host", "numbers in tensors"])
def whereabouts(request):
    """Both kinds of scalars, even without a GPU, on which they would always be tensors."""
    if request.param == "numbers on the host":
        yield
    else:
        with Watching():
            yield
