"""Every example in the documentation runs and gives what it says."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[2] / "README.md"
MODULES = ["clipper", "functional", "norms", "textbook", "thresholds.agc", "thresholds.autoclip"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    module = importlib.import_module(f"gradclip_ext.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch}, verbose=False)
    assert result.failed == 0
    # Only what is a drop-in for torch's is documented there.
    assert result.attempted > 0 or name == "functional"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


class Logger:
    def __init__(self) -> None:
        self.logged: dict[str, float] = {}

    def log(self, numbers: dict[str, float]) -> None:
        self.logged.update(numbers)


@pytest.mark.parametrize("block", range(len(python_blocks())))
def test_examples_of_readme(block):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    logger = Logger()
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss": (model(torch.ones(3)) * 100.0).sum(),
        "logger": logger,
    }
    before = model.weight.detach().clone()
    exec(python_blocks()[block], names)
    assert not torch.equal(model.weight, before)
    if "norm" in names:
        assert names["norm"].item() > 1.0
        assert sum(p.grad.square().sum() for p in model.parameters()).sqrt() <= 1.0001
    else:
        assert logger.logged["gradients/total_norm"] > 1.0
