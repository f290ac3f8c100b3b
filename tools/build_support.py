"""The build_ext command of setup.py: finds the installed torch and compiles against it.

setup.py runs three times in a build (requirements, metadata, build itself), and the first two must
work without torch. So torch is imported only when the extension is compiled.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

MINIMUM_TORCH = (2, 6)

_LIST_PATHS_OF_TORCH = """
import importlib.util, json, sys
sys.path = [path for path in sys.path if path]
print(json.dumps(sys.path if importlib.util.find_spec("torch") else []))
"""

_NO_TORCH = """\
torch was not found by {python}.
gradclip_ext is compiled against the torch that is already installed, and never fetches one.
  without torch:                 pip install torch
  torch hidden by the build:     pip install setuptools ninja
                                 pip install --no-build-isolation .
  the same with uv:              uv pip install setuptools ninja
                                 uv pip install --no-build-isolation ."""


def _paths_of_installed_torch() -> list[str]:
    """Asks the interpreter that torch is installed for, outside of pip's build isolation.

    Isolation is made of environment variables, so the same interpreter without them sees torch in
    a virtual environment, in a user site and through --system-site-packages alike.
    """
    hiding = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environment = {name: value for name, value in os.environ.items() if name not in hiding}
    answer = subprocess.run(
        [sys.executable, "-c", _LIST_PATHS_OF_TORCH],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    paths: list[str] = json.loads(answer.stdout)
    return paths


def import_torch() -> ModuleType:
    """Returns the installed torch, or raises SetupError that says how to get one."""
    if importlib.util.find_spec("torch") is None:
        # Appended: what the build environment brings along itself keeps its precedence.
        sys.path += [path for path in _paths_of_installed_torch() if path not in sys.path]
    if importlib.util.find_spec("torch") is None:
        raise SetupError(_NO_TORCH.format(python=sys.executable))
    try:
        import torch
    except (ImportError, OSError) as error:
        raise SetupError(
            f"torch is installed but cannot be imported: {error}\n"
            f"Run this and mend what it reports: {sys.executable} -c 'import torch'"
        ) from error
    check_torch_version(torch.__version__)
    return torch


def check_torch_version(version: str) -> None:
    """Raises SetupError if `version` is older than gradclip_ext supports."""
    major, minor = re.match(r"(\d+)\.(\d+)", version).groups()
    if (int(major), int(minor)) < MINIMUM_TORCH:
        minimum = ".".join(map(str, MINIMUM_TORCH))
        raise SetupError(
            f"torch {version} is installed, gradclip_ext needs {minimum} or later.\n"
            f"Run: pip install --upgrade 'torch>={minimum}'"
        )


def decide_engines(choice: str) -> str:
    """Returns which engines are built, as a line to print; `choice` is GRADCLIP_CUDA's value."""
    if choice not in ("", "0", "1"):
        raise SetupError(f"GRADCLIP_CUDA must be 0, 1 or unset, found {choice!r}.")
    if choice == "1":
        raise SetupError(
            "GRADCLIP_CUDA=1 asks for the CUDA engine, which this version does not have yet.\n"
            "Run: unset GRADCLIP_CUDA"
        )
    return "CPU only (this version has no CUDA engine yet)"


def compiler_version(command: list[str]) -> str:
    """Returns the first line of the compiler's --version, or raises SetupError without one."""
    try:
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(
            f"no working C++ compiler: {shlex.join(command)} cannot be run ({error}).\n"
            "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
            "conda: conda install gxx),\n"
            "or name one that you have: CXX=/path/to/g++"
        ) from error
    return answer.stdout.partition("\n")[0]


def check_python_headers(folder: str) -> None:
    """Raises SetupError if `folder` lacks Python.h, which Linux distributions package apart."""
    if not Path(folder, "Python.h").is_file():
        raise SetupError(
            f"the headers of Python are missing: no Python.h in {folder}.\n"
            "Install them (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install "
            "python3-devel)"
        )


def pybind11_include(torch_include: list[str]) -> list[str]:
    """Returns the include path of the pybind11 package if torch brings no pybind11 headers.

    torch's own are preferred, since the torch headers that we include were written for them. A
    torch that was built with USE_SYSTEM_PYBIND11 (as some distributions do) has none.
    """
    if any(Path(folder, "pybind11").is_dir() for folder in torch_include):
        return []
    try:
        import pybind11
    except ImportError as error:
        raise SetupError(
            "this torch was installed without its pybind11 headers.\nRun: pip install pybind11"
        ) from error
    return [pybind11.get_include()]


def built_with_source(torch: ModuleType, compiler: str) -> str:
    """Returns the text of gradclip_ext/_built_with.py."""
    facts = {
        "TORCH_VERSION": str(torch.__version__),
        "TORCH_CUDA": torch.version.cuda,
        "CXX11_ABI": torch.compiled_with_cxx11_abi(),
        "PYTHON": sysconfig.get_python_version(),
        "COMPILER": compiler,
    }
    lines = [f"{name} = {value!r}\n" for name, value in facts.items()]
    return "".join(['"""What gradclip_ext._C was built with; written by the build."""\n\n', *lines])


class BuildExt(build_ext):
    """Delegates to torch's BuildExtension, which does not exist before torch is imported."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:
            # setuptools gives editable builds a fresh folder each time, and all files would be
            # compiled again. This is the folder of every other build.
            self.build_temp = str(
                Path("build", f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
            )

    def build_extensions(self) -> None:
        engines = decide_engines(os.environ.get("GRADCLIP_CUDA", ""))
        torch = import_torch()
        # torch compiles with CXX (or c++), setuptools links with the C++ compiler of Python.
        compiler = compiler_version(shlex.split(os.environ.get("CXX", "c++")))
        compiler_version(self.compiler.compiler_cxx)
        check_python_headers(sysconfig.get_path("include"))
        if shutil.which("ninja") is None:
            # Installed beside an interpreter whose environment has not been activated.
            os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
        print(
            f"gradclip_ext: {engines}; torch {torch.__version__} in {Path(torch.__file__).parent}; "
            f"{compiler}",
            flush=True,
        )

        from torch.utils import cpp_extension

        # Objects built against one torch must not be linked for another, and ninja does not tell:
        # it ignores system headers, and installers may keep the old time stamps of packaged files.
        self.build_temp = str(Path(self.build_temp, f"torch-{torch.__version__}"))
        for extension in self.extensions:
            settings = cpp_extension.CppExtension(extension.name, extension.sources)
            # As system headers, so that -Wall -Wextra speak of our code only.
            headers = settings.include_dirs + pybind11_include(settings.include_dirs)
            extension.extra_compile_args += [f"-isystem{folder}" for folder in headers]
            extension.library_dirs += settings.library_dirs
            extension.libraries += settings.libraries

        command = cpp_extension.BuildExtension(self.distribution)
        vars(command).update(vars(self))
        # With ninja, it is ninja that knows what is up to date.
        command.force = self.force or command.use_ninja
        try:
            command.build_extensions()
        except RuntimeError as error:
            raise CompileError("compilation failed, see the compiler's messages above") from error

        target = Path(self._built_with_in_build_lib())
        target.write_text(built_with_source(torch, compiler), encoding="utf-8")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        built = self._built_with_in_build_lib()
        shutil.copyfile(built, self._built_with_in_source())

    def get_outputs(self) -> list[str]:
        return sorted({*super().get_outputs(), self._built_with_in_build_lib()})

    def get_output_mapping(self) -> dict[str, str]:
        mapping = super().get_output_mapping()
        if self.inplace:
            mapping[self._built_with_in_build_lib()] = self._built_with_in_source()
        return mapping

    def _built_with_in_build_lib(self) -> str:
        return str(Path(self.build_lib, "gradclip_ext", "_built_with.py"))

    def _built_with_in_source(self) -> str:
        build_py = self.get_finalized_command("build_py")
        return str(Path(build_py.get_package_dir("gradclip_ext"), "_built_with.py"))
