"""tools/compare_suites.py: other projects' tests, with torch's functions and with ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from programs import CLIPPING

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare_suites.py"

pytestmark = [
    # Of other processes, which take the same way on every build.
    pytest.mark.install,
    pytest.mark.skipif(not TOOL.is_file(), reason="needs the sources"),
]

SUITE = (
    CLIPPING
    + """
import pytest
def test_clips():
    clip()
    assert weight.grad.norm() <= 1.001
def test_of_torch_alone():
    assert clip() == float("inf")
def test_of_ours_alone():
    assert clip() < float("inf")
def test_fails():
    raise ValueError
@pytest.mark.skip
def test_skipped(): pass
def test_other(): pass
"""
)


@pytest.mark.parametrize(
    ("expression", "code", "lines"),
    [
        ("clips or fails", 0, ["1 failed, 1 passed", "1 failed, 1 passed", "no difference"]),
        (
            "alone or skipped",
            1,
            [
                "1 failed, 1 passed, 1 skipped",
                "1 failed, 1 passed, 1 skipped",
                "test_suite::test_of_ours_alone: failed with torch, passed with ours",
                "test_suite::test_of_torch_alone: passed with torch, failed with ours",
            ],
        ),
        (
            "other",
            1,
            [
                "1 passed",
                "1 passed",
                "no difference",
                "no test called torch's functions, so nothing was compared",
            ],
        ),
    ],
)
def test_outcomes(programs, expression, code, lines):
    programs.write("test_suite.py", SUITE)
    result = programs.python(TOOL, programs.folder, "--tests", "test_suite.py", "-k", expression)
    assert (result.returncode, result.stderr) == (code, "")
    found = result.stdout.splitlines()
    assert [line[13:] for line in found[:2]] == lines[:2]
    assert [line for line in found if line in lines] == lines[2:]


def test_what_is_known(programs):
    programs.write("test/test_nn.py", SUITE.replace("def test_clips", "def test_clip_grad"))
    result = programs.python(TOOL, programs.folder, "--python", sys.executable)
    assert result.returncode == 0
    assert result.stdout.startswith(
        "torch        1 passed\ngradclip_ext 1 passed\nthe calls    1 c"
    )


def test_checkout_that_is_not_known(programs):
    result = programs.python(TOOL, programs.folder)
    assert result.returncode == 2
    assert "is neither torch nor Lightning: pass --tests" in result.stderr
    result = programs.python(TOOL, programs.folder / "nowhere")
    assert "there is no folder" in result.stderr


def test_suite_that_cannot_be_run(programs):
    result = programs.python(
        TOOL, programs.folder, "--tests", "nowhere.py", "--python", "/bin/false"
    )
    assert result.returncode == 1
    assert result.stderr.startswith("/bin/false -m pytest nowhere.py ")
