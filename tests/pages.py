"""The Python blocks of a page of documentation, and how to run them."""

from __future__ import annotations

import doctest
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FENCED = re.compile(r"^```(python|pycon)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# A comment that no reader sees, on a page whose blocks need the packages of `make frameworks`.
WITH_FRAMEWORKS = "<!-- run by: make frameworks -->"


def blocks(page: Path) -> list[tuple[str, int, str]]:
    """The kind, the line and the text of each Python block."""
    text = page.read_text(encoding="utf-8")
    return [
        (match[1], text.count("\n", 0, match.start(2)), match[2]) for match in FENCED.finditer(text)
    ]


def needs_frameworks(page: Path) -> bool:
    return WITH_FRAMEWORKS in page.read_text(encoding="utf-8")


def compiled(page: Path, line: int, text: str) -> Any:
    # Preceded by empty lines, so that tracebacks name the line of the page.
    return compile("\n" * line + text, str(page), "exec")


def run_blocks(page: Path) -> Iterator[dict[str, Any]]:
    """Runs a page from top to bottom in one namespace, which it yields after each block."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for kind, line, text in blocks(page):
        if kind == "python":
            exec(compiled(page, line, text), names)
        else:
            run_session(page, line, text, names)
        yield names


def run_session(page: Path, line: int, text: str, names: dict[str, Any]) -> None:
    """Runs an interactive session and compares each output."""
    example = doctest.DocTestParser().get_doctest(text, names, page.name, str(page), line)
    assert example.examples
    report = io.StringIO()
    # DocTest copies the names; what a session defines has to reach later blocks.
    example.globs = names
    result = doctest.DocTestRunner(verbose=False).run(example, out=report.write, clear_globs=False)
    assert result.failed == 0, report.getvalue()
