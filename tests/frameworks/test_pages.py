"""The examples of the pages for frameworks."""

from __future__ import annotations

import contextlib
import io

import pages
import pytest
import suites

DOCS = suites.TESTS.parent / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if pages.needs_frameworks(page)]


def test_pages_are_found():
    assert [page.stem for page in PAGES] == ["accelerate", "lightning", "timm", "transformers"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_page(page):
    with contextlib.redirect_stdout(io.StringIO()):
        for _ in pages.run_blocks(page):
            pass
