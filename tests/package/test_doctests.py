"""Every example in the documentation runs and gives the output that it shows."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import pkgutil
from pathlib import Path

import pytest
import torch
from pages import blocks, compiled, needs_frameworks, run_blocks

import gradclip_ext

ROOT = next(
    folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file()
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Their blocks are run where the frameworks are installed; see tests/frameworks.
WITH_FRAMEWORKS = [page for page in PAGES if needs_frameworks(page)]

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
        # These need the frameworks.
        and not module.name.startswith("gradclip_ext.integrations.")
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


def each(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


@each([page for page in PAGES if page not in WITH_FRAMEWORKS])
def test_examples_of_page(page):
    with contextlib.redirect_stdout(io.StringIO()):
        for _ in run_blocks(page):
            pass


@each(WITH_FRAMEWORKS)
def test_examples_of_frameworks_are_python(page):
    for kind, line, text in blocks(page):
        assert kind == "python"
        compiled(page, line, text)


def test_pages_without_examples():
    silent = [str(page.relative_to(ROOT / "docs")) for page in PAGES[1:] if not blocks(page)]
    # Two tables of contents, and pages of figures.
    assert silent == ["README.md", "frameworks/README.md", "performance.md", "scaling.md"]


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
