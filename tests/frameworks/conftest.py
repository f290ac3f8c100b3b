"""What the tests of all frameworks share."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

# torchvision, without which timm and Transformers do not load, comes compiled for CUDA alone. With
# a torch for the CPU its operators are missing, and two of them it takes for granted.
if torch.version.cuda is None:
    torch.library.define("torchvision::nms", "(Tensor a, Tensor b, float c) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor a, Tensor b, float c) -> Tensor")

# Nothing here is to be fetched.
os.environ["HF_HUB_OFFLINE"] = "1"
