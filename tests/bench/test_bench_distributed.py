"""The benchmark of distributed gradients in bench/, and the simulation that reads its report."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
        yield {name: importlib.import_module(name) for name in ("distributed", "scaling")}
        # Module names as short as `report` must not stay behind for other imports.
        for path in (ROOT / "bench").glob("*.py"):
            sys.modules.pop(path.stem, None)


@pytest.fixture(scope="module")
def paths(bench: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    measured = tmp_path_factory.mktemp("bench") / "distributed.json"
    arguments = ["--parameters", "20", "100", "--rounds", "1", "--output", str(measured)]
    assert bench["distributed"].main(arguments) == 0
    simulated = measured.with_name("scaling.json")
    assert bench["scaling"].main([str(measured), "--output", str(simulated)]) == 0
    return [measured, simulated]


def test_every_row_counts_the_collectives(paths: list[Path]) -> None:
    rows = json.loads(paths[0].read_text())["rows"]
    cases = [(row["ranks"], row["parameters"], row["kind"]) for row in rows]
    assert cases == [
        (ranks, count, kind)
        for ranks in (1, 2)
        for count in (20, 100)
        for kind in ("quiet", "clip")
    ]
    for row in rows:
        ways = row["implementations"]
        assert row["ratio"] == ways["torch"]["median_us"] / ways["gradclip_ext"]["median_us"]
        expected = row["ranks"] - 1
        assert ways["gradclip_ext"]["collectives"] == expected
        assert ways["GradClipper.clip_"]["collectives"] == expected
        assert ways["local"]["collectives"] == 0


def test_wrong_results_are_not_timed(bench: dict[str, ModuleType]) -> None:
    module = bench["distributed"]
    flat = torch.ones(16)
    gradients = module.Gradients([], [], flat, flat.clone(), 4.0)
    module.require_right("right", lambda: torch.tensor(4.0), gradients, 100.0)
    with pytest.raises(SystemExit, match="wrong"):
        module.require_right("wrong", lambda: torch.tensor(4.1), gradients, 100.0)
    with pytest.raises(SystemExit, match="wrong"):
        module.require_right("not clipped", lambda: torch.tensor(4.0), gradients, 1.0)


def row_of(path: Path, **wanted: Any) -> dict[str, Any]:
    rows = json.loads(path.read_text())["rows"]
    (row,) = (row for row in rows if wanted.items() <= row.items())
    return row["ways"]


@pytest.mark.parametrize(
    "layout,ours,torchs,titans",
    [
        ("fsdp", 1, 2, 1),
        ("hsdp", 2, 2, 1),
        ("3d", 3, None, 3),
        # The dimension of tensor parallel is in both meshes.
        ("3d+ep", 5, None, 6),
    ],
)
def test_collectives_of_a_layout(paths: list[Path], layout, ours, torchs, titans) -> None:
    ways = row_of(paths[1], layout=layout, ranks=4096, parameters=5000)
    found = {name: way["collectives"] for name, way in ways.items()}
    assert found["gradclip_ext"] == found["GradClipper.clip_"] == ours
    assert found.get("torch") == torchs
    assert found["torch, as torchtitan"] == titans


def test_wire_time_is_that_of_a_tree(bench: dict[str, ModuleType]) -> None:
    scaling = bench["scaling"]
    constants = {"base": 10.0, "nvlink": 1.0, "network": 100.0, "bandwidth": 1000.0}
    assert scaling.wire(scaling.Ranks(8, 1), 500, constants) == 10 + 2 * 7 + 1
    # 64 ranks on 8 nodes: 7 hops within a node, 3 levels among nodes.
    assert scaling.wire(scaling.Ranks(64, 1), 0, constants) == pytest.approx(
        10 + 2 * (7 * 1.8 + 3 * 100)
    )
    # One rank on each node.
    assert scaling.wire(scaling.Ranks(16, 8), 0, constants) == 10 + 2 * 4 * 100


def test_host_times_are_fitted(bench: dict[str, ModuleType]) -> None:
    rows = [
        {
            "ranks": ranks,
            "kind": "clip",
            "parameters": count,
            "implementations": {
                "x": {"median_us": 30.0 + 2.0 * count + 80.0 * (ranks - 1), "collectives": 2}
            },
        }
        for ranks in (1, 2)
        for count in (100, 1000, 20000)
    ]
    host = bench["scaling"].host_of({"rows": rows}, "x", "clip")
    assert host == pytest.approx((30.0, 2.0, 40.0))


def test_the_plot_lies_beside_the_data(paths: list[Path]) -> None:
    assert paths[1].with_suffix(".png").read_bytes().startswith(b"\x89PNG")
