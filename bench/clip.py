"""Times gradient clipping on gradients with the shapes of real models.

    python bench/clip.py                  # every workload in float32, minutes
    python bench/clip.py --suite ci       # a few small ones, seconds
    python bench/clip.py --suite full     # every workload in every dtype
    python bench/clip.py --suite gpu --device cuda
    python bench/plot.py bench/results/NAME.json

Within a run everything takes turns: our function, torch's with each value of foreach, the textbook
loop, other libraries that are installed, and the roofline. Gradients are restored before every
call, and every result is checked against float64 before anything is timed. Quote the ratios:
absolute times depend on what else the machine does.

Kinds: "quiet" is a norm below max_norm, where nothing has to change; "clip" is one above; "value"
is clip_grad_value_ at one standard deviation.

The roofline is the least time that memory bandwidth allows, measured on one contiguous buffer of
as many bytes that is restored as the gradients are: for quiet one read, the fastest of several; for
clip that and an in-place multiplication; for value the multiplication alone. GB/s counts each of
these passes: 1 for quiet, 3 for clip, 2 for value. "raw read" in the data is one of the reads after
the buffer was filled in place, which leaves more of it in cache.

On CUDA a call starts on an idle GPU with a cold L2 cache. Its time is that between the events
before and after it, launch overhead included. "device" is the time with launches hidden behind work
queued earlier, "host" how long the call blocks the host. The table shows all three in microseconds,
our device time by that of the roofline, and the kernels per call as the profiler counts them,
torch's and ours. "copy" is a device-to-device copy whose reads and writes add up to the bytes of
the gradients; both bandwidths are in the data, the largest of each below the table.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from clocks import Call, Clock, clock_for, launches, measured
from implementations import OURS, REFERENCE, Implementation, implementations
from report import Table, default_path, environment, save
from tqdm import tqdm
from workloads import DTYPES, SIGMA, WORKLOADS, Gradients, Workload

import gradclip_ext
from gradclip_ext import _C

KINDS = ("quiet", "clip", "value")
# Reads and writes of all gradients that the roofline counts.
PASSES = {"quiet": 1, "clip": 3, "value": 2}

# Largest relative error of our norm, which is rounded to the dtype of the result, and of a clipped
# element relative to the largest. More is a bug, and nothing is timed.
TOLERANCE = {"float64": 1e-13, "float32": 2e-7, "bfloat16": 4e-3, "float16": 1e-3, "mixed": 4e-3}
# Beyond this, the result of another implementation counts as wrong. It is timed, but marked: a
# bfloat16 sum over many tensors, as in the textbook loop, is off by much more.
BELIEVABLE = {"float64": 1e-9, "float32": 1e-2, "bfloat16": 5e-2, "float16": 5e-2, "mixed": 5e-2}

SUITES: dict[str, dict[str, Any]] = {
    "ci": {
        "workloads": ["one_scalar", "many_small_100", "small", "lstm"],
        "dtypes": ["float32", "bfloat16"],
        "seconds": 0.05,
    },
    # Fits into the time that tools/gpu_check.sh allows.
    "gpu": {
        "workloads": ["small", "lstm", "1000x1000", "resnet50", "gpt2"]
        + ["mixed_500", "one_1536m", "llama3_8b"],
        "dtypes": ["float32"],
        "kinds": ["quiet", "clip"],
        "seconds": 1.0,
    },
    "default": {"dtypes": ["float32"], "seconds": 4.0},
    "full": {"dtypes": list(DTYPES), "seconds": 4.0},
}

COLUMNS = {
    "workload": -15,
    "dtype": -8,
    "kind": -5,
    "tensors": 7,
    "MB": 8,
    "torch us": 10,
    "ours us": 9,
    "20 % .. 80 %": 19,
    "torch/ours": 10,
    "roofline us": 11,
    "ours/roofline": 13,
    "GB/s": 7,
    "fastest other": -29,
}

# Fits into 160 characters. The ratio to the roofline is that of device times.
CUDA_COLUMNS = {
    "workload": -15,
    "dtype": -8,
    "kind": -5,
    "tensors": 7,
    "MB": 8,
    "torch us": 9,
    "ours us": 9,
    "torch/ours": 10,
    "torch device": 12,
    "ours device": 11,
    "ours/roofline": 13,
    "torch host": 10,
    "ours host": 9,
    "launches": 8,
}


def roofline_call(implementation: str, gradients: Gradients) -> tuple[Call, Call]:
    """What to call, untimed and timed, for one of ROOFLINES."""
    flat, flat_as_float64 = gradients.flat, gradients.flat_as_float64
    first_half, second_half = flat.chunk(2)

    def restore_and_read() -> None:
        gradients.restore_flat()
        gradclip_ext.get_total_norm(flat_as_float64)

    return {
        "read, gradclip_ext float64": (
            gradients.restore_flat,
            lambda: gradclip_ext.get_total_norm(flat_as_float64),
        ),
        "read, torch.sum float64": (gradients.restore_flat, lambda: torch.sum(flat_as_float64)),
        "read, torch.sum float32": (gradients.restore_flat, lambda: torch.sum(flat)),
        "raw read": (gradients.refill_flat, lambda: torch.sum(flat)),
        "multiply": (gradients.restore_flat, lambda: flat.mul_(0.5)),
        # After an untimed read, which leaves in the cache what fits.
        "multiply after read": (restore_and_read, lambda: flat.mul_(0.5)),
        "copy": (gradients.restore_flat, lambda: second_half.copy_(first_half)),
    }[implementation]


READS = ("read, gradclip_ext float64", "read, torch.sum float64", "read, torch.sum float32")
ROOFLINES = {
    "quiet": (*READS, "raw read", "copy"),
    "clip": (*READS, "raw read", "multiply after read", "copy"),
    "value": ("multiply", "copy"),
}


def roofline(kind: str, medians: dict[str, float]) -> float:
    """The least time for a kind, from the medians of its ROOFLINES."""
    if kind == "value":
        return medians["multiply"]
    read = min(medians[name] for name in READS)
    return read + medians["multiply after read"] if kind == "clip" else read


def bandwidths(gradients: Gradients, medians: dict[str, float]) -> dict[str, float]:
    """GB/s of the fastest read and of the copy, from medians in microseconds."""
    times = {"copy": medians["copy"]}
    if all(name in medians for name in READS):
        times["read"] = min(medians[name] for name in READS)
    return {name: gradients.bytes / time / 1e3 for name, time in times.items()}


def threshold_of(kind: str, gradients: Gradients) -> float:
    """The second argument of the call: max_norm or clip_value."""
    return {"quiet": gradients.norm * 10, "clip": gradients.norm / 2, "value": SIGMA}[kind]


def function_of(implementation: Implementation, kind: str) -> Callable[..., Any] | None:
    return implementation.clip_value if kind == "value" else implementation.clip_norm


def errors(gradients: Gradients, kind: str, found: torch.Tensor | None) -> dict[str, float | None]:
    """Relative errors of a call that has just been made, against float64.

    The error of an element is relative to the largest element of its tensor.
    """
    threshold = threshold_of(kind, gradients)
    # Kept on the device, so that one number is read back for the whole list.
    worst = torch.zeros((), dtype=torch.float64, device=gradients.flat.device)
    for gradient, original in zip(gradients.gradients, gradients.originals, strict=True):
        expected = original.to(torch.float64, copy=True)
        if kind == "value":
            expected.clamp_(-threshold, threshold)
        else:
            expected.mul_(min(1.0, threshold / (gradients.norm + 1e-6)))
        largest = expected.abs().max()
        error = expected.sub_(gradient).abs_().max() / largest
        worst = torch.maximum(worst, error.nan_to_num(nan=torch.inf))
    of_gradients = worst.item()
    if found is None:
        return {"norm": None, "gradients": finite(of_gradients)}
    of_norm = abs(found.item() - gradients.norm) / gradients.norm
    return {"norm": finite(of_norm), "gradients": finite(of_gradients)}


def finite(error: float) -> float:
    """The error, made finite: JSON has no infinity and no NaN."""
    return error if error < 1e300 else 1e300


def largest(row_errors: dict[str, float | None]) -> float:
    return max(error for error in row_errors.values() if error is not None)


def checked(
    implementation: Implementation, kind: str, dtype: str, gradients: Gradients
) -> dict[str, Any] | None:
    """The errors of an implementation, or None if it does not support these gradients."""
    function = function_of(implementation, kind)
    if function is None:
        return None
    gradients.restore()
    try:
        norm = function(gradients.parameters, threshold_of(kind, gradients))
    except RuntimeError as error:
        if implementation.name in (OURS, REFERENCE):
            raise
        tqdm.write(f"{implementation.name} does not support it: {str(error).splitlines()[0]}")
        return None
    found = errors(gradients, kind, norm)
    if implementation.name == OURS and largest(found) > TOLERANCE[dtype]:
        raise SystemExit(f"gradclip_ext is wrong, relative errors {found}")
    return {"relative_error": found, "believable": largest(found) <= BELIEVABLE[dtype]}


def row_of(
    workload: Workload,
    dtype: str,
    kind: str,
    gradients: Gradients,
    peers: list[Implementation],
    clock: Clock,
    seconds: float,
) -> dict[str, Any]:
    """Checks and measures every implementation that supports the case."""
    verdicts: dict[str, dict[str, Any]] = {}
    calls: dict[str, tuple[Call, Call]] = {}
    threshold = threshold_of(kind, gradients)
    for peer in peers:
        verdict = checked(peer, kind, dtype, gradients)
        if verdict is None:
            continue
        verdicts[peer.name] = verdict
        call = functools.partial(function_of(peer, kind), gradients.parameters, threshold)
        calls[peer.name] = (gradients.restore, call)
    calls.update({name: roofline_call(name, gradients) for name in ROOFLINES[kind]})

    statistics = measured(calls, clock, seconds)
    rooflines = {name: statistics.pop(name) for name in ROOFLINES[kind]}
    roofline_medians = {name: values["median_us"] for name, values in rooflines.items()}
    roofline_us = roofline(kind, roofline_medians)
    ours = statistics[OURS]["median_us"]
    row = {
        "workload": workload.name,
        "dtype": dtype,
        "kind": kind,
        "tensors": len(gradients.gradients),
        "elements": gradients.elements,
        "bytes": gradients.bytes,
        "implementations": {
            name: {**values, **verdicts[name]} for name, values in statistics.items()
        },
        "rooflines": rooflines,
        "roofline_us": roofline_us,
        "ratio": statistics[REFERENCE]["median_us"] / ours,
        "ratio_to_roofline": ours / roofline_us,
        "gigabytes_per_second": PASSES[kind] * gradients.bytes / ours / 1e3,
        "roofline_gigabytes_per_second": bandwidths(gradients, roofline_medians),
    }
    if "device" in statistics[OURS]:
        device = {name: values["device"]["median_us"] for name, values in statistics.items()}
        rooflines_on_device = {
            name: values["device"]["median_us"] for name, values in rooflines.items()
        }
        row["device_ratio"] = device[REFERENCE] / device[OURS]
        row["device_roofline_us"] = roofline(kind, rooflines_on_device)
        row["device_ratio_to_roofline"] = device[OURS] / row["device_roofline_us"]
        row["device_gigabytes_per_second"] = PASSES[kind] * gradients.bytes / device[OURS] / 1e3
        row["device_roofline_gigabytes_per_second"] = bandwidths(gradients, rooflines_on_device)
        row["launches"] = {name: launches(*calls[name]) for name in statistics}
        row["host_ratio"] = (
            statistics[REFERENCE]["host"]["median_us"] / statistics[OURS]["host"]["median_us"]
        )
    return row


def line_of(table: Table, row: dict[str, Any]) -> str:
    return table.line(cuda_cells(row) if "launches" in row else cpu_cells(row))


def cpu_cells(row: dict[str, Any]) -> list[str]:
    implementations = row["implementations"]
    ours = implementations[OURS]
    others = {
        name: values for name, values in implementations.items() if name not in (OURS, REFERENCE)
    }
    other = min(others, key=lambda name: others[name]["median_us"], default="")
    return [
        *first_cells(row),
        f"{ours['median_us']:.1f}",
        f"{ours['q20_us']:.1f} .. {ours['q80_us']:.1f}",
        f"{row['ratio']:.2f}",
        f"{row['roofline_us']:.1f}",
        f"{row['ratio_to_roofline']:.2f}",
        f"{row['gigabytes_per_second']:.1f}",
        other
        and f"{other} {others[other]['median_us']:.1f}"
        + ("" if others[other]["believable"] else "!"),
    ]


def cuda_cells(row: dict[str, Any]) -> list[str]:
    implementations, counts = row["implementations"], row["launches"]
    ours, reference = implementations[OURS], implementations[REFERENCE]
    return [
        *first_cells(row),
        f"{ours['median_us']:.1f}",
        f"{row['ratio']:.2f}",
        f"{reference['device']['median_us']:.1f}",
        f"{ours['device']['median_us']:.1f}",
        f"{row['device_ratio_to_roofline']:.2f}",
        f"{reference['host']['median_us']:.1f}",
        f"{ours['host']['median_us']:.1f}",
        f"{counts[REFERENCE]}/{counts[OURS]}",
    ]


def first_cells(row: dict[str, Any]) -> list[str]:
    reference = row["implementations"][REFERENCE]
    megabytes = row["bytes"] / 1e6
    return [
        row["workload"],
        row["dtype"],
        row["kind"],
        str(row["tensors"]),
        f"{megabytes:.3f}" if megabytes < 1000 else f"{megabytes:.1f}",
        f"{reference['median_us']:.1f}" + ("" if reference["believable"] else "!"),
    ]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--suite", choices=SUITES, default="default", help="defaults for options not given"
    )
    parser.add_argument(
        "--quick", action="store_const", const="ci", dest="suite", help="same as --suite ci"
    )
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, metavar="NAME", help=", ".join(WORKLOADS)
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--kinds", nargs="+", choices=KINDS)
    parser.add_argument("--seconds", type=float, help="per workload, dtype and kind")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument(
        "--compile", action="store_true", help="also time torch.compile (slow to compile)"
    )
    parser.add_argument(
        "--tuning",
        nargs="+",
        type=knob,
        default=[],
        metavar="NAME=VALUE",
        help="see csrc/cuda/tuning.h; for a build with GRADCLIP_TUNING=1",
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file (default: named after the run, in bench/results)"
    )
    options = parser.parse_args(arguments)
    suite = {
        "workloads": [w.name for w in WORKLOADS.values() if options.device in w.devices],
        "kinds": list(KINDS),
        **SUITES[options.suite],
    }
    for name, value in suite.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    if options.tuning and not hasattr(_C, "set_tuning"):
        parser.error("--tuning needs a build with GRADCLIP_TUNING=1")
    try:
        for name, value in options.tuning:
            _C.set_tuning(name, value)
    except ValueError as error:
        parser.error(str(error))
    return options


def knob(text: str) -> tuple[str, int]:
    """NAME=VALUE as a pair."""
    name, _, value = text.partition("=")
    return name, int(value)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    clock = clock_for(device)
    facts = environment(device)
    if options.tuning:
        facts["tuning"] = dict(options.tuning)
    path = options.output or default_path(
        facts, "clip", *([] if options.suite == "default" else [options.suite])
    )

    cases = [
        (WORKLOADS[name], dtype)
        for name in options.workloads
        for dtype in ([WORKLOADS[name].dtype] if WORKLOADS[name].dtype else options.dtypes)
    ]
    table = Table(CUDA_COLUMNS if device.type == "cuda" else COLUMNS)
    tqdm.write(table.head())
    rows = []
    # disable=None: a bar on a terminal, nothing if the output is redirected.
    progress = tqdm(total=len(cases) * len(options.kinds), leave=False, disable=None)
    for workload, dtype in cases:
        gradients = Gradients(workload, dtype, device)
        peers = implementations(device, options.compile)
        for kind in options.kinds:
            progress.set_description(f"{workload.name} {dtype} {kind}")
            row = row_of(workload, dtype, kind, gradients, peers, clock, options.seconds)
            rows.append(row)
            # At once, so that an interrupted run keeps what it has measured.
            save({**facts, "seconds": options.seconds, "rows": rows}, path)
            tqdm.write(line_of(table, row))
            progress.update()
        # Freed first, since two of the largest lists may not fit into memory together.
        del gradients
        if device.type == "cuda":
            # What is kept for tensors of other sizes, too.
            torch.cuda.empty_cache()
    progress.close()
    if any(
        not implementation["believable"]
        for row in rows
        for implementation in row["implementations"].values()
    ):
        tqdm.write("!: the error is too large to be explained by the dtype")
    for name in ("read", "copy"):
        found = [
            row.get("device_roofline_gigabytes_per_second", row["roofline_gigabytes_per_second"])
            for row in rows
        ]
        largest_found = max((values[name] for values in found if name in values), default=None)
        if largest_found is not None:
            tqdm.write(f"{name}: up to {largest_found:.0f} GB/s")
    tqdm.write(f"\nData: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
