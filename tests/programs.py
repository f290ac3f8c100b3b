"""Runs programs in other processes, by the interpreter and by ``python -m gradclip_ext.run``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import gradclip_ext

PACKAGE = Path(gradclip_ext.__file__).parent
# What pyproject.toml registers.
ENTRY_POINT = '[torch.backends]\ngradclip_ext = "gradclip_ext_autoload:load"\n'

CLIPPING = """
import torch
weight = torch.nn.Parameter(torch.zeros(2))
def clip(times=1, **arguments):
    for _ in range(times):
        weight.grad = torch.tensor([3e20, 4e20])
        norm = torch.nn.utils.clip_grad_norm_(weight, 1.0, **arguments)
    return norm.item()
"""


def _can_be_interrupted() -> None:
    """Undo what a shell does to what it runs in the background, which ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def register(folder: Path) -> None:
    """Make the entry point known where the package is built but not installed."""
    if entry_points(group="torch.backends", name="gradclip_ext"):
        return
    metadata = folder / "registered_for_the_tests-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: registered_for_the_tests\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINT.replace('"', ""))


class Programs:
    """A folder of programs and the environment that they are run in."""

    def __init__(self, folder: Path, metadata: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), str(metadata)]),
            "OMP_NUM_THREADS": "1",
        }
        for name in ("GRADCLIP_EXT_PATCH", "GRADCLIP_EXT_CALLS", "LOCAL_RANK", "SLURM_LOCALID"):
            self.environment.pop(name, None)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def python(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**self.environment, **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            preexec_fn=_can_be_interrupted,
        )

    def run(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """With the package in front, and its report in ``report`` instead of ``stderr``."""
        result = self.python("-m", "gradclip_ext.run", *arguments, **environment)
        before, mark, report = result.stderr.partition("gradclip_ext: ")
        result.stderr = before
        result.report = [line.strip() for line in (mark + report).splitlines()]
        return result
