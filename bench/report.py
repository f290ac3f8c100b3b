"""What the benchmarks share: the facts about a run, its table, and its file of results."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import gradclip_ext
from gradclip_ext.__main__ import main as gradclip_ext_report

RESULTS_FOLDER = Path(__file__).resolve().parent / "results"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_kernels() -> str:
    """The instruction set in use, as ``python -m gradclip_ext`` reports it."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        gradclip_ext_report()
    for line in output.getvalue().splitlines():
        name, _, value = line.strip().partition("  ")
        if name == "CPU kernels":
            return value.strip()
    raise SystemExit("python -m gradclip_ext does not name the CPU kernels")


def environment(device: torch.device) -> dict[str, Any]:
    """What the times depend on besides the code."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device.type,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "cpu_kernels": cpu_kernels(),
        "gradclip_ext": gradclip_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["compute_capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["cuda"] = torch.version.cuda
    return facts


def default_path(facts: dict[str, Any], *words: str) -> Path:
    """A path in bench/results, named after the words, the device, torch and the date."""
    parts = [
        *words,
        facts.get("gpu", facts["device"]),
        f"torch{facts['torch']}",
        facts["date"][:10],
    ]
    return RESULTS_FOLDER / (re.sub(r"[^a-z0-9.+]+", "-", "-".join(parts).lower()) + ".json")


def save(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Replaced as a whole: whoever stops the run in between finds the report before this one.
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


class Table:
    """Lines of aligned cells, to be printed one by one."""

    def __init__(self, columns: dict[str, int]) -> None:
        """Takes titles and widths; a negative width aligns to the left."""
        self.columns = columns

    def line(self, cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(-width) if width < 0 else cell.rjust(width)
            for cell, width in zip(cells, self.columns.values(), strict=True)
        ]
        return "  ".join(padded).rstrip()

    def head(self) -> str:
        return (
            self.line(list(self.columns))
            + "\n"
            + self.line(["-" * abs(width) for width in self.columns.values()])
        )
