"""Plots a report of clip.py.

    python bench/plot.py bench/results/NAME.json

Writes NAME-speedup.png, NAME-bytes.png, NAME-tensors.png and NAME-error.png next to the JSON file.
They show one dtype, and the workloads that exist in another one only.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from json import loads
from pathlib import Path
from typing import Any

from figures import BLACK, BLUE, SKY_BLUE, STYLES, finish, microseconds
from implementations import OURS, REFERENCE
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Row = dict[str, Any]

KINDS = {
    "quiet": "norm below max_norm: nothing to change",
    "clip": "norm above max_norm: gradients are scaled",
}
KIND_COLORS = {"quiet": BLUE, "clip": SKY_BLUE}
# Below this, the number of tensors matters more than their size.
SMALL_BYTES = 2**20
# Zero has no logarithm: an exact result is drawn at the smallest error times this.
EXACT = 1e-2


def of_kind(rows: list[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def name_of(row: Row) -> str:
    return row["workload"] if row["dtype"] == "float32" else f"{row['workload']}, {row['dtype']}"


def caption(report: dict[str, Any]) -> str:
    threads = f"{report['threads']} thread{'s' if report['threads'] > 1 else ''}"
    device = report.get("gpu") or f"{report['processor']}, {threads}"
    return f"{device}; torch {report['torch']}; {report['date'][:10]}"


def titled_figure(
    report: dict[str, Any], title: str, size: tuple[float, float], columns: int = 1
) -> tuple[Figure, list[Axes]]:
    # Not pyplot, which may try to open a window.
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{title}\n", fontsize=13, weight="bold")
    figure.text(0.5, 0.985 - 0.27 / size[1], caption(report), ha="center", va="top", fontsize=9)
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)
    return figure, list(axes[0])


def speedup(report: dict[str, Any]) -> Figure:
    """Bars of the time of torch over ours."""
    rows = report["rows"]
    names = list(dict.fromkeys(name_of(row) for row in rows))[::-1]
    figure, (axes,) = titled_figure(
        report, "How many times faster than torch.nn.utils", (9, 1.9 + 0.42 * len(names))
    )
    for place, kind in enumerate(KINDS):
        selected = of_kind(rows, kind)
        heights = [names.index(name_of(row)) + 0.2 - 0.4 * place for row in selected]
        ratios = [row["ratio"] for row in selected]
        # Bars start at 1, so that one to the left means slower.
        axes.barh(
            heights,
            [ratio - 1 for ratio in ratios],
            0.38,
            left=1,
            color=KIND_COLORS[kind],
            label=KINDS[kind],
        )
        for height, ratio in zip(heights, ratios, strict=True):
            axes.annotate(
                f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}",
                (ratio, height),
                xytext=(3 if ratio >= 1 else -3, 0),
                textcoords="offset points",
                ha="left" if ratio >= 1 else "right",
                va="center",
                fontsize=8,
            )
    axes.set_xscale("log")
    all_ratios = [row["ratio"] for kind in KINDS for row in of_kind(rows, kind)]
    axes.set_xlim(min(0.8, min(all_ratios) / 1.3), max(all_ratios) * 1.3)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color=BLACK, linewidth=1.2)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    finish(axes, "", "time of torch / time of gradclip_ext (log scale; 1 = as fast)", "")
    axes.grid(False, axis="y")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def number_of_bytes(value: float, _: object) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"


def draw_times(axes: Axes, rows: list[Row], x: str) -> None:
    """Medians as points, error bars from the 20 % to the 80 % quantile."""
    for name, style in STYLES.items():
        values = [row["implementations"][name] for row in rows]
        medians = [value["median_us"] for value in values]
        axes.errorbar(
            [row[x] for row in rows],
            medians,
            yerr=[
                [max(0.0, value["median_us"] - value["q20_us"]) for value in values],
                [max(0.0, value["q80_us"] - value["median_us"]) for value in values],
            ],
            linestyle="none",
            elinewidth=1.2,
            markersize=6,
            **style,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(microseconds))


def time_against_bytes(report: dict[str, Any]) -> Figure:
    figure, panels = titled_figure(
        report, "Time of a call against the size of the gradients", (12, 6), len(KINDS)
    )
    for axes, (kind, title) in zip(panels, KINDS.items(), strict=True):
        rows = sorted(of_kind(report["rows"], kind), key=lambda row: row["bytes"])
        draw_times(axes, rows, "bytes")
        passes = "one read" if kind == "quiet" else "one read + one in-place multiplication"
        axes.plot(
            [row["bytes"] for row in rows],
            [row["roofline_us"] for row in rows],
            color=BLACK,
            linewidth=1.2,
            linestyle="--",
            label=f"roofline: {passes}",
        )
        for row in rows:
            if row["dtype"] in ("float32", "mixed"):
                axes.annotate(
                    row["workload"],
                    (row["bytes"], row["implementations"][REFERENCE]["q80_us"]),
                    xytext=(0, 6),
                    textcoords="offset points",
                    # Upright, because the large models are close together.
                    rotation=90,
                    ha="center",
                    fontsize=7,
                    color="0.35",
                )
        axes.xaxis.set_major_formatter(FuncFormatter(number_of_bytes))
        finish(axes, title, "bytes of all gradients", "")
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    panels[0].set_ylabel("median time, 20 % to 80 % quantile")
    lowest, highest = panels[0].get_ylim()
    # Room for the names above the highest points.
    panels[0].set_ylim(lowest, highest * 8)
    return figure


def time_against_tensors(report: dict[str, Any]) -> Figure:
    figure, panels = titled_figure(
        report,
        "Time of a call against the number of tensors, gradients below 1 MiB",
        (12, 5.5),
        len(KINDS),
    )
    for axes, (kind, title) in zip(panels, KINDS.items(), strict=True):
        rows = [row for row in of_kind(report["rows"], kind) if row["bytes"] < SMALL_BYTES]
        draw_times(axes, rows, "tensors")
        for row in rows:
            if row["dtype"] == "float32":
                axes.annotate(
                    row["workload"],
                    (row["tensors"], row["implementations"][OURS]["median_us"]),
                    xytext=(5, -10),
                    textcoords="offset points",
                    fontsize=7,
                    color="0.35",
                )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.margins(x=0.12, y=0.12)
        finish(axes, title, "tensors", "")
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    panels[0].set_ylabel("median time, 20 % to 80 % quantile")
    return figure


def error_of_norm(report: dict[str, Any]) -> Figure:
    rows = of_kind(report["rows"], "clip") or of_kind(report["rows"], "quiet")
    names = [name_of(row) for row in rows][::-1]
    figure, (axes,) = titled_figure(
        report,
        "Relative error of the norm, against float64",
        (9, 1.9 + 0.32 * len(rows)),
    )
    places = [names.index(name_of(row)) for row in rows]
    found = {
        name: [row["implementations"][name]["relative_error"]["norm"] for row in rows]
        for name in STYLES
    }
    errors = [error for values in found.values() for error in values]
    exact = EXACT * min((error for error in errors if error > 0), default=1e-16)
    found = {name: [error or exact for error in values] for name, values in found.items()}
    axes.hlines(places, *found.values(), color="0.8", linewidth=2, zorder=1)
    # An open square, so that a point inside stays visible.
    sizes = {REFERENCE: {"s": 70, "facecolors": "none", "linewidths": 2}, OURS: {"s": 30}}
    for name, style in STYLES.items():
        axes.scatter(found[name], places, zorder=2, **sizes[name], **style)
    if 0 in errors:
        axes.annotate("exact", (exact, len(names) - 0.5), ha="center", fontsize=9)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names))
    finish(axes, "", "relative error of the returned norm (log scale; left is better)", "")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


FIGURES = {
    "speedup": speedup,
    "bytes": time_against_bytes,
    "tensors": time_against_tensors,
    "error": error_of_norm,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="JSON file of clip.py")
    parser.add_argument("--dtype", default="float32", help="rows to plot (default: float32)")
    options = parser.parse_args(arguments)
    report = loads(options.report.read_text())
    in_dtype = {row["workload"] for row in report["rows"] if row["dtype"] == options.dtype}
    report["rows"] = [
        row
        for row in report["rows"]
        if row["dtype"] == options.dtype or row["workload"] not in in_dtype
    ]
    missing = [kind for kind in KINDS if not of_kind(report["rows"], kind)]
    if missing:
        parser.error(f"{options.report} has no rows of kind {' and '.join(missing)}")
    for name, draw in FIGURES.items():
        path = options.report.with_name(f"{options.report.stem}-{name}.png")
        draw(report).savefig(path, dpi=150)
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
