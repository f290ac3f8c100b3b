"""What the suites in gpu/ share: when they run, launched kernels, graphs, new processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch
from torch import Tensor

import gradclip_ext
from gradclip_ext import _built_with

# pytestmark of every file there.
ONLY_ON_A_GPU = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(_built_with.CUDA is None, reason="built without the CUDA engine"),
]


def gradients_of(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> list[Tensor]:
    return [
        ref.random_gradient(shape, dtype, seed, scale).to("cuda")
        for seed, shape in enumerate(shapes)
    ]


def kernels_of(call: Callable[[], Any]) -> list[str]:
    """The names of the kernels that a call launches."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    # Beside kernels a GPU has copies, memory that is set, and the ranges that the call opened.
    return [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset", "gradclip_ext::"))
    ]


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the call, which is not run, and what the call returned."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def run_in_a_new_process(code: str, **environment: str) -> None:
    """Runs code with the package that is tested; it has to say "done" at the end."""
    package = str(Path(gradclip_ext.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0 and result.stdout.endswith("done\n"), result.stderr
