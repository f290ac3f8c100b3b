"""Markdown: links between files resolve, and tables render as tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = next(
    folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file()
)
FOLDERS = ("bench", "csrc", "docs", "examples", "gradclip_ext", "tests", "tools")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md"))),
]
DOCS = sorted((ROOT / "docs").glob("*.md"))

FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *#*$", re.MULTILINE)
ROW = re.compile(r"^ *\|")
DELIMITERS = re.compile(r"^ *\|( *:?-+:? *\|)+ *$")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """The text of a page without fenced code, with the same number of lines."""
    text = page.read_text(encoding="utf-8")
    return FENCED.sub(lambda match: "\n" * match[0].count("\n"), text)


def anchors(page: Path) -> set[str]:
    """What can follow the # in a link to a page, as GitHub derives it from headings."""
    found: list[str] = []
    for heading in HEADING.findall(prose(page)):
        plain = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = found.count(plain)
        found.append(f"{plain}-{number}" if number else plain)
    return set(found)


def problem(page: Path, link: str) -> str | None:
    """What is wrong with a link between files, or None if it resolves."""
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return f"{link}: there is no such file"
    if not target.is_relative_to(ROOT):
        return f"{link}: the file is outside of the project"
    if anchor and anchor not in anchors(target):
        return f"{link}: {target.name} has no such heading"
    return None


def links(page: Path) -> list[str]:
    return [link for link in LINK.findall(prose(page)) if not re.match(r"[a-z]+:", link)]


def rows_of_tables(page: Path) -> list[list[str]]:
    """The lines of each table: consecutive lines that begin with a vertical bar."""
    tables: list[list[str]] = [[]]
    for line in prose(page).splitlines():
        if ROW.match(line):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def cells(row: str) -> int:
    return len(re.findall(r"(?<!\\)\|", row)) - 1


@each_page
def test_links_resolve(page):
    assert [problem(page, link) for link in links(page) if problem(page, link)] == []


@each_page
def test_tables_are_whole(page):
    """An empty line inside a table turns the rows after it into plain text."""
    for table in rows_of_tables(page):
        assert len(table) > 2 and DELIMITERS.match(table[1]), table[0]
        assert {cells(row) for row in table} == {cells(table[0])}


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_page_is_linked_from_readme_and_contents(page):
    def targets(source: Path) -> set[Path]:
        return {(source.parent / link.partition("#")[0]).resolve() for link in links(source)}

    assert page in targets(ROOT / "README.md")
    assert page in {*targets(ROOT / "docs" / "README.md"), ROOT / "docs" / "README.md"}


def test_broken_links_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    other = tmp_path / "other.md"
    other.write_text("# One `thing`, twice\n\n## One thing twice\n")
    page.write_text(
        "[a](other.md) [b](missing.md) [c](other.md#one-thing-twice)\n"
        "[d](other.md#one-thing-twice-1) [e](other.md#two) [f](#here) [g](https://example.org)\n"
        "```\n[h](fenced.md)\n```\n# Here\n"
    )
    assert [problem(page, link) for link in links(page) if problem(page, link)] == [
        "missing.md: there is no such file",
        "other.md#two: other.md has no such heading",
    ]


def test_broken_tables_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("| a | b |\n| --- | --- |\n| 1 | `x \\| y` |\n\n| 2 | 3 |\n")
    whole, rest = rows_of_tables(page)
    assert [cells(row) for row in whole] == [2, 2, 2]
    with pytest.raises(AssertionError):
        test_tables_are_whole(page)
    assert rest == ["| 2 | 3 |"]


SOURCES = sorted(
    path.name
    for folder, kinds in (("csrc", ".h .cpp .cuh .cu"), ("gradclip_ext", ".py"), ("bench", ".py"))
    for path in (ROOT / folder).rglob("*")
    if path.suffix in kinds.split() and path.name not in ("__init__.py", "_built_with.py")
)
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SOURCES)
def test_the_architecture_has_a_place_for_every_file(name):
    stem = name.removesuffix(".h").removesuffix(".cpp").removesuffix(".cu")
    mentions = {name, f"{stem}.cpp", f"{stem}.cu"}
    # The picture draws the kernels of all instruction sets as one.
    if stem.startswith("kernels_"):
        mentions.add("kernels_*.cpp")
    assert any(mention in ARCHITECTURE for mention in mentions)
