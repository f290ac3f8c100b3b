"""Dependencies point one way.

csrc: binding -> {cpu, cuda} -> core, and heavy headers stay in one place, so that the kernels
compile in seconds, run under sanitizers without torch, and can be bound elsewhere. Python: public
modules -> _ops -> _C, so that one place chooses between the native engine and the fallback.
"""

import ast
import graphlib
import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# The folders that the files of a folder may include from.
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


# torch's sync debug mode does not see direct calls of the runtime, so the sources are searched.
WAITS = re.compile(
    r"\b(cuda|hip)\w*(Synchronize|Memcpy\w*|Memset\w*|Malloc\w*|Free\w*|StreamQuery|EventQuery)\s*\("
)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_no_device_sync_and_no_allocation_behind_torch(file):
    calls = [match.group(0) for match in WAITS.finditer(file.read_text(encoding="utf-8"))]
    # In a kernel: waits for the previous kernel and does not block the host.
    assert [call for call in calls if call != "cudaGridDependencySynchronize("] == []


def test_the_host_reads_a_number_from_the_gpu_in_one_place():
    readers = {
        name(file): file.read_text(encoding="utf-8").count(".item(")
        for file in FILES
        if ".item(" in file.read_text(encoding="utf-8")
    }
    assert readers == {"binding/cuda_engine.cpp": 1}


# The parts of the package that a part may import; a folder is one part, open to itself.
PARTS = {
    "__init__": {
        "_native",
        "_processes",
        "_version",
        "amp",
        "clipper",
        "distributed",
        "functional",
        "norms",
        "optim",
        "patch",
        "textbook",
        "thresholds",
    },
    "__main__": {"__init__", "_C", "_built_with", "patch"},
    "_arguments": set(),
    "_build_check": {"_built_with"},
    "_calls": {"_ops"},
    "_clipper_step": {
        "_handover",
        "_measured",
        "_ops",
        "_owners",
        "_rules",
        "_scaler",
        "_settings",
        "_step",
        "thresholds",
    },
    "_report": {"_ops", "_step"},
    "_counters": {"_arguments"},
    "_handover": {"_ops", "_owners"},
    "_measured": {"_ops"},
    "_names": set(),
    "_native": {"_C", "_build_check", "_ops"},
    "_ops": {"_C", "_arguments"},
    "_owners": {"_arguments", "_ops", "_sources"},
    "_parameters": {"_arguments", "_names", "_sources"},
    "_processes": {"_calls", "patch"},
    "_sources": {"_C", "_arguments"},
    "_scaler": {"_arguments", "_ops"},
    "_rules": {"_arguments", "_ops", "thresholds"},
    "_settings": {"_arguments", "_rules", "thresholds"},
    "_step": {"_arguments", "_ops", "_rules", "_settings", "thresholds"},
    "_version": set(),
    "amp": {"_arguments", "_measured", "_ops", "_owners", "_scaler"},
    "clipper": {
        "_arguments",
        "_clipper_step",
        "_counters",
        "_names",
        "_ops",
        "_parameters",
        "_report",
        "_rules",
        "_settings",
        "_step",
        "thresholds",
    },
    "distributed": {"_ops"},
    "functional": {"_arguments", "_ops"},
    "integrations": {"clipper"},
    "norms": {"_arguments", "_names", "_ops", "_parameters"},
    "optim": {"_arguments", "_handover", "_measured", "_ops", "_owners", "_scaler"},
    "patch": {"functional"},
    "run": {"_processes"},
    "textbook": {"_arguments", "_ops", "functional"},
    "thresholds": {"_arguments", "_ops"},
}
PACKAGE = CSRC.parent / "gradclip_ext"
MODULES = sorted(file for file in PACKAGE.rglob("*.py") if file.stem != "_built_with")


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def is_module(path: str) -> bool:
    """Whether a dotted path below the package is a module, compiled or written by the build."""
    folder = PACKAGE.joinpath(*path.split("."))
    return folder.is_dir() or folder.with_suffix(".py").is_file() or path in ("_C", "_built_with")


def imported_modules(file: Path) -> dict[str, str]:
    """The modules of the package that a file imports, by the name it binds them to, and those
    that it imports names from."""
    modules = {}
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "gradclip_ext":
                    path = alias.name.partition(".")[2] or "__init__"
                    modules[alias.asname or alias.name] = path
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gradclip_ext"):
            origin = node.module.partition(".")[2]
            for alias in node.names:
                path = f"{origin}.{alias.name}" if origin else alias.name
                if is_module(path):
                    modules[alias.asname or alias.name] = path
                else:
                    modules[f"{origin}:{alias.name}"] = origin or "__init__"
    return modules


def test_every_part_of_the_package_has_its_place():
    assert {part_of(file) for file in MODULES} == set(PARTS)


@pytest.mark.parametrize("file", MODULES, ids=module_name)
def test_python_is_imported_downwards(file):
    own = part_of(file)
    imported = {path.split(".")[0] for path in imported_modules(file).values()}
    assert imported - PARTS[own] - {own} == set()


def test_modules_have_no_import_cycle():
    def node(path: str) -> str:
        is_folder = PACKAGE.joinpath(*path.split(".")).is_dir()
        return f"{path}.__init__" if is_folder else path

    graph = {
        module_name(file): {node(path) for path in imported_modules(file).values()}
        for file in MODULES
    }
    # Raises if there is a cycle.
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= set(graph)


@pytest.mark.parametrize("file", MODULES, ids=module_name)
def test_no_private_name_of_another_module(file):
    modules = imported_modules(file)
    taken = [name for name in modules if ":_" in name and not name.endswith("__")]
    asked = [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in modules
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not is_module(f"{modules[node.value.id]}.{node.attr}".removeprefix("__init__."))
    ]
    assert (taken, asked) == ([], [])


@pytest.mark.parametrize(
    "text, home",
    [
        (r"is_compiling\b", "_ops/observation.py"),
        (r"\b_C\.observed\b", "_ops/observation.py"),
        (r"\btorch\._[a-zA-Z]|\btorch\.utils\._", "_ops/torch_private.py"),
    ],
)
def test_one_place_asks(text, home):
    found = [
        str(file.relative_to(PACKAGE))
        for file in MODULES
        if re.search(text, file.read_text(encoding="utf-8"))
    ]
    assert found == [home]
