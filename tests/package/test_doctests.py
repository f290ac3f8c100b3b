"""Every example in the documentation runs and gives the output that it shows."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gradclip_ext

ROOT = next(
    folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file()
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(python|pycon)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# The drop-ins are documented by torch: only what is added to torch has an example.
WITH_EXAMPLES = (
    "AutoClip",
    "GradClipper",
    "adaptive_clip_grad_",
    "add_weight_decay_",
    "clip_and_step",
    "clip_grad_norm",
    "grad_clipping",
    "grad_norms",
    "patch",
    "unscale_and_clip_grad_norm_",
)


def public_modules() -> list[str]:
    names = [
        module.name
        for module in pkgutil.walk_packages(gradclip_ext.__path__, "gradclip_ext.")
        if not any(part.startswith("_") for part in module.name.split(".")[1:])
    ]
    return ["gradclip_ext", *names]


@pytest.mark.parametrize("name", public_modules())
def test_examples_of_docstrings(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch}, verbose=False)
    assert result.failed == 0


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_docstring_has_an_example(name):
    assert doctest.DocTestFinder(recurse=False).find(getattr(gradclip_ext, name))[0].examples


def test_modules_are_found():
    assert {"gradclip_ext.clipper", "gradclip_ext.functional", "gradclip_ext.textbook"} < set(
        public_modules()
    )


def blocks(page: Path) -> list[tuple[str, int, str]]:
    """The kind, the line and the text of each Python block."""
    text = page.read_text(encoding="utf-8")
    return [
        (match[1], text.count("\n", 0, match.start(2)), match[2]) for match in FENCED.finditer(text)
    ]


def run_blocks(page: Path) -> Iterator[dict[str, Any]]:
    """Runs a page from top to bottom in one namespace, which it yields after each block."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for kind, line, text in blocks(page):
        if kind == "python":
            # Preceded by empty lines, so that tracebacks name the line of the page.
            exec(compile("\n" * line + text, str(page), "exec"), names)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_of_page(page):
    with contextlib.redirect_stdout(io.StringIO()):
        for _ in run_blocks(page):
            pass


def test_pages_without_examples():
    silent = [page.name for page in PAGES[1:] if not blocks(page)]
    # A table of contents, and a page of figures.
    assert silent == ["README.md", "performance.md"]


def test_readme_clips():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        first, second, third = (dict(names) for names in run_blocks(ROOT / "README.md"))
    assert first["norm"].item() > 1.0

    report = second["clipper"].report()
    assert (report.steps, report.nonfinite_steps) == (3, 0)
    assert report.total_norm > 1.0
    assert printed.getvalue() == f"{report.as_dict()}\n"

    assert third["norm"].item() > 1.0
    gradients = [parameter.grad for parameter in third["model"].parameters()]
    assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(1.0, rel=1e-5)


def test_first_block_of_readme_updates_the_model_by_a_clipped_step():
    names = next(run_blocks(ROOT / "README.md"))
    gradients = [parameter.grad for parameter in names["model"].parameters()]
    assert sum(gradient.square().sum() for gradient in gradients).sqrt() <= 1.0001
    torch.manual_seed(0)
    initial = torch.nn.LSTM(32, 64)
    for parameter, before in zip(names["model"].parameters(), initial.parameters(), strict=True):
        assert not torch.equal(parameter, before)


def test_first_block_of_readme_is_on_the_first_screen():
    (_, line, text), *_ = blocks(ROOT / "README.md")
    assert line + text.count("\n") <= 25
