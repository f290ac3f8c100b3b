"""Which suites run where. The folder of a test file decides; no list names individual files."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
_CPU_ONLY = re.compile(r"^pytestmark = .*\bcpu_only\b", re.MULTILINE)

# On the CPU, on CUDA, and on the emulated CUDA engine: their tensors name no device, so setting a
# default device is enough. A file that tests the CPU only says so: pytestmark = cpu_only.
ON_EVERY_DEVICE = {"amp", "clipper", "functional", "norms", "optim", "textbook", "thresholds"}
# On every build of the package, once.
ON_EVERY_BUILD = {"gpu", "package", "patch"}
# Once: they do not test the build that they run on, or compile csrc themselves, or take long and
# ask of the native engine only what the suites above ask of it on every build.
OF_THE_SOURCES = {"bench", "distributed", "examples", "native"}
# In an environment of their own, which `make frameworks` creates.
WITH_FRAMEWORKS = {"frameworks"}

FOLDERS = ON_EVERY_DEVICE | ON_EVERY_BUILD | OF_THE_SOURCES | WITH_FRAMEWORKS

_FRAMEWORKS = ("accelerate", "lightning", "timm", "transformers")


def frameworks_are_there() -> bool:
    """Whether what the suites of WITH_FRAMEWORKS import can be imported, all of it."""
    return all(importlib.util.find_spec(name) is not None for name in _FRAMEWORKS)


def folder_of(file: Path) -> str:
    """The folder of tests/ that a test file is in; "" for a file in none."""
    folders = file.resolve().relative_to(TESTS).parts[:-1]
    return folders[0] if folders else ""


def device_suites() -> list[Path]:
    """The test files that run on every device."""
    files = (file for folder in ON_EVERY_DEVICE for file in (TESTS / folder).rglob("test_*.py"))
    return sorted(file for file in files if not _CPU_ONLY.search(file.read_text(encoding="utf-8")))
