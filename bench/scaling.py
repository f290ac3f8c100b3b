"""Simulates what clipping by norm costs a step on 8 to 16,384 ranks, from a model.

    python bench/scaling.py bench/results/distributed-NAME.json

Writes bench/results/scaling-NAME.json and .png. Nothing here was run on more than two ranks, and
nothing on a GPU. The host times are measured on a CPU: they are read from a report of
distributed.py. The rest is a model. A call costs

    fixed + each * parameters + the sum over its collectives of (launch + wire)

where fixed and each are fitted to the calls on one rank, and launch is what a collective adds on
two ranks. On cores that several processes share most of that is waiting for gloo and the other one,
so it is more than the host spends on a launch, and `--launch` replaces it. The wire
time of an all-reduce of b bytes over n ranks on m nodes is

    base + 2 ((n / m - 1) nvlink + log2(m) network) + 2 b / bandwidth

the form in which NCCL's tuner estimates a tree (ncclTopoTuneModel in src/graph/tuning.cc of
https://github.com/NVIDIA/nccl, read in June 2026), with the constants there for the low-latency
protocol. The bandwidth is half of a 400 Gb/s network's, since half of what that protocol sends are
flags. Left out, since it is alike for all: what the devices do, and waiting for the slowest rank.

Layouts:
  fsdp     one mesh dimension over all ranks.
  hsdp     shards within 64 ranks, copies beyond.
  3d       data, tensor (8) and pipeline parallel (4 stages): a 2-D mesh and a process group.
  3d+ep    the same, with experts over 8 of the data parallel ranks: a second mesh, of which the
           dimension of tensor parallel is the same.

Ours takes one all-reduce for each dimension of more than one rank and each process group, copies
included. torch.nn.utils reduces the dimensions that are sharded, for the coefficient and again
where the norm is read, and knows neither stages nor two meshes. torchtitan reduces the norm of each
mesh by itself, and then that of the stages.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from json import loads
from pathlib import Path
from typing import Any, NamedTuple

import torch
from figures import BLACK, SKY_BLUE, STYLES, finish, microseconds
from implementations import CLIPPER, OURS, REFERENCE, TITAN
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from report import RESULTS_FOLDER, Table, save

from gradclip_ext._ops.exchange import padded_length

RANKS = (8, 64, 512, 4096, 16384)
PARAMETERS = (100, 500, 5000, 50000)
LAYOUTS = ("fsdp", "hsdp", "3d", "3d+ep")
NODE, SHARDED, TENSOR, STAGES, EXPERTS = 8, 64, 8, 4, 8
# In microseconds and bytes per microsecond.
WIRE = {"base": 6.8, "nvlink": 0.6, "network": 5.0, "bandwidth": 25000.0}
# NCCL multiplies the latency within a node by this where there are several.
NVLINK_AMONG_NODES = 1.8
# Of what a vector of ours holds beside norms: who takes part, disagrees, fails.
TAIL = 12
FLOAT64, FLOAT32 = 8, 4
TITLES = {
    OURS: OURS,
    CLIPPER: "GradClipper",
    REFERENCE: "torch.nn.utils",
    TITAN: "torchtitan's way",
}
STYLE = {
    OURS: STYLES[OURS],
    CLIPPER: {"color": SKY_BLUE, "marker": "^"},
    REFERENCE: STYLES[REFERENCE],
    TITAN: {"color": BLACK, "marker": "D"},
}


class Ranks(NamedTuple):
    """A mesh dimension or a process group: how many ranks, and how far apart neighbors are."""

    count: int
    stride: int

    @property
    def nodes(self) -> int:
        return max(1, min(self.count, self.count * self.stride // NODE))


class Layout(NamedTuple):
    """What a call has to reduce over."""

    # Of each mesh the dimensions that are sharded.
    meshes: list[list[Ranks]]
    copies: list[Ranks]
    stages: list[Ranks]


class Host(NamedTuple):
    """Microseconds of the host: of a call, of each parameter, of each collective."""

    fixed: float
    each: float
    launch: float


def layout_of(name: str, ranks: int) -> Layout:
    if name == "fsdp":
        return Layout([[Ranks(ranks, 1)]], [], [])
    if name == "hsdp":
        sharded = min(SHARDED, ranks)
        return Layout([[Ranks(sharded, 1)]], [Ranks(ranks // sharded, sharded)], [])
    stages = min(STAGES, ranks // TENSOR)
    data = ranks // TENSOR // stages
    dense = [Ranks(data, TENSOR), Ranks(TENSOR, 1)]
    meshes = [dense]
    if name == "3d+ep":
        experts = min(EXPERTS, data)
        meshes.append([Ranks(data // experts, experts * TENSOR), Ranks(experts, TENSOR), dense[1]])
    return Layout(meshes, [], [Ranks(stages, data * TENSOR)])


def wire(ranks: Ranks, size: float, constants: dict[str, float]) -> float:
    """The microseconds of an all-reduce of so many bytes."""
    nodes = ranks.nodes
    nvlink = constants["nvlink"] * (NVLINK_AMONG_NODES if nodes > 1 else 1.0)
    hops = (ranks.count / nodes - 1) * nvlink + math.log2(nodes) * constants["network"]
    return constants["base"] + 2 * hops + 2 * size / constants["bandwidth"]


def vector(numbers: int) -> int:
    """The bytes of a vector of ours for so many norms."""
    return FLOAT64 * (padded_length(numbers) + TAIL)


def collectives(way: str, layout: Layout, parameters: int) -> list[tuple[Ranks, float]] | None:
    """Over which ranks a call reduces how many bytes; None where it cannot do it."""
    several = [dimension for mesh in layout.meshes for dimension in mesh]
    if way in (OURS, CLIPPER):
        # A dimension that two meshes share is reduced once, for both.
        norms = parameters if way == CLIPPER else 1
        found = [
            (
                dimension,
                vector(norms * sum(dimension in mesh for mesh in layout.meshes)),
            )
            for dimension in dict.fromkeys([*several, *layout.copies])
        ]
        found += [(group, vector(1)) for group in layout.stages]
    elif way == TITAN:
        found = [(dimension, FLOAT32) for dimension in [*several, *layout.stages]]
    elif len(layout.meshes) > 1 or any(group.count > 1 for group in layout.stages):
        return None
    else:
        found = [(dimension, FLOAT32) for dimension in several] * 2
    return [(ranks, size) for ranks, size in found if ranks.count > 1]


def host_of(report: dict[str, Any], way: str, kind: str) -> Host:
    """The host times that were measured."""

    def medians(ranks: int) -> dict[int, float]:
        return {
            row["parameters"]: row["implementations"][way]["median_us"]
            for row in report["rows"]
            if row["ranks"] == ranks and row["kind"] == kind
        }

    alone, two = medians(1), medians(2)
    # Relative errors, so that a call with few parameters counts as much as one with many.
    counts = torch.tensor(list(alone), dtype=torch.float64)
    times = torch.tensor(list(alone.values()), dtype=torch.float64)
    terms = torch.stack([1 / times, counts / times], dim=1)
    fixed, each = torch.linalg.lstsq(terms, torch.ones_like(times)[:, None]).solution[:, 0].tolist()
    fewest = min(two)
    taken = next(
        row["implementations"][way]["collectives"]
        for row in report["rows"]
        if row["ranks"] == 2 and row["kind"] == kind
    )
    launch = (two[fewest] - alone[fewest]) / max(1, taken)
    return Host(max(0.0, fixed), each, max(0.0, launch))


def simulated(hosts: dict[str, Host], constants: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each layout, number of ranks and of parameters."""
    rows = []
    for name in LAYOUTS:
        for ranks in RANKS:
            layout = layout_of(name, ranks)
            for parameters in PARAMETERS:
                ways = {}
                for way, host in hosts.items():
                    found = collectives(way, layout, parameters)
                    if found is None:
                        continue
                    on_wire = sum(wire(group, size, constants) for group, size in found)
                    on_host = host.fixed + host.each * parameters + host.launch * len(found)
                    ways[way] = {
                        "us": on_host + on_wire,
                        "host_us": on_host,
                        "wire_us": on_wire,
                        "collectives": len(found),
                    }
                rows.append(
                    {"layout": name, "ranks": ranks, "parameters": parameters, "ways": ways}
                )
    return rows


def figure_of(report: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    figure.suptitle(
        "Simulation: time of a call for the norm over all ranks\n",
        fontsize=13,
        weight="bold",
    )
    figure.text(
        0.5,
        0.94,
        f"host times measured on 1 and 2 ranks ({report['processor']}, gloo, torch "
        f"{report['torch']}), network from NCCL's cost model; not measured on GPUs",
        ha="center",
        va="top",
        fontsize=9,
    )
    panels = figure.subplots(1, 2, sharey=True)
    chosen = (
        ("parameters", "fsdp on 4096 ranks", {"layout": "fsdp", "ranks": 4096}),
        ("ranks", "3d+ep with 5000 parameters", {"layout": "3d+ep", "parameters": 5000}),
    )
    for axes, (x, title, wanted) in zip(panels, chosen, strict=True):
        rows = [row for row in report["rows"] if wanted.items() <= row.items()]
        for way, style in STYLE.items():
            points = [(row[x], row["ways"][way]["us"]) for row in rows if way in row["ways"]]
            if points:
                # Dashed: a model, no measurement.
                look = {**style, "label": TITLES[way]}
                axes.plot(*zip(*points, strict=True), linestyle="--", markersize=6, **look)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([row[x] for row in rows], [f"{row[x]:,}" for row in rows])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(FuncFormatter(microseconds))
        finish(axes, title, x, "")
        axes.legend(frameon=False, fontsize=9)
    panels[0].set_ylabel("simulated time of a call")
    return figure


COLUMNS = {"layout": -6, "ranks": 6, "parameters": 10} | {
    f"{TITLES[way]} us (collectives)": 32 for way in TITLES
}


def line_of(table: Table, row: dict[str, Any]) -> str:
    cells = [
        f"{row['ways'][way]['us']:.0f} ({row['ways'][way]['collectives']})"
        if way in row["ways"]
        else "-"
        for way in TITLES
    ]
    return table.line([row["layout"], str(row["ranks"]), str(row["parameters"]), *cells])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="JSON file of distributed.py, of 1 and 2 ranks")
    parser.add_argument("--kind", choices=("quiet", "clip"), default="clip")
    for name, value in WIRE.items():
        parser.add_argument(f"--{name}", type=float, default=value)
    parser.add_argument(
        "--launch", type=float, help="microseconds for each collective, instead of the measured"
    )
    parser.add_argument("--output", type=Path, help="JSON file; the plot is put beside it")
    options = parser.parse_args(arguments)
    measured = loads(options.report.read_text())
    hosts = {way: host_of(measured, way, options.kind) for way in TITLES}
    if options.launch is not None:
        hosts = {way: host._replace(launch=options.launch) for way, host in hosts.items()}
    constants = {name: getattr(options, name) for name in WIRE}
    rows = simulated(hosts, constants)
    report = {
        "what": "a simulation; measured are the host times alone, on a CPU",
        "measured_in": options.report.name,
        **{name: measured[name] for name in ("date", "processor", "torch", "gradclip_ext")},
        "kind": options.kind,
        "wire": constants,
        "host_us": {way: host._asdict() for way, host in hosts.items()},
        "rows": rows,
    }
    name = options.report.stem.replace("distributed", "scaling")
    path = options.output or RESULTS_FOLDER / f"{name}.json"
    save(report, path)
    figure_of(report).savefig(path.with_suffix(".png"), dpi=150)
    print("A simulation, in which only host times on a CPU are measured:")
    for way, host in hosts.items():
        print(
            f"  {TITLES[way]}: {host.fixed:.0f} us, {host.each:.2f} us for each parameter, "
            f"{host.launch:.0f} us for each collective"
        )
    table = Table(COLUMNS)
    print(table.head())
    for row in rows:
        print(line_of(table, row))
    print(f"\nData: {path}\nPlot: {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
