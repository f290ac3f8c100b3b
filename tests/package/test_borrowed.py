"""pytest --borrowed: what becomes of tests that hang, or that need what the machine lacks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
SUITE = {
    "test_a.py": """
        import signal, time
        import torch

        def test_slow():
            time.sleep(60)

        def test_stuck_outside_of_python():
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(60)

        def test_loses_the_gpu():
            def synchronize():
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

            torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize

        def test_after_it():
            assert torch.cuda.synchronize.__name__ == "synchronize"
            assert not torch.cuda.is_initialized()
    """,
    "test_b.py": """
        import hypothesis
        from hypothesis import strategies

        @hypothesis.given(strategies.integers(0, 10**6))
        def test_is_not_shrunk(number):
            open(__file__ + ".log", "a").write(f"{number}\\n")
            assert number < 1000
    """,
    "test_c.py": """
        import hypothesis.a_part_that_is_missing
    """,
    "test_d.py": """
        import a_package_that_is_missing
    """,
}


def run(folder: Path, *options: str) -> str:
    for name, text in SUITE.items():
        lines = text.splitlines()
        (folder / name).write_text("\n".join(line[8:] for line in lines), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "borrowed"]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", folder, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(TESTS), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return result.stdout


def test_what_hangs_or_breaks_the_gpu_does_not_take_the_others_along(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    # By file, pytest-xdist would run a test that ends its process again and again.
    out = run(tmp_path, "-n", "1", "--dist", "worksteal", "--borrowed", "2", "test_a.py")
    assert "\n!! test_a.py::test_slow - Failed: took more than 2 s\n" in out, out
    # Where it stood.
    assert 'test_a.py", line 10 in test_stuck_outside_of_python' in out, out
    assert "test_loses_the_gpu: the CUDA context is lost" in out, out
    assert len(re.findall("^!! .* crashed while running 'test_a.py::", out, re.MULTILINE)) == 2, out
    # Those after each of them ran in another process.
    assert "3 failed, 2 passed in" in out, out


def test_nothing_is_shrunk_and_nothing_missing_breaks_the_collection(tmp_path: Path) -> None:
    pytest.importorskip("hypothesis")
    files = ("test_b.py", "test_c.py", "test_d.py")
    out = run(tmp_path, "--borrowed", "30", "--continue-on-collection-errors", *files)
    # The smallest number that fails is where shrinking ends.
    assert "\n!! test_b.py::test_is_not_shrunk - assert " in out, out
    assert "assert 1000 < 1000" not in out, out
    assert "test_c.py:0: hypothesis is not installed" in out, out
    # What is missing for any other reason is an error.
    assert "\n!! test_d.py - E   ModuleNotFoundError: No module named 'a_package_that" in out, out
    assert "assert 1000 < 1000" in run(tmp_path, "test_b.py")
