"""Lists the rows of a report of clip.py that take too long beside the roofline.

    python bench/shortfalls.py bench/results/NAME.json

From 20 MB up memory bandwidth decides, and clip_grad_norm_ is to be within 5 % of the roofline.
bench/NOTES.md explains rows that are not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import Table

KINDS = ("quiet", "clip")
LEAST_BYTES = 20_000_000
LARGEST_RATIO = 1.05

COLUMNS = {
    "workload": -15,
    "dtype": -8,
    "kind": -5,
    "MB": 8,
    "roofline us": 11,
    "ours us": 9,
    "ours/roofline": 13,
}


def shortfalls(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of large lists above LARGEST_RATIO, the worst first."""
    found = [
        row
        for row in rows
        if row["kind"] in KINDS
        and row["bytes"] >= LEAST_BYTES
        and row["ratio_to_roofline"] > LARGEST_RATIO
    ]
    return sorted(found, key=lambda row: -row["ratio_to_roofline"])


def line_of(table: Table, row: dict[str, Any]) -> str:
    return table.line(
        [
            row["workload"],
            row["dtype"],
            row["kind"],
            f"{row['bytes'] / 1e6:.3f}",
            f"{row['roofline_us']:.1f}",
            f"{row['implementations']['gradclip_ext']['median_us']:.1f}",
            f"{row['ratio_to_roofline']:.3f}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="JSON file of clip.py")
    rows = json.loads(parser.parse_args(arguments).report.read_text())["rows"]
    large = [row for row in rows if row["kind"] in KINDS and row["bytes"] >= LEAST_BYTES]
    found = shortfalls(rows)
    print(
        f"Above {LARGEST_RATIO} times the roofline from {LEAST_BYTES / 1e6:.0f} MB up: "
        f"{len(found) or 'none'} of {len(large)} rows"
    )
    if found:
        table = Table(COLUMNS)
        print(table.head())
        for row in found:
            print(line_of(table, row))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
