"""The example that trains with mixed precision in four ways: short runs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def amp_train(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    # On a busy machine two threads would wait for each other.
    torch.set_num_threads(1)
    yield importlib.import_module("amp_train")
    torch.set_num_threads(threads)


def test_run_prints_a_table_and_draws_a_picture(
    amp_train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "amp.png"
    assert amp_train.main(["--steps", "3", "--output", str(path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in table[1:5]] == list(amp_train.WAYS)
    assert all("of 3" in line for line in table[1:5])
    height, width, _ = importlib.import_module("matplotlib.image").imread(path).shape
    assert width > 1000
    assert height > 500


def test_clipped_runs_have_the_same_curve_and_learn(amp_train: ModuleType) -> None:
    runs = {name: amp_train.train(name, 100, 0) for name in amp_train.WAYS}
    reference = runs["torch's recipe"]
    for name in ("unscale and clip", "clip and step"):
        assert runs[name].losses == pytest.approx(reference.losses, rel=0.02, abs=1e-3)
        assert runs[name].skipped == reference.skipped
        assert runs[name].accuracy > 0.85
    unclipped = amp_train.largest_difference(runs["no clipping"], reference)
    assert unclipped > 100 * amp_train.largest_difference(runs["clip and step"], reference)
