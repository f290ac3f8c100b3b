"""Threads: the same bits for any number, no more than torch allows, one OpenMP runtime, the GIL."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference as ref
import torch
from parametrize import by_native_dtype, by_norm_type

import gradclip_ext

pytestmark = pytest.mark.cpu_only


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@by_norm_type
@by_native_dtype
def test_the_same_bits_for_any_number_of_threads(dtype, norm_type, restore_threads):
    shapes = [(700, 300), (5,), (129, 1000), (1,), (90_001,)]
    originals = [ref.random_gradient(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    results = []
    for threads in (1, 2, 3, 7, 1, 2):
        torch.set_num_threads(threads)
        gradients = ref.copies(originals)
        norm = gradclip_ext.clip_grad_norm_(
            ref.parameters(gradients), 1.0, norm_type, dtype=torch.float64
        )
        results.append((norm, gradients))
    first_norm, first_gradients = results[0]
    for norm, gradients in results[1:]:
        assert torch.equal(norm, first_norm)
        for one, other in zip(gradients, first_gradients, strict=True):
            assert torch.equal(one, other)


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("threads", [1, 2])
def test_uses_as_many_threads_as_torch_is_told(threads):
    # In a separate process, whose thread pool is still empty.
    started = run(f"""
import os, torch, gradclip_ext
torch.set_num_threads(1)
parameter = torch.nn.Parameter(torch.zeros(4_000_000))
parameter.grad = torch.full((4_000_000,), 2.0)
torch.set_num_threads({threads})
before = len(os.listdir("/proc/self/task"))
assert gradclip_ext.clip_grad_norm_([parameter], 1.0).item() == 4000.0
print(len(os.listdir("/proc/self/task")) - before)
""")
    assert int(started) == threads - 1


def test_small_totals_run_on_the_calling_thread():
    started = run("""
import os, torch, gradclip_ext
parameter = torch.nn.Parameter(torch.zeros(64))
parameter.grad = torch.full((64,), 2.0)
before = len(os.listdir("/proc/self/task"))
assert gradclip_ext.clip_grad_norm_([parameter], 1.0).item() == 16.0
print(len(os.listdir("/proc/self/task")) - before)
""")
    assert int(started) == 0


def test_one_openmp_runtime_in_the_process():
    maps = run("""
import torch, gradclip_ext
gradclip_ext.get_total_norm([torch.ones(4_000_000)])
print(open("/proc/self/maps").read())
""")
    runtimes = set(re.findall(r"\S*/lib(?:gomp|iomp|omp)[^/\s]*\.so\S*", maps))
    assert len(runtimes) == 1, runtimes


def test_concurrent_calls_from_python_threads():
    def clip(seed):
        gradients = [ref.random_gradient((300, 100), seed=seed)]
        expected = ref.reference_norm(gradients, 2.0)
        norm = gradclip_ext.clip_grad_norm_(ref.parameters(gradients), 1.0)
        assert norm.item() == pytest.approx(expected, rel=1e-6)
        return gradclip_ext.get_total_norm(gradients).item()

    with ThreadPoolExecutor(8) as pool:
        for norm in pool.map(clip, range(64)):
            assert norm == pytest.approx(1.0, rel=1e-5)


def test_other_python_threads_run_during_the_kernels():
    gradient = torch.ones(100_000_000, dtype=torch.bfloat16)
    count = 0
    stop = threading.Event()

    def tick():
        nonlocal count
        while not stop.is_set():
            count += 1
            time.sleep(1e-4)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        # In one of many calls, since a busy machine may have no core for the thread in the first.
        for _ in range(100):
            start = count
            gradclip_ext.get_total_norm([gradient])
            # If the GIL were held throughout, the thread could advance once before and once after.
            moved = count - start
            if moved > 5:
                break
    finally:
        stop.set()
        thread.join()
    assert moved > 5


def test_tensors_dropped_while_they_are_measured():
    # Replacing .grad itself from another thread crashes torch 2.13 even without this package, since
    # torch releases the GIL while it frees the old gradient. So here the list changes instead.
    def make():
        return [torch.ones(500_000) for _ in range(8)]

    tensors = make()
    stop = threading.Event()

    def drop():
        while not stop.is_set():
            tensors.clear()
            tensors.extend(make())

    thread = threading.Thread(target=drop)
    thread.start()
    try:
        for _ in range(50):
            norm = gradclip_ext.get_total_norm(tensors).item()
            assert norm in [pytest.approx((n * 500_000) ** 0.5) for n in range(9)]
    finally:
        stop.set()
        thread.join()
