"""The example that trains with FSDP2: a short run on two ranks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradclip_ext

pytest.importorskip("torch.distributed.fsdp", reason="this torch was built without it")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fsdp2_train.py"
# Of the package that is under test, wherever it was found.
PACKAGE = Path(gradclip_ext.__file__).parent
STEPS = 12


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return subprocess.run(
        [*launcher, "--standalone", "--nproc-per-node", "2", EXAMPLE, *map(str, arguments)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(PACKAGE.parent),
            # The same run wherever there are GPUs, too.
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_three_ways_take_the_same_steps_on_both_ranks(tmp_path: Path) -> None:
    saved = tmp_path / "new" / "runs.json"
    finished = torchrun("--steps", STEPS, "--output", saved)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["torch", "gradclip_ext", "GradClipper"]
    assert all("the same" in line for line in lines[1:])

    torchs, *ours = json.loads(saved.read_text())
    assert torchs["losses"][-1] < 0.9 * torchs["losses"][0]
    for run in ours:
        first, second = run["norms"]
        # The same bits.
        assert first == second
        assert len(first) == len(run["losses"]) == STEPS
        assert first == pytest.approx(torchs["norms"][0], rel=2e-6)
        assert run["losses"] == pytest.approx(torchs["losses"], rel=2e-6)
    # A step is clipped if its norm is above what the example allows.
    clipped = sum(norm > 0.5 for norm in ours[1]["norms"][0])
    assert ours[1]["clipped_steps"] == clipped > STEPS // 2
    assert lines[3].endswith(f"{clipped} of {STEPS}")
    # A uniform guess among 27 characters, more or less.
    assert torchs["losses"][0] == pytest.approx(math.log(27), rel=0.15)


def test_without_torchrun_it_says_how_to_start_it() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "LOCAL_RANK"}
    environment["PYTHONPATH"] = str(PACKAGE.parent)
    finished = subprocess.run(
        [sys.executable, EXAMPLE], env=environment, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 2
    assert "start it by torchrun" in finished.stderr
