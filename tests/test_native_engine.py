"""Builds and runs tests/native/test_engine.cpp: csrc/core and csrc/cpu on their own, no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_engine_without_torch(standard, tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path / "test_engine"
    sources = [ROOT / "tests/native/test_engine.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    subprocess.run(
        [compiler, f"-std={standard}", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
        + [f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(program)],
        check=True,
    )
    result = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) checks", result.stdout)[1]) > 100_000
