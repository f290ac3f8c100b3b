"""The messages that a user reads when gradclip_ext does not match the installed torch."""

import importlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from gradclip_ext import _build_check
from gradclip_ext._build_check import BuildFacts

BUILT = BuildFacts(torch="2.13.0+cpu", cuda=None, cxx11_abi=True, python="3.11")
COMMAND = "pip install -e here"


def problem(built=BUILT, present=BUILT, has_extension=True):
    return _build_check.problem(built, present, has_extension, COMMAND)


def text(found, expected, command=COMMAND):
    return (
        "gradclip_ext cannot be loaded.\n"
        f"  found:    {found}\n"
        f"  expected: {expected}\n"
        f"  run:      {command}"
    )


def test_same_environment_is_fine():
    assert problem() is None


@pytest.mark.parametrize(
    "present",
    [
        pytest.param(BUILT._replace(torch="2.13.1+cpu"), id="patch release"),
        pytest.param(BUILT._replace(torch="2.13.0a0+git1234567"), id="source build"),
    ],
)
def test_what_does_not_matter(present):
    assert problem(present=present) is None


def test_minor_version_of_cuda_does_not_matter():
    built = BUILT._replace(torch="2.13.0+cu130", cuda="13.0")
    assert problem(built, built._replace(torch="2.13.0+cu132", cuda="13.2")) is None


@pytest.mark.parametrize(
    ("changes", "found", "expected"),
    [
        pytest.param(
            {"torch": "2.6.0"},
            "torch 2.6 (torch 2.6.0)",
            "torch 2.13 (torch 2.13.0+cpu)",
            id="torch",
        ),
        pytest.param(
            {"torch": "2.13.0+cu130", "cuda": "13.0"},
            "CUDA 13 (torch 2.13.0+cu130)",
            "no CUDA (torch 2.13.0+cpu)",
            id="CUDA",
        ),
        pytest.param(
            {"cxx11_abi": False},
            "the C++ ABI before C++11 (torch 2.13.0+cpu)",
            "the C++11 ABI (torch 2.13.0+cpu)",
            id="C++ ABI",
        ),
        pytest.param(
            {"python": "3.12"},
            "Python 3.12 (torch 2.13.0+cpu)",
            "Python 3.11 (torch 2.13.0+cpu)",
            id="Python",
        ),
        pytest.param(
            {"torch": "2.6.0+cu124", "cuda": "12.4", "cxx11_abi": False},
            "torch 2.6, CUDA 12, the C++ ABI before C++11 (torch 2.6.0+cu124)",
            "torch 2.13, no CUDA, the C++11 ABI (torch 2.13.0+cpu)",
            id="everything",
        ),
    ],
)
def test_another_environment(changes, found, expected):
    assert problem(present=BUILT._replace(**changes)) == text(found, expected)


def test_another_major_version_of_cuda():
    built = BUILT._replace(torch="2.13.0+cu126", cuda="12.6")
    present = BUILT._replace(torch="2.13.0+cu130", cuda="13.0")
    assert problem(built, present) == text(
        "CUDA 13 (torch 2.13.0+cu130)", "CUDA 12 (torch 2.13.0+cu126)"
    )


def test_no_torch():
    assert problem(present=None) == text(
        "no torch",
        "torch 2.13, as gradclip_ext was built against it",
        "pip install torch==2.13.0",
    )


@pytest.mark.parametrize("present", [BUILT, None], ids=["torch", "no torch"])
def test_not_built(present):
    assert problem(built=None, present=present, has_extension=False) == text(
        "no compiled gradclip_ext._C", "one, built against the installed torch"
    )


def test_extension_is_missing():
    assert problem(has_extension=False) == text(
        "no compiled gradclip_ext._C for this interpreter",
        "one beside gradclip_ext/_built_with.py",
    )


def test_extension_for_another_python():
    present = BUILT._replace(python="3.12")
    assert problem(present=present, has_extension=False) == text(
        "Python 3.12 (torch 2.13.0+cpu)", "Python 3.11 (torch 2.13.0+cpu)"
    )


def test_build_command_of_a_source_folder(tmp_path):
    (tmp_path / "setup.py").touch()
    assert _build_check.build_command(tmp_path) == f"pip install -e {tmp_path}"


def test_build_command_of_an_installed_package(tmp_path):
    assert _build_check.build_command(tmp_path) == (
        "pip install --force-reinstall --no-deps .    (in the source folder of gradclip_ext)"
    )


def test_build_command_of_a_folder_with_a_space(tmp_path):
    folder = tmp_path / "my code"
    folder.mkdir()
    (folder / "setup.py").touch()
    assert _build_check.build_command(folder) == f"pip install -e '{folder}'"


class TestHiddenInstall:
    """The source folder, imported in place of an installed package."""

    def package(self, folder, *files):
        (folder / "gradclip_ext").mkdir(parents=True)
        for file in files:
            (folder / "gradclip_ext" / file).touch()
        return folder

    def test_is_found(self, tmp_path):
        source = self.package(tmp_path / "source", "__init__.py")
        other_python = self.package(tmp_path / "other", "_built_with.py", "_C.cpython-27.so")
        not_built = self.package(tmp_path / "sdist", "__init__.py")
        installed = self.package(tmp_path / "site", "_built_with.py", f"_C{EXTENSION_SUFFIXES[0]}")
        paths = [str(path) for path in (source, tmp_path / "none", other_python, not_built)]
        assert _build_check.hidden_install(source, paths) is None
        paths.append(str(installed))
        assert _build_check.hidden_install(source, paths) == installed / "gradclip_ext"

    def test_is_not_the_folder_itself(self, tmp_path, monkeypatch):
        source = self.package(tmp_path, "_built_with.py", f"_C{EXTENSION_SUFFIXES[0]}")
        monkeypatch.chdir(source)
        (tmp_path / "link").symlink_to(source)
        paths = ["", ".", str(source), str(tmp_path / "link")]
        assert _build_check.hidden_install(source, paths) is None

    def test_text(self, tmp_path):
        source, site = tmp_path / "my clone", tmp_path / "site" / "gradclip_ext"
        source.mkdir()
        (source / "setup.py").touch()
        assert _build_check.hidden_problem(source, site) == text(
            f"no compiled gradclip_ext._C in '{source}/gradclip_ext', "
            f"which hides the one installed in {site}",
            f"the installed one, imported from another folder than '{source}'",
            "gradclip-ext    (in place of python -m gradclip_ext; for other programs: "
            f"pip install -e '{source}')",
        )


def test_check_passes_here():
    _build_check.check()


def test_check_raises_import_error(monkeypatch):
    monkeypatch.setattr(_build_check, "installed", lambda: BuildFacts("2.6.0", None, True, "3.11"))
    monkeypatch.setattr(_build_check, "built_with", lambda: BUILT)
    with pytest.raises(ImportError) as caught:
        _build_check.check()
    command = _build_check.build_command(Path(_build_check.__file__).resolve().parent.parent)
    assert str(caught.value) == text(
        "torch 2.6 (torch 2.6.0)", "torch 2.13 (torch 2.13.0+cpu)", command
    )
    assert caught.value.name == "gradclip_ext._C"


def test_facts_are_those_of_the_installed_torch():
    import torch

    facts = _build_check.installed()
    assert facts.torch == torch.__version__
    assert facts.cuda == torch.version.cuda
    assert facts.cxx11_abi is torch.compiled_with_cxx11_abi()


def test_facts_of_the_build_are_those_recorded():
    from gradclip_ext import _built_with

    assert _build_check.built_with() == BuildFacts(
        torch=_built_with.TORCH_VERSION,
        cuda=_built_with.TORCH_CUDA,
        cxx11_abi=_built_with.CXX11_ABI,
        python=_built_with.PYTHON,
    )


def test_missing_facts(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _build_check.installed() is None
    assert _build_check.built_with() is None
