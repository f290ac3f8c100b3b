"""Times clip_grad_norm_ beside torch.nn.utils on gradients with the shapes of real models.

    python bench/bench_clip.py                        # table on the screen
    python bench/bench_clip.py --output result.json   # and the data

Within one run the implementations take turns, the gradients are restored before every call, and the
result of each is checked against float64 before anything is timed. Quote the ratios: absolute times
depend on what else the machine does.

"quiet" is a norm below max_norm, where nothing has to change; "clip" is one above.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from workloads import WORKLOADS

import gradclip_ext

Clip = Callable[[list[torch.nn.Parameter], float], torch.Tensor]

IMPLEMENTATIONS: dict[str, Clip] = {
    "torch": torch.nn.utils.clip_grad_norm_,
    "gradclip_ext": gradclip_ext.clip_grad_norm_,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# torch's own float32 norm of GPT-2's gradients is off by 1e-3, its bfloat16 one by more.
WORST_BELIEVABLE = {"float32": 5e-3, "bfloat16": 5e-2, "float16": 5e-2}


def parameters_of(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in shapes:
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype))
        parameter.grad = torch.randn(shape, generator=generator).mul_(0.01).to(dtype)
        parameters.append(parameter)
    return parameters


class Case:
    """One list of gradients that can be restored."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
        self.parameters = parameters_of(shapes, dtype)
        self.gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.originals = [gradient.clone() for gradient in self.gradients]
        squares = [gradient.double().square().sum() for gradient in self.gradients]
        self.norm = math.sqrt(math.fsum(square.item() for square in squares))
        self.bytes = sum(gradient.nbytes for gradient in self.gradients)

    def restore(self) -> None:
        for gradient, original in zip(self.gradients, self.originals, strict=True):
            gradient.copy_(original)

    def check(self, clip: Clip, tolerance: float) -> float:
        """Returns the relative error of the norm; raises if the result is not believable."""
        self.restore()
        norm = clip(self.parameters, self.norm / 2).item()
        error = abs(norm - self.norm) / self.norm
        if error > tolerance:
            raise SystemExit(f"{clip} is wrong: norm {norm}, float64 {self.norm}")
        largest = max(range(len(self.gradients)), key=lambda i: self.gradients[i].numel())
        expected = self.originals[largest].double() * (self.norm / 2 / norm)
        found = self.gradients[largest].double()
        if (found - expected).abs().max() > tolerance * expected.abs().max():
            raise SystemExit(f"{clip} is wrong: gradient {largest} was not scaled right")
        return error

    def time(self, clip: Clip, max_norm: float) -> float:
        """Seconds for one call on restored gradients."""
        self.restore()
        start = time.perf_counter()
        clip(self.parameters, max_norm)
        return time.perf_counter() - start


def measure(case: Case, max_norm: float, seconds: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for clip in IMPLEMENTATIONS.values():
        case.time(clip, max_norm)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["torch"]) < 7:
        for name, clip in IMPLEMENTATIONS.items():
            times[name].append(case.time(clip, max_norm))
    return times


def quantiles(times: list[float]) -> dict[str, float]:
    """Median, 20 % and 80 % quantile in microseconds."""
    cuts = statistics.quantiles(times, n=10)
    return {
        "median_us": statistics.median(times) * 1e6,
        "q20_us": cuts[1] * 1e6,
        "q80_us": cuts[7] * 1e6,
        "calls": len(times),
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads")
    parser.add_argument("--seconds", type=float, default=4.0, help="per workload, dtype and kind")
    parser.add_argument("--output", type=Path, help="write the data to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    rows = []
    print(f"{'workload':<12}{'dtype':<10}{'kind':<7}{'torch us':>11}{'ours us':>11}{'ratio':>8}")
    for workload in arguments.workloads:
        for dtype in arguments.dtypes:
            case = Case(WORKLOADS[workload](), DTYPES[dtype])
            errors = {
                name: case.check(clip, WORST_BELIEVABLE[dtype])
                for name, clip in IMPLEMENTATIONS.items()
            }
            for kind, max_norm in (("quiet", case.norm * 10), ("clip", case.norm / 2)):
                times = measure(case, max_norm, arguments.seconds)
                row = {
                    "workload": workload,
                    "dtype": dtype,
                    "kind": kind,
                    "tensors": len(case.gradients),
                    "bytes": case.bytes,
                    "relative_error_of_norm": errors,
                    **{name: quantiles(values) for name, values in times.items()},
                }
                theirs, ours = row["torch"]["median_us"], row["gradclip_ext"]["median_us"]
                row["ratio"] = theirs / ours
                rows.append(row)
                print(
                    f"{workload:<12}{dtype:<10}{kind:<7}{theirs:>11.1f}{ours:>11.1f}"
                    f"{theirs / ours:>8.2f}",
                    flush=True,
                )
    if arguments.output:
        report = {
            "date": datetime.date.today().isoformat(),
            "device": "cpu",
            "processor": processor(),
            "threads": arguments.threads,
            "cpu_kernels": gradclip_ext._C.instruction_set(),
            "gradclip_ext": gradclip_ext.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "rows": rows,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
