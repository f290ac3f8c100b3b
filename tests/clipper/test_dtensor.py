"""DTensor gradients: rules, counters and reports get plain numbers, the same on every rank."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradclip_ext

# Of the package that is under test, wherever it was found.
PACKAGE = Path(gradclip_ext.__file__).parent

pytestmark = pytest.mark.cpu_only


@pytest.fixture(autouse=True)
def whereabouts():
    """Once is enough: the ranks are processes of their own."""


PROGRAM = """
import json, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
import gradclip_ext
from gradclip_ext import AdaGC, AutoClip, GradClipper, ZClip

rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
results = {}
for name, rule in {
    "number": lambda: 1.0,
    "AutoClip": lambda: AutoClip(50.0),
    "ZClip": lambda: ZClip(warmup_steps=2),
    "AdaGC": lambda: AdaGC(warmup_steps=1),
}.items():
    weights = [torch.ones(6, 4), torch.ones(5)]
    parameters = [nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)])) for weight in weights]
    clipper = GradClipper(parameters, rule())
    for step in range(4):
        for index, (parameter, weight) in enumerate(zip(parameters, weights)):
            full = torch.arange(float(weight.numel())).view(weight.shape) * (1 + index + step % 3)
            parameter.grad = distribute_tensor(full, mesh, [Shard(0)])
        norm = clipper.clip_()
        assert type(norm) is torch.Tensor, type(norm)
    report = clipper.report()
    state = clipper.state_dict()
    results[name] = {
        "total": report.total_norm,
        "norms": report.norms,
        "limits": report.limits,
        "coefficient": report.coefficient,
        "clipped": report.clipped_steps,
        "gradients": [p.grad.full_tensor().flatten().tolist() for p in parameters],
    }
total, norms, _ = gradclip_ext.grad_norms(parameters)
assert type(total) is type(norms) is torch.Tensor
print(json.dumps(results), flush=True)
dist.destroy_process_group()
"""


def run_ranks(tmp_path: Path, count: int) -> list[str]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    processes = [
        subprocess.Popen(
            [sys.executable, program, str(rank), str(count), tmp_path / f"store{count}"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE.parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        outputs.append(output)
    return outputs


def test_two_ranks_agree_with_one_process(tmp_path):
    first, second = run_ranks(tmp_path, 2)
    # The same bits on both ranks.
    assert first == second
    found, alone = json.loads(first), json.loads(run_ranks(tmp_path, 1)[0])
    for rule, expected in alone.items():
        for key, value in expected.items():
            if key == "gradients":
                for mine, other in zip(found[rule][key], value, strict=True):
                    assert mine == pytest.approx(other, rel=1e-5)
            else:
                assert found[rule][key] == pytest.approx(value, rel=1e-6)
        # Against the formulas, from the numbers themselves.
        norms = found[rule]["norms"]
        assert found[rule]["total"] == pytest.approx(math.hypot(*norms), rel=1e-6)
        full = torch.arange(24.0)
        assert norms[0] == pytest.approx(full.norm().item(), rel=1e-6)
