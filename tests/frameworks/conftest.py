"""What the tests of all frameworks share."""

from __future__ import annotations

import os

import pytest
import torch

# torchvision, without which timm and Transformers do not load, comes compiled for CUDA alone. With
# a torch for the CPU its operators are missing, and two of them it takes for granted.
if torch.version.cuda is None:
    torch.library.define("torchvision::nms", "(Tensor a, Tensor b, float c) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor a, Tensor b, float c) -> Tensor")

# The models are small, and threads that wait would only take turns.
torch.set_num_threads(1)

# Nothing here is to be fetched.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerators of one process share their state."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def silent_transformers():
    import transformers

    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(before)
