"""Which engines setup.py builds, with which toolkit and for which GPUs; the toolkits are fakes."""

import inspect
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

pytest.importorskip("setuptools")
from setuptools.errors import SetupError

TOOLS = Path(__file__).resolve().parents[2] / "tools"

with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [str(TOOLS), *sys.path])
    import build_support
    import find_cuda

CODES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def write_toolkit(home, version="13.0", headers="include", codes=CODES):
    """Writes a folder that behaves like a CUDA toolkit."""
    write_program(
        home / "bin" / "nvcc",
        'case "$1" in\n'
        f'  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;\n'
        f'  --list-gpu-code) printf "%s\\n" {" ".join(codes)} ;;\n'
        f'  --dryrun) echo "#\\$ TOP={home}/bin/.." >&2 ;;\n'
        "esac",
    )
    if headers is not None:
        (home / headers).mkdir(parents=True)
        (home / headers / "cuda_runtime.h").touch()
    return home


def torch_with(cuda, flags="sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120"):
    local = "cpu" if cuda is None else f"cu{cuda.replace('.', '')}"
    return SimpleNamespace(
        __version__=f"2.14.1+{local}",
        version=SimpleNamespace(cuda=cuda),
        _C=SimpleNamespace(_cuda_getArchFlags=lambda: flags),
    )


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine without a toolkit and with an empty PATH."""
    for name in ("CUDA_HOME", "CUDA_PATH", "GRADCLIP_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        # Set first, so that what the code under test sets is undone as well.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(find_cuda, "DEFAULT_HOME", tmp_path / "none")
    monkeypatch.setenv("PATH", "")
    return tmp_path


def found(**arguments):
    toolkit, _ = find_cuda.find_toolkit(**arguments)
    return toolkit


class TestFindToolkit:
    def test_none(self):
        assert find_cuda.find_toolkit() == (
            None,
            "no CUDA toolkit was found: no nvcc on PATH, CUDA_HOME is not set",
        )

    @pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
    def test_named(self, machine, monkeypatch, name):
        home = write_toolkit(machine / "named")
        monkeypatch.setenv(name, str(home))
        toolkit, line = find_cuda.find_toolkit()
        assert toolkit == (home, home / "include", "13.0")
        assert line == f"CUDA toolkit 13.0 in {home}"

    def test_named_without_headers(self, machine, monkeypatch):
        """It is not silently replaced by another toolkit."""
        home = write_toolkit(machine / "named", headers=None)
        write_toolkit(machine / "guess")
        monkeypatch.setenv("CUDA_HOME", str(home))
        assert find_cuda.find_toolkit(guess=str(machine / "guess")) == (
            None,
            f"no CUDA toolkit was found: {home} has no include/cuda_runtime.h",
        )

    @pytest.mark.parametrize("exists", [True, False])
    def test_named_without_nvcc(self, machine, monkeypatch, exists):
        home = machine / "named"
        if exists:
            home.mkdir()
        monkeypatch.setenv("CUDA_HOME", str(home))
        assert find_cuda.find_toolkit()[1] == (f"no CUDA toolkit was found: {home} has no bin/nvcc")

    def test_nvcc_that_cannot_be_run(self, machine, monkeypatch):
        home = write_toolkit(machine / "named")
        (home / "bin" / "nvcc").chmod(0o644)
        monkeypatch.setenv("CUDA_HOME", str(home))
        assert find_cuda.find_toolkit()[1] == (
            f"no CUDA toolkit was found: {home} has no bin/nvcc that works"
        )

    def test_nvcc_on_path(self, machine, monkeypatch):
        home = write_toolkit(machine / "toolkit")
        monkeypatch.setenv("PATH", str(home / "bin"))
        assert found().home == home

    def test_link_to_nvcc_on_path(self, machine, monkeypatch):
        home = write_toolkit(machine / "toolkit")
        (machine / "bin").mkdir()
        (machine / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
        monkeypatch.setenv("PATH", str(machine / "bin"))
        assert found().home == home

    def test_wrapper_beside_the_toolkit(self, machine, monkeypatch):
        """The folder of nvcc, which torch takes for the toolkit's, has no headers."""
        home = write_toolkit(machine / "prefix" / "cuda")
        # It answers no query, so only its location tells.
        write_program(machine / "prefix" / "bin" / "nvcc", "exit 1")
        monkeypatch.setenv("PATH", str(machine / "prefix" / "bin"))
        assert found(guess=str(machine / "prefix")).home == home

    def test_wrapper_elsewhere(self, machine, monkeypatch):
        home = write_toolkit(machine / "opt" / "cuda-13.0")
        write_program(machine / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
        monkeypatch.setenv("PATH", str(machine / "bin"))
        assert found().home == home

    def test_guess_of_torch(self, machine):
        home = write_toolkit(machine / "guess")
        assert found(guess=str(home)).home == home

    def test_default_of_the_installer(self, machine, monkeypatch):
        home = write_toolkit(machine / "default")
        monkeypatch.setattr(find_cuda, "DEFAULT_HOME", home)
        assert found().home == home

    def test_headers_of_a_target(self, machine, monkeypatch):
        monkeypatch.setattr(find_cuda.platform, "machine", lambda: "aarch64")
        home = write_toolkit(machine / "conda", headers="targets/sbsa-linux/include")
        assert found(guess=str(home)).include == home / "targets/sbsa-linux/include"

    def test_the_wanted_version_among_several(self, machine, monkeypatch):
        monkeypatch.setenv("PATH", str(write_toolkit(machine / "first", "12.8") / "bin"))
        guess = str(write_toolkit(machine / "second", "13.1"))
        assert found(guess=guess, major="13").version == "13.1"
        assert found(guess=guess, major="12").version == "12.8"
        assert found(guess=guess, major="11").version == "12.8"


class TestDecision:
    def decide(self, cuda, guess=None):
        return build_support.decide_engines(torch_with(cuda), guess)

    def stops(self, cuda, guess=None):
        with pytest.raises(SetupError) as caught:
            self.decide(cuda, guess)
        return str(caught.value)

    @pytest.mark.parametrize("choice", ["", "1"])
    def test_cuda(self, machine, monkeypatch, choice):
        monkeypatch.setenv("GRADCLIP_CUDA", choice)
        home = write_toolkit(machine / "cuda")
        toolkit, line = self.decide("13.0", str(home))
        assert toolkit.home == home
        assert line == f"CPU and CUDA (CUDA toolkit 13.0 in {home})"

    def test_minor_version_does_not_matter(self, machine):
        home = write_toolkit(machine / "cuda", "13.2")
        assert self.decide("13.0", str(home))[0].version == "13.2"

    @pytest.mark.parametrize("choice", ["", "1"])
    def test_major_version_does(self, machine, monkeypatch, choice):
        monkeypatch.setenv("GRADCLIP_CUDA", choice)
        home = write_toolkit(machine / "cuda", "12.8")
        assert self.stops("13.0", str(home)) == (
            f"the CUDA toolkit in {home} is of version 12.8, but torch 2.14.1+cu130 is built for "
            "CUDA 13.0.\n"
            "The major versions have to agree. Name a toolkit of CUDA 13: "
            "CUDA_HOME=/path/to/cuda\n"
            "or build for the CPU only: GRADCLIP_CUDA=0"
        )

    def test_no_toolkit(self):
        assert self.decide("13.0") == (
            None,
            "CPU only (no CUDA toolkit was found: no nvcc on PATH, CUDA_HOME is not set)",
        )

    def test_no_toolkit_where_cuda_is_asked_for(self, monkeypatch):
        monkeypatch.setenv("GRADCLIP_CUDA", "1")
        assert self.stops("13.0") == (
            "GRADCLIP_CUDA=1 asks for the CUDA engine, but no CUDA toolkit was found: "
            "no nvcc on PATH, CUDA_HOME is not set.\n"
            "Install the toolkit of CUDA 13 and name its folder: CUDA_HOME=/path/to/cuda\n"
            "or build for the CPU only: GRADCLIP_CUDA=0"
        )

    def test_torch_without_cuda(self, machine):
        home = write_toolkit(machine / "cuda")
        assert self.decide(None, str(home)) == (
            None,
            "CPU only (torch 2.14.1+cpu is built without CUDA)",
        )

    def test_torch_without_cuda_where_cuda_is_asked_for(self, machine, monkeypatch):
        monkeypatch.setenv("GRADCLIP_CUDA", "1")
        home = write_toolkit(machine / "cuda")
        assert self.stops(None, str(home)) == (
            "GRADCLIP_CUDA=1 asks for the CUDA engine, but torch 2.14.1+cpu is built without "
            "CUDA.\n"
            "Install a torch with CUDA (https://pytorch.org/get-started), or run: "
            "unset GRADCLIP_CUDA"
        )

    @pytest.mark.parametrize("version", ["12.8", "13.0"])
    def test_forbidden(self, machine, monkeypatch, version):
        monkeypatch.setenv("GRADCLIP_CUDA", "0")
        home = write_toolkit(machine / "cuda", version)
        assert self.decide("13.0", str(home)) == (None, "CPU only (GRADCLIP_CUDA=0)")

    def test_neither_0_nor_1(self, monkeypatch):
        monkeypatch.setenv("GRADCLIP_CUDA", "yes")
        assert self.stops("13.0") == "GRADCLIP_CUDA must be 0, 1 or unset, found 'yes'."


class TestArchitectures:
    def test_those_of_torch_that_nvcc_knows(self):
        flags = "sm_50 sm_70 sm_75 sm_80 sm_90 sm_90a sm_120 compute_120"
        assert find_cuda.architecture_list(flags, ["sm_70", "sm_75", "sm_80", "sm_90"]) == (
            "7.5;8.0;9.0+PTX"
        )

    def test_in_numerical_order(self):
        flags = "sm_120 sm_100 sm_90 compute_120"
        assert find_cuda.architecture_list(flags, CODES) == "9.0;10.0;12.0+PTX"

    @pytest.mark.parametrize("flags", ["", "sm_50 sm_61", "sm_130"])
    def test_none_left(self, flags):
        with pytest.raises(ValueError) as caught:
            find_cuda.architecture_list(flags, CODES)
        assert (flags or "no architecture") in str(caught.value)

    def flags(self, machine, torch):
        from torch.utils import cpp_extension

        toolkit = found(guess=str(write_toolkit(machine / "cuda")))
        return build_support.architecture_flags(torch, toolkit, cpp_extension)

    def test_default(self, machine):
        options = self.flags(machine, torch_with("13.0", "sm_80 sm_90 sm_110 compute_110"))
        assert sorted(options) == [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90,code=compute_90",
            "-gencode=arch=compute_90,code=sm_90",
        ]
        assert build_support.built_codes(options) == ("sm_80", "sm_90", "compute_90")

    @pytest.mark.parametrize("asked", ["8.0;10.0+PTX", "8.0 10.0+PTX"])
    def test_asked_for(self, machine, monkeypatch, asked):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
        options = self.flags(machine, torch_with("13.0"))
        assert build_support.built_codes(options) == ("sm_80", "sm_100", "compute_100")

    @pytest.mark.parametrize("asked", ["9", "next"])
    def test_not_understood(self, machine, monkeypatch, asked):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
        with pytest.raises(SetupError) as caught:
            self.flags(machine, torch_with("13.0"))
        assert str(caught.value).startswith("no architectures to compile for: ")
        assert f"TORCH_CUDA_ARCH_LIST is {asked!r}; set it to what you have" in str(caught.value)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
    def test_native_without_a_gpu(self, machine, monkeypatch):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
        with pytest.raises(SetupError) as caught:
            self.flags(machine, torch_with("13.0"))
        # Older releases of torch do not know the word.
        known = '"native"' in inspect.getsource(cpp_extension._get_cuda_arch_flags)
        reason = "torch sees no card here.\n" if known else "Unknown CUDA arch (native)"
        assert f"no architectures to compile for: {reason}" in str(caught.value)

    def test_unknown_to_nvcc(self, machine, monkeypatch):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;9.0a;9.0+PTX")
        with pytest.raises(SetupError) as caught:
            self.flags(machine, torch_with("13.0"))
        assert str(caught.value) == (
            f"nvcc 13.0 in {machine / 'cuda'} cannot compile for sm_70, only for "
            "sm_75, sm_80, sm_86, sm_90, sm_100, sm_120.\n"
            "Change TORCH_CUDA_ARCH_LIST, or name another toolkit: CUDA_HOME=/path/to/cuda"
        )


class TestExtension:
    SOURCES = ("csrc/binding/module.cpp", "csrc/binding/cuda_operations.cpp", "csrc/cuda/k.cu")

    @pytest.fixture
    def extension(self):
        return build_support.Extension("gradclip_ext._C", list(self.SOURCES), language="c++")

    def test_cpu_only(self, extension):
        from torch.utils import cpp_extension

        build_support.prepare_for_cpu(extension, cpp_extension)
        assert extension.sources == ["csrc/binding/module.cpp"]
        assert extension.define_macros == []
        assert "cudart" not in extension.libraries

    def test_cuda(self, extension, machine, monkeypatch):
        from torch.utils import cpp_extension

        # Contains the letters "arch", which would make torch leave out every architecture.
        toolkit = found(guess=str(write_toolkit(machine / "research")))
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(toolkit.home))
        monkeypatch.setenv("MAX_JOBS", "1")
        options = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"]
        build_support.prepare_for_cuda(extension, cpp_extension, toolkit, options)
        assert extension.sources == list(self.SOURCES)
        assert ("GRADCLIP_WITH_CUDA", "1") in extension.define_macros
        assert {"cudart", "c10_cuda"} <= set(extension.libraries)
        assert f"-isystem{toolkit.include}" in extension.extra_compile_args["cxx"]
        nvcc = extension.extra_compile_args["nvcc"]
        assert [option for option in nvcc if "arch" in option] == options
        assert "--threads=1" in nvcc
        assert not any(option.startswith("-std") for option in nvcc)


def test_facts_can_be_read():
    toolkit = find_cuda.Toolkit(Path("/cuda"), Path("/cuda/include"), "13.0")
    torch = torch_with("13.0")
    torch.compiled_with_cxx11_abi = lambda: True
    source = build_support.built_with_source(torch, "g++", "CPU and CUDA", toolkit, ("sm_80",))
    facts = {}
    exec(source, facts)
    assert facts["CUDA"] == "13.0" and facts["CUDA_CODES"] == ("sm_80",)
    assert facts["TORCH_CUDA"] == "13.0" and facts["ENGINES"] == "CPU and CUDA"


@pytest.mark.parametrize(
    ("asked", "number"), [("3", 3), ("0", 1), ("", os.cpu_count()), ("many", os.cpu_count())]
)
def test_jobs(monkeypatch, asked, number):
    monkeypatch.setenv("MAX_JOBS", asked)
    assert find_cuda.jobs() == number
