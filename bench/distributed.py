"""Times clipping of DTensors: what the host spends on each, beside torch.nn.utils.

    python bench/distributed.py                        # 1 and 2 ranks, a minute or two
    python bench/distributed.py --worlds 1 --parameters 5000 --rounds 20

Each rank is a process of one thread; they talk by gloo. The gradients are sharded over all ranks
like those of FSDP2, 8 elements on each rank, so that all of the time is host time. The ranks start
a call together, and its time is that of the slowest one. Within a row everything takes turns on
restored gradients. Each way is checked against float64 before anything is timed.

Kinds: "quiet" is a step that clips nothing, "clip" one that scales all gradients. "local" is our
function on the parts of this rank as plain tensors, without the other ranks: the rest of ours is
what the DTensors cost. "torch, as torchtitan" reads the norm over all ranks before it clips.

What a first call takes is not counted: torch works out for each operation and length of list how
DTensors are to be distributed, which for 5000 of them is more than 10 seconds, and remembers it.

Beside the times stand the collectives of a call, as CommDebugMode counts them. Quote the ratios:
absolute times depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clocks import quantiles
from implementations import CLIPPER, OURS, REFERENCE, TITAN
from report import Table, default_path, environment, save
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import Parameter
from tqdm import tqdm

import gradclip_ext

LOCAL, GET, NORMS = "local", "get_total_norm", "grad_norms"
WORLDS = (1, 2)
PARAMETERS = (100, 1000, 5000)
KINDS = {"quiet": 3.0, "clip": 1.0 / 3.0}
ELEMENTS = 8
FEWEST_ROUNDS = 5
# Largest relative error of a norm or a gradient in float32; more is a bug, and nothing is timed.
TOLERANCE = 2e-6


@dataclass
class Gradients:
    """Parameters whose gradients are sharded, and the same memory as plain tensors.

    Attributes:
        parameters: DTensors, or with `local` plain tensors.
        local: the part of this rank, of which the gradients of both are views.
        norm: that of all gradients on all ranks, in float64.
    """

    parameters: list[Parameter]
    local: list[Parameter]
    flat: Tensor
    original: Tensor
    norm: float

    def restore(self) -> None:
        self.flat.copy_(self.original)


def make_gradients(count: int) -> Gradients:
    world, rank = distributed.get_world_size(), distributed.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    whole = torch.randn(world, count * ELEMENTS, generator=torch.Generator().manual_seed(0))
    original = whole[rank].clone()
    flat = original.clone()
    parameters, local = [], []
    for part in flat.split(ELEMENTS):
        for made, wrap in ((parameters, sharded), (local, lambda tensor, _: tensor)):
            parameter = Parameter(wrap(torch.zeros(ELEMENTS), mesh))
            parameter.grad = wrap(part, mesh)
            made.append(parameter)
    return Gradients(parameters, local, flat, original, whole.double().norm().item())


def sharded(tensor: Tensor, mesh: Any) -> Tensor:
    return DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)


def as_torchtitan(parameters: list[Parameter], max_norm: float) -> Tensor:
    """The norm reduced to a plain tensor, and only then the coefficient."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def ways(gradients: Gradients, max_norm: float) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name; each gives the norm."""
    parameters, local = gradients.parameters, gradients.local
    clipper = gradclip_ext.GradClipper(parameters, max_norm)
    return {
        OURS: lambda: gradclip_ext.clip_grad_norm_(parameters, max_norm),
        REFERENCE: lambda: torch.nn.utils.clip_grad_norm_(parameters, max_norm),
        TITAN: lambda: as_torchtitan(parameters, max_norm),
        CLIPPER: clipper.clip_,
        GET: lambda: gradclip_ext.get_total_norm([p.grad for p in parameters]),
        NORMS: lambda: gradclip_ext.grad_norms(parameters)[0],
        LOCAL: lambda: gradclip_ext.clip_grad_norm_(local, max_norm),
    }


def whole(norm: Tensor) -> float:
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def require_right(name: str, call: Callable[[], Tensor], gradients: Gradients, limit: float) -> int:
    """How many collectives a call takes, once its results are seen to be right."""
    gradients.restore()
    with CommDebugMode() as counted:
        norm = call()
    gradients.restore()
    norm = call()
    expected, clips = gradients.norm, name not in (GET, NORMS)
    if name == LOCAL:
        expected = gradients.original.double().norm().item()
    # As torch has it, with its epsilon.
    factor = min(1.0, limit / (expected + 1e-6)) if clips else 1.0
    error = abs(whole(norm) - expected) / expected
    wanted = gradients.original.double() * factor
    errors = [error, ((gradients.flat - wanted).abs().max() / wanted.abs().max()).item()]
    if not max(errors) <= TOLERANCE:
        raise SystemExit(f"{name} is wrong, relative error {max(errors):.2g}")
    return counted.get_total_counts()


def rank_main(rank: int, world: int, folder: str, counts: Sequence[int], rounds: int) -> None:
    """What each process does: measures, and leaves its times in the folder."""
    torch.set_num_threads(1)
    store = distributed.FileStore(str(Path(folder, "store")), world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    with contextlib.closing(Group()):
        rows = []
        for count in counts:
            gradients = make_gradients(count)
            rows += [times_of(gradients, kind, rounds_for(count, rounds)) for kind in KINDS]
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))


class Group:
    """The process group, to be closed."""

    def close(self) -> None:
        distributed.destroy_process_group()


def rounds_for(count: int, rounds: int) -> int:
    """More of them where calls are short; the same on all ranks."""
    return max(FEWEST_ROUNDS, round(rounds * min(5.0, math.sqrt(5000 / count))))


def times_of(gradients: Gradients, kind: str, rounds: int) -> dict[str, Any]:
    """The seconds of each call on this rank, and its collectives."""
    limit = gradients.norm * KINDS[kind]
    calls = ways(gradients, limit)
    collectives = {
        name: require_right(name, call, gradients, limit) for name, call in calls.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            gradients.restore()
            distributed.barrier()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    count = len(gradients.parameters)
    return {"parameters": count, "kind": kind, "times": times, "collectives": collectives}


def rows_of(world: int, ranks: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each number of parameters and kind, of what all ranks have measured."""
    rows = []
    for same in zip(*ranks, strict=True):
        first = same[0]
        implementations: dict[str, dict[str, Any]] = {}
        for name, collectives in first["collectives"].items():
            slowest = map(max, zip(*(rank["times"][name] for rank in same), strict=True))
            values: dict[str, Any] = quantiles(list(slowest))
            values["us_per_parameter"] = values["median_us"] / first["parameters"]
            values["collectives"] = collectives
            implementations[name] = values
        medians = {name: values["median_us"] for name, values in implementations.items()}
        rows.append(
            {
                "ranks": world,
                "kind": first["kind"],
                "parameters": first["parameters"],
                "elements": ELEMENTS,
                "dtype": "float32",
                "implementations": implementations,
                "ratio": medians[REFERENCE] / medians[OURS],
                # What DTensors add to the same memory as plain tensors, and the exchange.
                "host_us_per_parameter": (medians[OURS] - medians[LOCAL]) / first["parameters"],
            }
        )
    return rows


def measured(world: int, counts: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Starts the processes of a world, and gives its rows."""
    with tempfile.TemporaryDirectory() as folder:
        # Not forked, since a process that has used its threads may not be.
        torch.multiprocessing.spawn(rank_main, (world, folder, counts, rounds), nprocs=world)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    return rows_of(world, ranks)


COLUMNS = {
    "ranks": 5,
    "parameters": 10,
    "kind": -5,
    "ours us": 9,
    "each us": 8,
    "20 % .. 80 %": 19,
    "torch us": 9,
    "torch/ours": 10,
    "others, us for each": -90,
}


def line_of(table: Table, row: dict[str, Any]) -> str:
    implementations = row["implementations"]
    ours = implementations[OURS]
    others = [
        f"{name} {values['us_per_parameter']:.2f}"
        for name, values in implementations.items()
        if name not in (OURS, REFERENCE)
    ]
    return table.line(
        [
            str(row["ranks"]),
            str(row["parameters"]),
            row["kind"],
            f"{ours['median_us']:.0f}",
            f"{ours['us_per_parameter']:.2f}",
            f"{ours['q20_us']:.0f} .. {ours['q80_us']:.0f}",
            f"{implementations[REFERENCE]['median_us']:.0f}",
            f"{row['ratio']:.1f}",
            ", ".join(others),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, nargs="+", default=list(WORLDS))
    parser.add_argument("--parameters", type=int, nargs="+", default=list(PARAMETERS))
    parser.add_argument(
        "--rounds", type=int, default=21, help="calls with 5000 parameters, more with fewer"
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file (default: named after the run, in bench/results)"
    )
    options = parser.parse_args(arguments)
    # What the ranks set for themselves.
    facts = {**environment(torch.device("cpu")), "threads": 1, "backend": "gloo"}
    path = options.output or default_path(facts, "distributed")
    table = Table(COLUMNS)
    tqdm.write(table.head())
    rows: list[dict[str, Any]] = []
    for world in options.worlds:
        for row in measured(world, options.parameters, options.rounds):
            rows.append(row)
            tqdm.write(line_of(table, row))
        save({**facts, "rounds": options.rounds, "rows": rows}, path)
    tqdm.write(f"\nData: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
