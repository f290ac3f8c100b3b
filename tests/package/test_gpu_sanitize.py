"""tools/gpu_sanitize.py on the CPU: it reaches every operation, and finds what is wrong with it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gradclip_ext import _C

PATH = Path(__file__).resolve().parents[2] / "tools" / "gpu_sanitize.py"
# Those that write and measure nothing.
OTHERS = {
    *("fit_fused_step", "have_clippable_units", "hold_exactly", "holds_twice", "is_flat"),
    *("instruction_set", "is_native", "known_number", "observed", "set_device_mode_type"),
    "read_dtensors",
    "set_tuning",
    # What grad_norms launches, over tensors instead of gradients.
    "tensor_norms",
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(PATH.stem, PATH)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture
def small(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(
        script,
        "CASES",
        {
            "native": script.Case([5, 33, 0, 1, 300], script.DTYPES[:2]),
            # Some of which take the fallback.
            "some gaps": script.Case([50, 33, 17], script.DTYPES[:2], layout="some gaps"),
        },
    )
    yield


def test_all_values_are_correct(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [*(f"{name}: done" for name in script.CASES), "all values correct"]


def slightly_more(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like the function, with norms that are a little too large."""

    def wrong(*arguments: Any) -> Any:
        result = function(*arguments)
        if isinstance(result, tuple):
            return result[0], result[1] * (1 + 1e-5)
        return None if result is None else result * (1 + 1e-5)

    return wrong


def nothing(function: Callable[..., Any]) -> Callable[..., Any]:
    """As if the function had done its work."""
    return lambda *arguments: torch.zeros(()) if function is _C.clip_units_ else 0


WRONG = {
    "add_weight_decay_": nothing,
    "clamp_tensors_": nothing,
    "clip_grad_norm_": slightly_more,
    "clip_grad_value_": nothing,
    "clip_grads_with_norm_": nothing,
    "clip_units_": nothing,
    "get_total_norm": slightly_more,
    "grad_norms": slightly_more,
    "power_sum": slightly_more,
    "scale_": nothing,
    "scale_each_": nothing,
    "scale_tensors_": nothing,
}


def test_every_operation_is_broken_once() -> None:
    assert {name for name in dir(_C) if not name.startswith("_")} - OTHERS == WRONG.keys()


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_operation_is_found(
    script: ModuleType,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    assert script.main(["--device", "cpu"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(_C, name, WRONG[name](getattr(_C, name)))
    assert script.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "expected" in out and out.endswith(" results are wrong\n")


def test_a_write_between_the_gradients_is_found(
    script: ModuleType,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clip = _C.clip_grad_value_

    def one_too_many(parameters: Any, bound: float) -> Any:
        gradient = parameters[0].grad
        gradient.as_strided((1,), (1,), gradient.storage_offset() + gradient.numel()).zero_()
        return clip(parameters, bound)

    monkeypatch.setattr(_C, "clip_grad_value_", one_too_many)
    assert script.main(["--device", "cpu"]) == 1
    assert "storage 0 has changed between the gradients" in capsys.readouterr().out
