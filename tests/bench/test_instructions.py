"""bench/instructions.sh: the calls that it counts, and the table that it prints."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gradclip_ext import _C

BENCH = Path(__file__).resolve().parents[2] / "bench"
CASES = [
    "clip_grad_norm_, quiet",
    "clip_grad_norm_, clip",
    "get_total_norm",
    "GradClipper.clip_, quiet",
    "torch's clip_grad_norm_",
    "torch's get_total_norm",
]


def test_every_call_of_a_case_clips_or_none_does():
    driver = runpy.run_path(str(BENCH / "instructions.py"))
    assert list(driver["cases"](3)) == CASES
    for name, (call, arguments) in driver["cases"](3).items():
        assert len(arguments) == driver["WARM_UP"] + sum(driver["CALLS"])
        if name == "clip_grad_norm_, clip":
            for max_norm in arguments:
                assert float(call(max_norm)) > max_norm
        elif name == "clip_grad_norm_, quiet":
            for max_norm in arguments:
                assert float(call(max_norm)) == pytest.approx(2.0)


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.skipif(_C.instruction_set() == "portable", reason="needs a processor with AVX2")
def test_counts_instructions():
    package = Path(_C.__file__).parents[1]
    path = f"{package}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    result = subprocess.run(
        [BENCH / "instructions.sh", "--tensors", "1", "50"],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["tensors", "call", "instructions"]
    rows = [re.fullmatch(r" *(\d+)  (\S.*\S) +(\d+)", line).groups() for line in lines]
    assert [row[:2] for row in rows] == [(count, case) for count in ("1", "50") for case in CASES]
    counts = {row[:2]: int(row[2]) for row in rows}
    for case in CASES:
        assert 1000 < counts["1", case] < counts["50", case]
    assert counts["50", CASES[0]] < counts["50", CASES[1]] < counts["50", CASES[4]]
