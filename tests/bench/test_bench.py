"""The benchmarks in bench/: a quick run of each, and the workloads that they measure."""

from __future__ import annotations

import ast
import importlib
import json
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS_AND_MODULES = sorted((ROOT / "bench").glob("*.py"))
# Published counts: tensors, elements, and elements of the largest tensor.
COUNTS = {
    "one_scalar": (1, 1, 1),
    "many_small_10": (10, 80, 8),
    "many_small_100": (100, 800, 8),
    "many_small": (1000, 8000, 8),
    "small": (20, 41_600, 64 * 64),
    "lstm": (6, 295_434, 1024 * 256),
    "mlp": (6, 669_706, 512 * 784),
    "1000x1000": (1000, 1_000_000, 1000),
    "mobilenet_v3": (174, 5_483_032, 1280 * 1000),
    "mixed_500_small": (500, 14_061_300, 256 * 256),
    "resnet50": (161, 25_557_032, 512 * 512 * 3 * 3),
    "one_huge": (1, 67_108_864, 8192 * 8192),
    "vit_b": (152, 86_567_656, 3072 * 768),
    "gpt2": (148, 124_439_808, 50257 * 768),
    "mixed_500": (500, 225_000_000, 1024 * 1024),
    "one_1536m": (1, 1_536_000_000, 1_536_000_000),
    "llama3_8b": (291, 8_030_261_248, 128256 * 4096),
}
QUICK_WORKLOADS = ["one_scalar", "small"]
EVERYWHERE = {"torch", "gradclip_ext", "torch foreach=False", "textbook loop"}


@pytest.fixture(scope="module", autouse=True)
def bench_on_path() -> Iterator[None]:
    threads = torch.get_num_threads()
    # On a busy machine two threads would wait for each other.
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # step.py adds the folder of the demo, which is removed with the rest.
        patch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
        yield
        # Module names as short as `clip` and `report` must not stay behind for other imports.
        for path in SCRIPTS_AND_MODULES:
            sys.modules.pop(path.stem, None)
    torch.set_num_threads(threads)


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def report_path(bench_on_path: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "new" / "quick.json"
    arguments = ["--suite", "ci", "--seconds", "0", "--threads", "1", "--output", str(path)]
    assert module("clip").main([*arguments, "--workloads", *QUICK_WORKLOADS]) == 0
    return path


@pytest.fixture(scope="module")
def report(report_path: Path) -> dict[str, Any]:
    return json.loads(report_path.read_text())


def imported_names(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


def test_no_script_imports_a_script() -> None:
    examples = sorted((ROOT / "examples").glob("*.py"))
    sources = {path.stem: path.read_text() for path in [*SCRIPTS_AND_MODULES, *examples]}
    scripts = {name for name, text in sources.items() if '\nif __name__ == "__main__":\n' in text}
    assert scripts == {
        *("clip", "clipper", "step", "instructions", "plot", "shortfalls"),
        *("distributed", "scaling"),
        *("amp_train", "char_rnn", "fsdp2_train", "watch_norms"),
    }
    imports = {name: imported_names(ast.parse(text)) & scripts for name, text in sources.items()}
    assert not any(imports.values()), imports


def test_workloads_are_those_of_the_results() -> None:
    workloads = module("workloads")
    paths = sorted((ROOT / "bench" / "results").glob("cl*.json"))
    rows = [row for path in paths for row in json.loads(path.read_text())["rows"]]
    assert rows
    for row in rows:
        shapes = workloads.WORKLOADS[row["workload"]].shapes
        dtypes = workloads.WORKLOADS[row["workload"]].dtypes or [row["dtype"]] * len(shapes)
        sizes = [
            math.prod(shape) * workloads.DTYPES[dtype].itemsize
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        assert (row["tensors"], row["elements"]) == (len(shapes), sum(map(math.prod, shapes)))
        assert row.get("bytes", sum(sizes)) == sum(sizes)


def test_workloads_have_the_published_counts() -> None:
    workloads = module("workloads").WORKLOADS
    counts = {
        name: (len(w.shapes), w.elements, max(map(math.prod, w.shapes)))
        for name, w in workloads.items()
    }
    assert counts == COUNTS
    # In ascending order of elements.
    elements = [w.elements for w in workloads.values()]
    assert elements == sorted(elements)


def test_mixed_workload_has_gradients_of_both_dtypes() -> None:
    workloads = module("workloads")
    mixed = workloads.Gradients(
        workloads.WORKLOADS["mixed_500_small"], "mixed", torch.device("cpu")
    )
    dtypes = [gradient.dtype for gradient in mixed.gradients]
    assert dtypes.count(torch.bfloat16) == dtypes.count(torch.float32) == 250
    assert mixed.bytes == sum(gradient.nbytes for gradient in mixed.gradients)


def test_report_has_a_row_for_every_case(report: dict[str, Any]) -> None:
    rows = [(row["workload"], row["dtype"], row["kind"]) for row in report["rows"]]
    assert rows == [
        (workload, dtype, kind)
        for workload in QUICK_WORKLOADS
        for dtype in ("float32", "bfloat16")
        for kind in ("quiet", "clip", "value")
    ]
    assert report["device"] == "cpu" and report["threads"] == 1
    assert report["torch"] == torch.__version__


def test_ratios_come_from_the_medians(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        implementations = row["implementations"]
        assert implementations.keys() >= EVERYWHERE
        ours = implementations["gradclip_ext"]
        assert row["ratio"] == implementations["torch"]["median_us"] / ours["median_us"]
        assert row["ratio_to_roofline"] == ours["median_us"] / row["roofline_us"]
        for values in implementations.values():
            assert 0 < values["q20_us"] <= values["median_us"] <= values["q80_us"]
            assert values["calls"] >= 7


def test_roofline_is_the_faster_read_and_where_needed_a_multiplication(
    report: dict[str, Any],
) -> None:
    for row in report["rows"]:
        medians = {name: values["median_us"] for name, values in row["rooflines"].items()}
        reads = [median for name, median in medians.items() if name.startswith("read")]
        expected = {
            "quiet": lambda m=medians, r=reads: min(r),
            "clip": lambda m=medians, r=reads: min(r) + m["multiply after read"],
            "value": lambda m=medians, r=reads: m["multiply"],
        }[row["kind"]]()
        assert row["roofline_us"] == expected


def test_the_raw_read_is_reported_beside_the_roofline(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        assert ("raw read" in row["rooflines"]) == (row["kind"] != "value")


def test_roofline_is_restored_piece_by_piece_as_the_gradients_are() -> None:
    workloads = module("workloads")
    device = torch.device("cpu")
    for name, dtype in (("small", "bfloat16"), ("one_scalar", "float32"), ("lstm", "float64")):
        gradients = workloads.Gradients(workloads.WORKLOADS[name], dtype, device)
        assert len(gradients.flat_pieces) == len(gradients.gradients)
        for piece, gradient in zip(gradients.flat_pieces, gradients.gradients, strict=True):
            assert abs(piece.nbytes - gradient.nbytes) < 12
        assert 0 <= gradients.flat.nbytes - gradients.bytes < 8
        gradients.flat.zero_()
        gradients.restore_flat()
        assert bool((gradients.flat == torch.tensor(workloads.SIGMA)).all())


def test_shortfalls_are_large_rows_above_the_roofline(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shortfalls = module("shortfalls")
    row = next(row for row in report["rows"] if row["kind"] == "quiet")
    large = {**row, "bytes": 20_000_000, "ratio_to_roofline": 1.06}
    rows = [
        large,
        {**large, "ratio_to_roofline": 1.05},
        {**large, "bytes": 19_999_999},
        {**large, "kind": "value"},
        {**large, "kind": "clip", "ratio_to_roofline": 1.2},
    ]
    found = shortfalls.shortfalls(rows)
    assert found == [rows[4], rows[0]]
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"rows": rows}))
    assert shortfalls.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Above 1.05 times the roofline from 20 MB up: 2 of 3 rows"
    assert [line.split()[-1] for line in lines[3:]] == ["1.200", "1.060"]
    path.write_text(json.dumps({"rows": [rows[1]]}))
    shortfalls.main([str(path)])
    assert (
        capsys.readouterr().out == "Above 1.05 times the roofline from 20 MB up: none of 1 rows\n"
    )


def test_an_interrupted_run_keeps_its_rows(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = module("clip")
    rows = iter(report["rows"][:2])

    def row_of(*_: object) -> dict[str, Any]:
        for row in rows:
            return row
        raise KeyboardInterrupt

    monkeypatch.setattr(clip, "row_of", row_of)
    path = tmp_path / "report.json"
    with pytest.raises(KeyboardInterrupt):
        clip.main(["--workloads", "one_scalar", "--threads", "1", "--output", str(path)])
    # All of one workload, so that the file was not only written between workloads.
    assert json.loads(path.read_text())["rows"] == report["rows"][:2]
    assert list(tmp_path.iterdir()) == [path]


def test_errors_are_within_the_tolerance(report: dict[str, Any]) -> None:
    tolerances = {"float32": 2e-7, "bfloat16": 4e-3}
    for row in report["rows"]:
        error = row["implementations"]["gradclip_ext"]["relative_error"]
        assert (error["norm"] is None) == (row["kind"] == "value")
        assert (error["norm"] or 0.0) <= tolerances[row["dtype"]]
        assert error["gradients"] <= tolerances[row["dtype"]]


def test_a_wrong_result_of_ours_stops_the_run(tmp_path: Path) -> None:
    clip = module("clip")
    wrong = clip.Implementation("gradclip_ext", lambda parameters, _: torch.ones(()), None)
    workload = module("workloads").WORKLOADS["small"]
    gradients = module("workloads").Gradients(workload, "float32", torch.device("cpu"))
    with pytest.raises(SystemExit, match="gradclip_ext is wrong"):
        clip.checked(wrong, "clip", "float32", gradients)
    textbook = clip.Implementation("other", wrong.clip_norm, None)
    assert not clip.checked(textbook, "clip", "float32", gradients)["believable"]
    assert clip.checked(textbook, "value", "float32", gradients) is None


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_check_leaves_the_originals_alone(dtype: str) -> None:
    clip, workloads = module("clip"), module("workloads")
    device = torch.device("cpu")
    gradients = workloads.Gradients(workloads.WORKLOADS["small"], dtype, device)
    before = [original.clone() for original in gradients.originals]
    ours = clip.implementations(device, with_compile=False)[1]
    for kind in clip.KINDS:
        verdict = clip.checked(ours, kind, dtype, gradients)
        assert verdict["believable"]
        assert clip.largest(verdict["relative_error"]) <= clip.TOLERANCE[dtype]
    assert all(map(torch.equal, gradients.originals, before))


def test_plots_are_pictures(report_path: Path) -> None:
    assert module("plot").main([str(report_path)]) == 0
    for name in ("speedup", "bytes", "tensors", "error"):
        picture = report_path.with_name(f"quick-{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_step_benchmark_reports_shares(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    arguments = ["--models", "transformer", "--steps", "2", "--threads", "1"]
    assert module("step").main([*arguments, "--output", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["model"] == "transformer"
    medians = {}
    for name, values in row["implementations"].items():
        medians[name] = values["clip"]["median_us"]
        assert values["share"] == pytest.approx(medians[name] / values["step"]["median_us"])
        assert 0 < values["share"] < 1
    assert row["clip_ratio"] == medians["torch"] / medians["gradclip_ext"]


class TestTuning:
    def test_reaches_the_engine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clip = module("clip")
        found = {}
        monkeypatch.setattr(clip, "_C", types.SimpleNamespace(set_tuning=found.__setitem__))
        options = clip.parse_arguments(["--tuning", "early_start=0", "one_block_tensors=20"])
        assert found == dict(options.tuning) == {"early_start": 0, "one_block_tensors": 20}

    def test_of_another_build(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            module("clip").parse_arguments(["--tuning", "early_start=0"])
        assert "needs a build with GRADCLIP_TUNING=1" in capsys.readouterr().err

    def test_unknown_names(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def set_tuning(name: str, value: int) -> None:
            raise ValueError(f"set_tuning: there is no {name}")

        clip = module("clip")
        monkeypatch.setattr(clip, "_C", types.SimpleNamespace(set_tuning=set_tuning))
        with pytest.raises(SystemExit):
            clip.parse_arguments(["--tuning", "threads=1"])
        assert "there is no threads" in capsys.readouterr().err


def test_step_benchmark_times_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates, step = module("updates"), module("step")
    # The shapes of a small model, so that it takes a second.
    monkeypatch.setattr(updates, "SHAPES", ("mlp",))
    path = tmp_path / "updates.json"
    arguments = ["--updates", "mlp", "--seconds", "0", "--threads", "1", "--output", str(path)]
    assert step.main(arguments) == 0
    report = json.loads(path.read_text())
    rows = {(row["part"], row["kind"]): row["implementations"] for row in report["rows"]}
    assert len(rows) == 8
    clipped = rows["step", "clip"]
    assert [values["bytes"] for values in clipped.values()] == [28, 40, 40, 36]
    scaled = rows["step with scaler", "clip"]
    assert [values["bytes"] for values in scaled.values()] == [40, 48, 40, 36]
    medians = {name: values["median_us"] for name, values in clipped.items()}
    extra = medians["clip_and_step"] - medians["no clipping"]
    expected = extra / (medians["clip + step"] - medians["no clipping"])
    ratios = report["ratios"]["mlp"]
    assert ratios["extra of clip_and_step / extra of clip + step"] == pytest.approx(expected)
    yardstick = rows["step", "quiet"]["no clipping"]
    assert yardstick["measured_bytes"] == pytest.approx(28.0)


def test_updates_that_leave_wrong_gradients_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = module("updates")
    update = updates.Update("mlp", torch.device("cpu"))
    max_norm = update.model.norm / 2
    way = update.ways(max_norm)["clip + step"]
    update.check(way, update.restore, max_norm)
    with pytest.raises(SystemExit, match="wrong gradients"):
        update.check(way, update.restore, 2 * max_norm)
