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

from find_cuda import NVCC_OPTIONS, Toolkit, architecture_list, find_toolkit, jobs
from setuptools import Extension
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
    """Asks this interpreter where torch is installed, outside pip's build isolation.

    Isolation consists of environment variables, so without them the same interpreter finds torch in
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
    """Returns the installed torch, or raises a SetupError that says how to get one."""
    if importlib.util.find_spec("torch") is None:
        # Appended, so that the build environment's own packages keep precedence.
        sys.path += [path for path in _paths_of_installed_torch() if path not in sys.path]
    if importlib.util.find_spec("torch") is None:
        raise SetupError(_NO_TORCH.format(python=sys.executable))
    # What is registered to be loaded with torch need not be found behind build isolation, as that
    # of an editable gradclip_ext is not, and torch could not be imported then.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    try:
        import torch
    except (ImportError, OSError) as error:
        raise SetupError(
            f"torch is installed but cannot be imported: {error}\n"
            f"Run this and fix what it reports: {sys.executable} -c 'import torch'"
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


def decide_engines(torch: ModuleType, guess: str | None = None) -> tuple[Toolkit | None, str]:
    """Returns the toolkit to build the CUDA engine with (None: CPU only), and the reason.

    A toolkit and a torch with CUDA decide, never a GPU: a machine that builds wheels need not have
    one. GRADCLIP_CUDA=0 or 1 forces it. `guess` is where torch expects the toolkit.
    """
    choice = os.environ.get("GRADCLIP_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SetupError(f"GRADCLIP_CUDA must be 0, 1 or unset, found {choice!r}.")
    if choice == "0":
        return None, "CPU only (GRADCLIP_CUDA=0)"
    cuda = torch.version.cuda
    if cuda is None:
        if choice == "1":
            raise SetupError(
                f"GRADCLIP_CUDA=1 asks for the CUDA engine, but torch {torch.__version__} is built "
                "without CUDA.\n"
                "Install a torch with CUDA (https://pytorch.org/get-started), or run: "
                "unset GRADCLIP_CUDA"
            )
        return None, f"CPU only (torch {torch.__version__} is built without CUDA)"
    major = cuda.partition(".")[0]
    toolkit, where = find_toolkit(guess, major)
    if toolkit is None:
        if choice == "1":
            raise SetupError(
                f"GRADCLIP_CUDA=1 asks for the CUDA engine, but {where}.\n"
                f"Install the toolkit of CUDA {major} and name its folder: "
                "CUDA_HOME=/path/to/cuda\n"
                "or build for the CPU only: GRADCLIP_CUDA=0"
            )
        return None, f"CPU only ({where})"
    if toolkit.major != major:
        raise SetupError(
            f"the CUDA toolkit in {toolkit.home} is of version {toolkit.version}, but torch "
            f"{torch.__version__} is built for CUDA {cuda}.\n"
            f"The major versions have to agree. Name a toolkit of CUDA {major}: "
            "CUDA_HOME=/path/to/cuda\n"
            "or build for the CPU only: GRADCLIP_CUDA=0"
        )
    return toolkit, f"CPU and CUDA ({where})"


def architecture_flags(torch: ModuleType, toolkit: Toolkit, cpp_extension: ModuleType) -> list[str]:
    """Returns nvcc's options for TORCH_CUDA_ARCH_LIST, by default torch's own architectures."""
    codes = toolkit.codes()
    try:
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            # torch's own default is the GPUs of this machine, which may have none.
            flags = torch._C._cuda_getArchFlags() or ""
            os.environ["TORCH_CUDA_ARCH_LIST"] = architecture_list(flags, codes)
        options: list[str] = cpp_extension._get_cuda_arch_flags()
    except (ValueError, IndexError) as error:
        # What `native` raises when torch sees no GPU.
        reason = "torch sees no card here" if isinstance(error, IndexError) else error
        raise SetupError(
            f"no architectures to compile for: {reason}.\n"
            f"TORCH_CUDA_ARCH_LIST is {os.environ.get('TORCH_CUDA_ARCH_LIST', '')!r}; set it to "
            "what you have, such as TORCH_CUDA_ARCH_LIST='8.0;9.0+PTX'"
        ) from error
    unsupported = [
        code
        for code in built_codes(options)
        # sm_90a and compute_90 need an nvcc that knows sm_90, for example.
        if f"sm_{re.sub('[^0-9]', '', code)}" not in codes
    ]
    if unsupported:
        raise SetupError(
            f"nvcc {toolkit.version} in {toolkit.home} cannot compile for "
            f"{', '.join(unsupported)}, only for {', '.join(sorted(codes, key=_number))}.\n"
            "Change TORCH_CUDA_ARCH_LIST, or name another toolkit: CUDA_HOME=/path/to/cuda"
        )
    return options


def built_codes(options: list[str]) -> tuple[str, ...]:
    """Returns the codes in nvcc's options: sm_90 is machine code, compute_90 is PTX."""
    codes = re.findall(r"\bcode=(\w+)", " ".join(options))
    return tuple(sorted(codes, key=lambda code: (code.startswith("compute"), _number(code))))


def _number(code: str) -> int:
    return int(re.sub("[^0-9]", "", code))


def is_cuda_source(path: str) -> bool:
    """Whether a file is left out of a build without the CUDA engine."""
    file = Path(path)
    return file.parent.name == "cuda" or file.name.startswith("cuda_")


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
    """Raises SetupError if `folder` lacks Python.h, a separate package on Linux distributions."""
    if not Path(folder, "Python.h").is_file():
        raise SetupError(
            f"the headers of Python are missing: no Python.h in {folder}.\n"
            "Install them (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install "
            "python3-devel)"
        )


def pybind11_include(torch_include: list[str]) -> list[str]:
    """Returns the include path of the pybind11 package if torch brings no pybind11 headers.

    torch's own are preferred, since the torch headers that we include were written for them. A
    torch built with USE_SYSTEM_PYBIND11, as some distributions do, has none.
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


def built_with_source(
    torch: ModuleType, compiler: str, engines: str, toolkit: Toolkit | None, codes: tuple[str, ...]
) -> str:
    """Returns the text of gradclip_ext/_built_with.py."""
    facts = {
        "TORCH_VERSION: str": str(torch.__version__),
        "TORCH_CUDA: str | None": torch.version.cuda,
        "CXX11_ABI: bool": torch.compiled_with_cxx11_abi(),
        "PYTHON: str": sysconfig.get_python_version(),
        "COMPILER: str": compiler,
        "ENGINES: str": engines,
        "CUDA: str | None": toolkit.version if toolkit is not None else None,
        "CUDA_CODES: tuple[str, ...]": codes,
    }
    lines = [f"{name} = {value!r}\n" for name, value in facts.items()]
    return "".join(['"""What gradclip_ext._C was built with; written by the build."""\n\n', *lines])


def prepare_for_cpu(extension: Extension, cpp_extension: ModuleType) -> None:
    """Prepares `extension` for torch's build command, without the CUDA engine."""
    extension.sources = [path for path in extension.sources if not is_cuda_source(path)]
    settings = cpp_extension.CppExtension(extension.name, extension.sources)
    extension.extra_compile_args += _as_system_headers(settings.include_dirs)
    extension.library_dirs += settings.library_dirs
    extension.libraries += settings.libraries


def prepare_for_cuda(
    extension: Extension, cpp_extension: ModuleType, toolkit: Toolkit, options: list[str]
) -> None:
    """Prepares `extension` for torch's build command, with the CUDA engine."""
    settings = cpp_extension.CUDAExtension(extension.name, extension.sources)
    headers = [folder for folder in settings.include_dirs if Path(folder) != toolkit.include]
    if toolkit.include != Path("/usr/include"):
        headers.append(str(toolkit.include))
    threads = min(len(options), jobs())
    extension.extra_compile_args = {
        "cxx": extension.extra_compile_args + _as_system_headers(headers),
        # The architectures are given here, since torch adds none if it finds the letters "arch" in
        # any other option, even in the name of a folder.
        "nvcc": [
            *NVCC_OPTIONS,
            "-Xcompiler=-fvisibility=hidden",
            f"--threads={threads}",
            *options,
        ],
    }
    extension.define_macros.append(("GRADCLIP_WITH_CUDA", "1"))
    if os.environ.get("GRADCLIP_TUNING") == "1":
        extension.define_macros.append(("GRADCLIP_TUNING", "1"))
    extension.library_dirs += settings.library_dirs
    extension.libraries += settings.libraries


def _as_system_headers(folders: list[str]) -> list[str]:
    """Returns -isystem options, so that -Wall -Wextra warn about our code only."""
    return [f"-isystem{folder}" for folder in folders + pybind11_include(folders)]


def _text_of(error: RuntimeError) -> str:
    """Returns the message of torch's error; some are passed as a format string and arguments."""
    return " ".join(map(str, error.args))


class BuildExt(build_ext):
    """Delegates to torch's BuildExtension, which does not exist before torch is imported."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:
            # setuptools gives each editable build a fresh folder, so that every file would be
            # compiled again. This is the folder of all other builds.
            self.build_temp = str(
                Path("build", f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
            )

    def build_extensions(self) -> None:
        torch = import_torch()
        from torch.utils import cpp_extension

        toolkit, engines = decide_engines(torch, cpp_extension.CUDA_HOME)
        # torch compiles with CXX (or c++), setuptools links with the C++ compiler of Python.
        compiler = compiler_version(shlex.split(os.environ.get("CXX", "c++")))
        compiler_version(self.compiler.compiler_cxx)
        check_python_headers(sysconfig.get_path("include"))
        if shutil.which("ninja") is None:
            # ninja may be installed in this interpreter's environment without it being active.
            os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")

        options: list[str] = []
        if toolkit is not None:
            # Here torch looks for nvcc and the headers, whatever it guessed before.
            cpp_extension.CUDA_HOME = str(toolkit.home)
            options = architecture_flags(torch, toolkit, cpp_extension)
        codes = built_codes(options)
        print(
            f"gradclip_ext: {' '.join([engines, *codes])}; torch {torch.__version__} in "
            f"{Path(torch.__file__).parent}; {compiler}",
            flush=True,
        )
        for extension in self.extensions:
            if toolkit is None:
                prepare_for_cpu(extension, cpp_extension)
            else:
                prepare_for_cuda(extension, cpp_extension, toolkit, options)
        # Objects built against one torch must not be linked for another, nor those with the CUDA
        # engine into a build without it. ninja does not notice: it ignores system headers, and
        # installers may preserve the old timestamps of packaged files.
        engine = "cpu" if toolkit is None else f"cuda-{toolkit.version}"
        self.build_temp = str(Path(self.build_temp, f"torch-{torch.__version__}-{engine}"))

        command = cpp_extension.BuildExtension(self.distribution)
        vars(command).update(vars(self))
        # With ninja, ninja decides what is up to date.
        command.force = self.force or command.use_ninja
        try:
            command.build_extensions()
        except RuntimeError as error:
            # torch also rejects a compiler this way, before it has printed anything.
            raise CompileError(
                f"compilation failed, see the messages above: {_text_of(error)}"
            ) from error

        target = Path(self._built_with_in_build_lib())
        target.write_text(
            built_with_source(torch, compiler, engines, toolkit, codes), encoding="utf-8"
        )

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
