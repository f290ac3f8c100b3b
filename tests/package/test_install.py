"""Building, installing and importing in other environments, and the messages to the user.

The package is compiled once here, from its sdist; every other test stops before the compiler or
works on copies of that build.
"""

import os
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import compiled
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.install

setuptools = pytest.importorskip("setuptools")


def run(*command, **environment):
    """Runs `command` with changed environment variables (None removes one), outside ROOT."""
    merged = {**os.environ, **environment}
    return subprocess.run(
        [str(part) for part in command],
        env={name: str(value) for name, value in merged.items() if value is not None},
        capture_output=True,
        text=True,
        cwd=environment.get("HERE", "/"),
    )


def build(folder, python=sys.executable, **environment):
    """Runs setup.py's build_ext, with all its outputs in `folder`."""
    outputs = ["--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    return run(python, "setup.py", "build_ext", *outputs, HERE=ROOT, **environment)


def assert_stops(result, *lines):
    """The build or import fails with `lines` in its message; a build shows no traceback."""
    assert result.returncode != 0
    for line in lines:
        assert line in result.stderr


def write_torch(folder, version=torch.__version__):
    """Writes a fake torch with what is read before anything is compiled or loaded."""
    package = folder / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        f"__version__ = '{version}'\n"
        f"class version: cuda = {torch.version.cuda!r}\n"
        f"def compiled_with_cxx11_abi(): return {torch.compiled_with_cxx11_abi()}\n"
    )
    return folder


@pytest.fixture(scope="module")
def only_setuptools(tmp_path_factory):
    """A folder for PYTHONPATH with setuptools only, like an isolated build environment."""
    folder = tmp_path_factory.mktemp("only-setuptools")
    site_packages = Path(setuptools.__file__).parent.parent
    # With its metadata: older versions read their own entry points.
    for pattern in ("setuptools", "setuptools-*", "pkg_resources", "_distutils_hack"):
        for part in site_packages.glob(pattern):
            (folder / part.name).symlink_to(part)
    return folder


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """The interpreter of an environment without any packages."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that `pip install --target` fills from the sdist, built without isolation."""
    pytest.importorskip("pip")
    with compiled.shared_folder(tmp_path_factory, "installed") as (folder, is_new):
        if is_new:
            install(folder)
    return folder / "site"


def install(folder):
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "_built_with.py")
    shutil.copytree(ROOT, tree, ignore=ignored)
    result = run(sys.executable, "setup.py", "-q", "sdist", HERE=tree)
    assert result.returncode == 0, result.stderr
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--target", folder / "site"]
    # Under the name of a compiler that torch knows.
    compiler = folder / "g++"
    command = shlex.join([sys.executable, str(ROOT / "tests" / "cached_compiler.py")])
    real = shlex.quote(compiled.compiler())
    compiler.write_text(f'#!/bin/sh\nCXX={real} exec {command} "$@"\n')
    compiler.chmod(0o755)
    result = run(sys.executable, "-m", "pip", "install", *options, sdist, CXX=compiler)
    assert result.returncode == 0, result.stdout + result.stderr


class TestBuildMessages:
    def test_torch_absent(self, tmp_path, bare_python, only_setuptools):
        result = build(tmp_path, bare_python, PYTHONPATH=only_setuptools)
        assert_stops(
            result,
            f"error: torch was not found by {bare_python}.",
            "pip install torch\n",
            " pip install --no-build-isolation .\n",
            "uv pip install --no-build-isolation .\n",
        )
        assert "Traceback" not in result.stderr

    def test_torch_too_old(self, tmp_path, only_setuptools, bare_python):
        torch = write_torch(tmp_path / "site", "2.5.1")
        result = build(tmp_path, bare_python, PYTHONPATH=f"{only_setuptools}:{torch}")
        assert_stops(
            result,
            "error: torch 2.5.1 is installed, gradclip_ext needs 2.6 or later.\n"
            "Run: pip install --upgrade 'torch>=2.6'\n",
        )
        assert "Traceback" not in result.stderr

    def test_torch_broken(self, tmp_path, only_setuptools, bare_python):
        torch = write_torch(tmp_path / "site", "2.13.0")
        (torch / "torch" / "__init__.py").write_text("import no_such_module\n")
        result = build(tmp_path, bare_python, PYTHONPATH=f"{only_setuptools}:{torch}")
        assert_stops(
            result,
            "error: torch is installed but cannot be imported: No module named 'no_such_module'\n",
            f"{bare_python} -c 'import torch'\n",
        )
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize(
        "environment",
        [
            pytest.param({"CXX": "/nonexistent/g++"}, id="CXX names no file"),
            pytest.param({"CXX": None, "PATH": "/nonexistent"}, id="none on PATH"),
        ],
    )
    def test_compiler_absent(self, tmp_path, environment):
        result = build(tmp_path, **environment)
        compiler = environment["CXX"] or "c++"
        assert_stops(
            result,
            f"error: no working C++ compiler: {compiler} cannot be run",
            "apt install g++",
            "CXX=/path/to/g++",
        )
        assert "Traceback" not in result.stderr

    @pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
    def test_cuda_without_a_torch_for_it(self, tmp_path):
        result = build(tmp_path, GRADCLIP_CUDA="1")
        assert_stops(
            result,
            "error: GRADCLIP_CUDA=1 asks for the CUDA engine, but torch "
            f"{torch.__version__} is built without CUDA.\n",
            "or run: unset GRADCLIP_CUDA\n",
        )
        assert "Traceback" not in result.stderr

    def test_cuda_choice_is_invalid(self, tmp_path):
        result = build(tmp_path, GRADCLIP_CUDA="yes")
        assert_stops(result, "error: GRADCLIP_CUDA must be 0, 1 or unset, found 'yes'.\n")
        assert "Traceback" not in result.stderr


def test_torch_is_found_behind_build_isolation(only_setuptools):
    # -S leaves out site-packages, as pip's isolation does, for this process only.
    code = "import build_support; print(build_support.import_torch().__file__)"
    path = f"{only_setuptools}:{ROOT / 'tools'}"
    result = run(sys.executable, "-S", "-c", code, PYTHONPATH=path, PYTHONNOUSERSITE="1")
    assert result.stdout == f"{torch.__file__}\n", result.stderr


class TestInstalled:
    def test_files(self, installed):
        names = {path.name for path in (installed / "gradclip_ext").iterdir()}
        assert {"py.typed", "_C.pyi", "_built_with.py"} <= names
        # What torch calls is outside of the package, see there.
        assert (installed / "gradclip_ext_autoload.py").is_file()
        (registered,) = installed.glob("gradclip_ext-*.dist-info/entry_points.txt")
        assert "[torch.backends]\ngradclip_ext = gradclip_ext_autoload:load\n" in (
            registered.read_text(encoding="utf-8")
        )
        assert not (installed / "csrc").exists()

    def test_works(self, installed):
        code = """if True:
            import gradclip_ext, torch
            parameter = torch.nn.Parameter(torch.zeros(2))
            parameter.grad = torch.tensor([3.0, 4.0])
            norm = gradclip_ext.clip_grad_norm_([parameter], 10.0)
            print(norm.item(), gradclip_ext.__file__)
        """
        result = run(sys.executable, "-c", code, PYTHONPATH=installed)
        assert result.stdout == f"5.0 {installed}/gradclip_ext/__init__.py\n", result.stderr

    @pytest.fixture
    def clone(self, tmp_path):
        """The folder that `pip install .` was run in: sources, and nothing compiled."""
        ignored = shutil.ignore_patterns("*.so", "_built_with.py", "__pycache__")
        folder = tmp_path / "the clone"
        shutil.copytree(ROOT / "gradclip_ext", folder / "gradclip_ext", ignore=ignored)
        shutil.copy(ROOT / "setup.py", folder)
        return folder

    def test_next_line_of_the_readme_works_in_the_clone(self, installed, clone):
        for page in ("README.md", "docs/install.md"):
            lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
            commands = [line.partition(" ")[0] for line in lines[lines.index("pip install .") :]]
            assert "gradclip-ext" in commands
        script = installed / "bin" / "gradclip-ext"
        result = run(script, HERE=clone, PYTHONPATH=installed)
        assert result.returncode == 0, result.stderr
        assert f"  from             {installed}/gradclip_ext\n" in result.stdout
        assert "checks passed." in result.stdout

    def test_module_of_the_clone_says_what_to_run(self, installed, clone, bare_python):
        # Without packages, because the finder of an editable install would find the lost file.
        result = run(bare_python, "-m", "gradclip_ext", HERE=clone, PYTHONPATH=installed)
        assert_stops(
            result,
            f"  found:    no compiled gradclip_ext._C in '{clone}/gradclip_ext', "
            f"which hides the one installed in {installed}/gradclip_ext\n",
            "  run:      gradclip-ext ",
        )

    def test_brings_no_second_openmp_library(self, installed):
        (extension,) = (installed / "gradclip_ext").glob("_C.*.so")
        result = run("readelf", "--dynamic", extension)
        assert "libtorch_cpu.so" in result.stdout
        assert "omp" not in result.stdout

    def test_torch_replaced(self, installed, tmp_path):
        other = write_torch(tmp_path, "2.99.0")
        result = run(sys.executable, "-c", "import gradclip_ext", PYTHONPATH=f"{other}:{installed}")
        major_minor = ".".join(torch.__version__.split(".")[:2])
        assert_stops(
            result,
            "ImportError: gradclip_ext cannot be loaded.\n  found:    torch 2.99",
            f"  expected: torch {major_minor}",
            "  run:      pip install --force-reinstall --no-deps .",
        )

    def test_torch_removed(self, installed, bare_python):
        result = run(bare_python, "-c", "import gradclip_ext", PYTHONPATH=installed)
        assert_stops(result, "  found:    no torch\n", "  run:      pip install torch==")

    @pytest.mark.parametrize("missing", ["_C.*.so", "_built_with.py"])
    def test_not_built(self, installed, tmp_path, bare_python, missing):
        shutil.copytree(installed / "gradclip_ext", tmp_path / "gradclip_ext")
        (file,) = (tmp_path / "gradclip_ext").glob(missing)
        file.unlink()
        write_torch(tmp_path)
        # Without packages, because the finder of an editable install would find the missing file.
        result = run(bare_python, "-c", "import gradclip_ext", PYTHONPATH=tmp_path)
        assert_stops(result, "  found:    no compiled gradclip_ext._C", "  run:      pip install")
