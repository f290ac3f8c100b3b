"""The example that plots the gradient norms of every layer: a short run."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def watch_norms(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    # On a busy machine two threads would wait for each other.
    torch.set_num_threads(1)
    yield importlib.import_module("watch_norms")
    torch.set_num_threads(threads)


def train(module: ModuleType, rule: object, *arguments: str) -> object:
    return module.train("run", rule, module.parse_arguments(arguments))


@pytest.mark.parametrize("steps", [1, 120])
def test_run_prints_a_table_and_draws_a_picture(
    watch_norms: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    path = tmp_path / "new" / "norms.png"
    assert watch_norms.main(["--steps", str(steps), "--output", str(path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line[:11].strip() for line in table[1:3]] == ["no clipping", "AutoClip"]
    assert all(line.endswith(f"of {steps}") for line in table[1:3])
    assert table[1].split()[-4] == "0.0%"
    image = importlib.import_module("matplotlib.image").imread(path)
    height, width, _ = image.shape
    assert width > 1000
    assert height > 1000


def test_unclipped_training_explodes_and_clipped_training_learns(watch_norms: ModuleType) -> None:
    unclipped = train(watch_norms, math.inf, "--steps", "200")
    clipped = train(watch_norms, watch_norms.AutoClip(50.0), "--steps", "200")
    # The same initial weights and the same batches.
    assert unclipped.first_loss == clipped.first_loss
    assert unclipped.total_norms[0] == clipped.total_norms[0]
    assert unclipped.broken_steps == clipped.broken_steps != []
    assert unclipped.first_nonfinite_step is not None
    assert not math.isfinite(unclipped.final_loss)
    assert not any(unclipped.clipped)
    assert clipped.first_nonfinite_step is None
    assert clipped.final_loss < 0.5 * clipped.first_loss
    assert sum(clipped.clipped) == clipped.reports[-1].clipped_steps > 20
    for report, is_clipped in zip(clipped.reports, clipped.clipped, strict=True):
        assert is_clipped == (report.coefficient < 1.0) == (report.total_norm > report.limits[0])


def test_same_seed_same_run(watch_norms: ModuleType) -> None:
    def norms(seed: int) -> list[float]:
        run = train(watch_norms, watch_norms.AutoClip(50.0), "--steps", "5", "--seed", str(seed))
        return run.total_norms

    assert norms(1) == norms(1)
    assert norms(1) != norms(2)


def test_no_steps_are_refused(watch_norms: ModuleType) -> None:
    with pytest.raises(SystemExit) as refusal:
        watch_norms.main(["--steps", "0"])
    assert refusal.value.code == 2
