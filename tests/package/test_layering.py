"""csrc depends one way, binding -> {cpu, cuda} -> core, and heavy headers stay in one place.

So the kernels compile in seconds, run under sanitizers without torch, and can be bound elsewhere.
"""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# Which folders the files of a folder may include from.
LAYERS = {"core": {"core"}, "cpu": {"cpu", "core"}, "cuda": {"cuda", "core"}}
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
OF_TORCH = re.compile(r"(torch|ATen|c10|caffe2|pybind11)/|Python\.h$")


def includes(file: Path) -> list[str]:
    return INCLUDE.findall(file.read_text(encoding="utf-8"))


def name(file: Path) -> str:
    return str(file.relative_to(CSRC))


FILES = sorted(path for path in CSRC.rglob("*") if path.is_file())
TORCH_FREE = [file for file in FILES if file.relative_to(CSRC).parts[0] != "binding"]


def test_files_are_found():
    folders = {file.relative_to(CSRC).parts[0] for file in FILES}
    assert {"binding", "core", "cpu"} <= folders <= {"binding", "core", "cpu", "cuda"}


@pytest.mark.parametrize("file", TORCH_FREE, ids=name)
def test_only_binding_includes_torch(file):
    assert [header for header in includes(file) if OF_TORCH.match(header)] == []


@pytest.mark.parametrize("file", TORCH_FREE, ids=name)
def test_layers_are_included_downwards(file):
    own = [header for header in includes(file) if (CSRC / header).is_file()]
    allowed = LAYERS[file.relative_to(CSRC).parts[0]]
    assert [header for header in own if Path(header).parts[0] not in allowed] == []


def test_torch_extension_is_included_nowhere():
    assert [name(file) for file in FILES if "torch/extension.h" in includes(file)] == []


def test_python_variable_is_included_once():
    header = "torch/csrc/autograd/python_variable.h"
    assert len([file for file in FILES if header in includes(file)]) == 1


# torch's own debugging of synchronization cannot see calls of the runtime, so they are looked for.
WAITS = re.compile(
    r"\b(cuda|hip)\w*(Synchronize|Memcpy\w*|Memset\w*|Malloc\w*|Free\w*|StreamQuery|EventQuery)\s*\("
)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_nothing_waits_for_the_gpu_or_allocates_behind_torch(file):
    calls = [match.group(0) for match in WAITS.finditer(file.read_text(encoding="utf-8"))]
    # In a kernel: waits for the kernel before it, not for the host.
    assert [call for call in calls if call != "cudaGridDependencySynchronize("] == []


def test_the_host_reads_a_number_of_the_gpu_in_one_place():
    readers = {
        name(file): file.read_text(encoding="utf-8").count(".item(")
        for file in FILES
        if ".item(" in file.read_text(encoding="utf-8")
    }
    assert readers == {"binding/cuda_operations.cpp": 1}
