"""How bench/ times and counts on CUDA, with a GPU that is made up."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("tqdm")

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


class MadeUpGpu:
    """Host and GPU, each with a time in seconds; the GPU does one thing after another."""

    CYCLES_PER_SECOND = 1e9

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.log: list[str] = []

    def work(self, on_host: float, on_device: float) -> None:
        self.host += on_host
        self.device = max(self.host, self.device) + on_device

    def sleep(self, cycles: int) -> None:
        self.log.append("sleep")
        self.work(0.0, cycles / self.CYCLES_PER_SECOND)

    def synchronize(self) -> None:
        self.log.append("synchronize")
        self.host = max(self.host, self.device)

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(when=None)

        def record() -> None:
            event.when = max(self.host, self.device)

        event.record, event.synchronize = record, self.synchronize
        event.elapsed_time = lambda end: (end.when - event.when) * 1e3
        return event


@pytest.fixture
def bench() -> Iterator[Callable[[str], ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
        yield importlib.import_module
        # Module names as short as `clip` and `report` must not stay behind for other imports.
        for path in (ROOT / "bench").glob("*.py"):
            sys.modules.pop(path.stem, None)


@pytest.fixture
def gpu(bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> MadeUpGpu:
    gpu = MadeUpGpu()
    properties = SimpleNamespace(L2_cache_size=2**26 + 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    # Not the clock of the whole process.
    monkeypatch.setattr(bench("clocks"), "time", SimpleNamespace(perf_counter=lambda: gpu.host))
    return gpu


def test_times_of_a_call(bench: Callable[[str], ModuleType], gpu: MadeUpGpu) -> None:
    clock = bench("clocks").CudaClock(torch.device("cpu"))
    # The host takes longer than the GPU: only behind other work the GPU shows its own time.
    times = clock.times(lambda: gpu.work(1e-6, 1e-3), lambda: gpu.work(70e-6, 20e-6))
    assert times == {
        "time": pytest.approx(90e-6),
        "device": pytest.approx(20e-6),
        "host": pytest.approx(70e-6),
    }
    # A host that takes no time: the sleep still hides the launch.
    times = clock.times(lambda: None, lambda: gpu.work(0.0, 20e-6))
    assert times["device"] == times["time"] == pytest.approx(20e-6)


def test_the_cache_is_left_full_of_clean_lines_of_other_data(
    bench: Callable[[str], ModuleType], gpu: MadeUpGpu
) -> None:
    clock = bench("clocks").CudaClock(torch.device("cpu"))
    # Four times the cache, so that nothing of what was restored stays.
    assert clock.other_data.nbytes >= 4 * (2**26 + 2**20)
    memory = clock.other_data.untyped_storage().data_ptr()
    version = clock.other_data._version

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            reads = [
                argument.numel()
                for argument in args
                if isinstance(argument, torch.Tensor)
                and argument.untyped_storage().data_ptr() == memory
            ]
            gpu.log.append(f"{function.overloadpacket.__name__} {reads}")
            return function(*args, **(kwargs or {}))

    with Log():
        clock.times(lambda: gpu.log.append("restore"), lambda: gpu.log.append("call"))
    prepare = ["restore", f"sum [{clock.other_data.numel()}]", "synchronize"]
    assert gpu.log == [*prepare, "call", "synchronize", *prepare, "sleep", "call", "synchronize"]
    assert clock.other_data._version == version


def test_only_kernels_count_as_launches(
    bench: Callable[[str], ModuleType], gpu: MadeUpGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def event(name: str, device: Any, is_user_annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=is_user_annotation)

    events = [
        event("cudaLaunchKernel", CPU),
        event("void gradclip::cuda::power_sums_kernel<2>", CUDA),
        event("Memcpy HtoD (Pageable -> Device)", CUDA),
        event("Memset (Device)", CUDA),
        # What record_function around the launches looks like on the GPU.
        event("gradclip_ext::clip_grad_norm_", CUDA, is_user_annotation=True),
        event("void gradclip::cuda::scale_kernel<40>", CUDA),
    ]
    profiled = []

    @contextlib.contextmanager
    def profile(activities: list[Any]) -> Iterator[SimpleNamespace]:
        assert activities == [torch.profiler.ProfilerActivity.CUDA]
        yield SimpleNamespace(events=lambda: events if profiled else [])

    monkeypatch.setattr(torch.profiler, "profile", profile)
    assert bench("clocks").launches(lambda: None, lambda: profiled.append("call")) == 2
    assert profiled == ["call"]


def test_the_table_shows_host_and_device_times(
    bench: Callable[[str], ModuleType], gpu: MadeUpGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, workloads = bench("clip"), bench("workloads")
    monkeypatch.setattr(clip, "launches", lambda restore, call: 17)
    device = torch.device("cpu")
    gradients = workloads.Gradients(workloads.WORKLOADS["one_scalar"], "bfloat16", device)
    costs = {"torch": (4000e-6, 30e-6), "gradclip_ext": (1e-6, 20e-6)}
    peers = [
        clip.Implementation(name, work_and(gpu, cost, peer.clip_norm), None)
        for peer in clip.implementations(device, with_compile=False)
        for name, cost in [(peer.name, costs.get(peer.name, (0.0, 1e-6)))]
    ]
    monkeypatch.setattr(clip, "roofline_call", lambda *_: (lambda: None, roofline_on(gpu)))
    clock = bench("clocks").CudaClock(device)
    row = clip.row_of(
        workloads.WORKLOADS["one_scalar"], "bfloat16", "clip", gradients, peers, clock, 0.0
    )
    line = clip.line_of(clip.Table(clip.CUDA_COLUMNS), row)
    cells = "one_scalar bfloat16 clip 1 0.000 4030.0 21.0 191.90 30.0 20.0 2.00 4000.0 1.0 17/17"
    assert line.split() == cells.split()
    assert [len(cells.split()), list(clip.CUDA_COLUMNS)[-4:]] == [
        len(clip.CUDA_COLUMNS),
        ["ours/roofline", "torch host", "ours host", "launches"],
    ]
    json.dumps(row, allow_nan=False)


def work_and(gpu: MadeUpGpu, cost: tuple[float, float], function: Any) -> Any:
    def clip(*arguments: Any) -> Any:
        gpu.work(*cost)
        return function(*arguments)

    return clip


def roofline_on(gpu: MadeUpGpu) -> Callable[[], None]:
    # A read, and as much for the multiplication after it.
    return lambda: gpu.work(0.0, 5e-6)


def test_the_widest_line_fits_into_160_characters(bench: Callable[[str], ModuleType]) -> None:
    clip = bench("clip")
    table = clip.Table(clip.CUDA_COLUMNS)
    assert len(table.head().splitlines()[1]) == 160
    assert all(len(title) <= abs(width) for title, width in clip.CUDA_COLUMNS.items())
