#!/usr/bin/env python3
"""Runs the tests of another project with torch's clipping functions and with ours, and compares.

usage: tools/compare_suites.py CHECKOUT [-k EXPRESSION] [--tests PATH ...] [--python PYTHON]

CHECKOUT is a clone of torch, of Lightning, or of any project with tests for pytest. Which tests are
about clipping is known of torch (test/test_nn.py -k clip_grad) and of Lightning (-k clip); in other
projects -k and --tests name them. PYTHON is an interpreter with the project, what its tests need,
pytest and gradclip_ext; by default the one that runs this.

Prints every test whose outcome differs. Exits with 1 if there is one, and where nothing was
compared: if no test was run, or if none of them called torch's functions.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

# What to run in a checkout that has this file or folder.
KNOWN = {
    "test/test_nn.py": (["test/test_nn.py"], "clip_grad"),
    "tests/tests_pytorch": (["tests/tests_pytorch", "tests/tests_fabric"], "clip"),
}


def main() -> int:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        torchs, _ = _outcomes(arguments, [], Path(folder) / "torch.xml")
        ours, error = _outcomes(arguments, ["gradclip_ext.run", "-m"], Path(folder) / "ours.xml")
    for name, outcomes in (("torch", torchs), ("gradclip_ext", ours)):
        counts = Counter(outcomes.values())
        print(f"{name:<12} {', '.join(f'{counts[kind]} {kind}' for kind in sorted(counts))}")
    report = error.partition("gradclip_ext: ")[2].strip()
    print(f"the calls    {report or 'no report: the run did not come to its end'}")
    different = [
        f"{test}: {torchs.get(test, 'not run')} with torch, {ours.get(test, 'not run')} with ours"
        for test in sorted({**torchs, **ours})
        if torchs.get(test) != ours.get(test)
    ]
    print(*(different or ["no difference"]), sep="\n")
    if set(torchs.values()) <= {"skipped"}:
        print("no test was run")
        return 1
    if not report or report.startswith("0 calls"):
        print("no test called torch's functions, so nothing was compared")
        return 1
    return 1 if different else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("-k", dest="expression")
    parser.add_argument("--tests", nargs="+")
    parser.add_argument("--python", default=sys.executable)
    arguments = parser.parse_args()
    if not arguments.checkout.is_dir():
        parser.error(f"there is no folder {arguments.checkout}")
    known = next((KNOWN[path] for path in KNOWN if (arguments.checkout / path).exists()), None)
    if known is None and arguments.tests is None:
        parser.error(f"{arguments.checkout} is neither torch nor Lightning: pass --tests")
    if known is not None and arguments.tests is None:
        arguments.tests = known[0]
        arguments.expression = arguments.expression or known[1]
    return arguments


def _outcomes(
    arguments: argparse.Namespace, runner: list[str], xml: Path
) -> tuple[dict[str, str], str]:
    """What became of each test, and what was written to standard error."""
    command = [arguments.python, "-m", *runner, "pytest", *arguments.tests]
    command += ["-p", "no:cacheprovider", "-q", f"--junitxml={xml}"]
    if arguments.expression:
        command += ["-k", arguments.expression]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("GRADCLIP_EXT_")
    }
    result = subprocess.run(
        command, cwd=arguments.checkout, env=environment, capture_output=True, text=True
    )
    if not xml.exists():
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return dict(map(_outcome, ElementTree.parse(xml).iter("testcase"))), result.stderr


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    outcome = next((kinds[child.tag] for child in case if child.tag in kinds), "passed")
    return f"{case.get('classname')}::{case.get('name')}", outcome


if __name__ == "__main__":
    sys.exit(main())
