"""The benchmark of GradClipper in bench/: a quick run, and that it detects wrong results."""

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
pytest.importorskip("numpy")

ROOT = Path(__file__).resolve().parents[2]
OURS, HAND, BARE = "gradclip_ext", "by hand", "gradclip_ext, bare"


@pytest.fixture(scope="module")
def clipper() -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    # On a busy machine two threads would wait for each other.
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
        yield importlib.import_module("clipper")
        # Module names as short as `report` must not stay behind for other imports.
        for path in (ROOT / "bench").glob("*.py"):
            sys.modules.pop(path.stem, None)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def report(clipper: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "new" / "clipper.json"
    arguments = ["--workloads", "small", "--seconds", "0", "--threads", "1"]
    assert clipper.main([*arguments, "--output", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.fixture
def model(clipper: ModuleType) -> Any:
    workload = importlib.import_module("workloads").WORKLOADS["many_small_10"]
    return clipper.Model(workload, torch.device("cpu"))


def test_report_has_a_row_for_every_case(clipper: ModuleType, report: dict[str, Any]) -> None:
    rows = [(row["case"], row["kind"]) for row in report["rows"]]
    assert rows == [(name, kind) for name, case in clipper.CASES.items() for kind in case.kinds]
    assert report["device"] == "cpu"
    assert report["torch"] == torch.__version__


def test_ratios_come_from_the_medians(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        medians = {name: values["median_us"] for name, values in row["implementations"].items()}
        assert row["ratio"] == medians[HAND] / medians[OURS]
        assert row["ratio_to_bare"] == medians[OURS] / medians[BARE]
        for values in row["implementations"].values():
            assert 0 < values["q20_us"] <= values["median_us"] <= values["q80_us"]


def test_every_way_gives_the_same(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        for name, values in row["implementations"].items():
            if name.startswith(BARE):
                assert "relative_error" not in values
            else:
                assert values["relative_error"] < 2e-6
                assert values["believable"]


def test_quiet_steps_change_nothing_and_clipping_ones_everything(
    clipper: ModuleType, model: Any
) -> None:
    for name, case in clipper.CASES.items():
        if name == "weight_decay":
            continue
        for kind in case.kinds:
            for way in case.ways.values():
                clipper.done(way(model, kind))
                pairs = zip(model.gradients, model.originals, strict=True)
                same = [torch.equal(gradient, original) for gradient, original in pairs]
                assert all(same) if kind == "quiet" else not any(same), (name, kind)


def test_every_call_makes_the_same_step(clipper: ModuleType, model: Any) -> None:
    for name in ("autoclip", "zclip", "adagc"):
        for way in clipper.CASES[name].ways.values():
            prepared = way(model, "clip")
            results = []
            for _ in range(3):
                found = clipper.done(prepared)
                results.append((found, [gradient.clone() for gradient in model.gradients]))
            for found, gradients in results[1:]:
                assert found == results[0][0]
                assert all(map(torch.equal, gradients, results[0][1]))


def test_a_wrong_result_of_ours_stops_the_run(clipper: ModuleType, model: Any) -> None:
    def clips_too_much(model: Any, kind: str) -> Any:
        call = clipper.ours_clip(model, kind).call

        def wrong() -> None:
            call()
            model.gradients[0].mul_(0.999)

        return clipper.Prepared(model.restore, wrong)

    def says_too_little(model: Any, kind: str) -> Any:
        prepared = clipper.ours_clip(model, kind)
        return clipper.Prepared(
            prepared.restore,
            prepared.call,
            lambda result: [0.999 * norm for norm in prepared.read(result)],
        )

    right = clipper.CASES["clip"].ways
    for wrong in (clips_too_much, says_too_little):
        case = clipper.Case({**right, OURS: wrong})
        with pytest.raises(SystemExit, match="gradclip_ext is wrong"):
            clipper.checked(case, "clip", model)
        # In another implementation it is only recorded.
        case = clipper.Case({**right, "torch foreach": wrong})
        errors = clipper.checked(case, "clip", model)
        assert errors["torch foreach"] == pytest.approx(0.001, rel=1e-2)
