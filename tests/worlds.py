"""Worlds of ranks, made once for many tests: processes that run functions of test modules.

A fork server imports torch once, before any thread pool exists, and the ranks are forked from it. A
case is a function at the top level of a test module; every rank calls it with the same arguments
and gives back what it returns, or the exception. One that does not answer in seconds is taken for
hanging, and its world is thrown away.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# How long a case may take; a hang is found after it.
SECONDS = 12


@dataclass
class Failure:
    """An exception of a rank: the name of its class, its text, and where it was raised."""

    kind: str
    text: str
    trace: str


class World:
    """Ranks that have initialized a process group and wait for cases."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self.size = size
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.tensor", "gradclip_ext"])
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, backend, store, theirs, sys.path)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, case: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> list[Any]:
        """What each rank returned; an exception of a rank fails the test."""
        answers = self.outcomes(case, *arguments, seconds=seconds)
        for rank, answer in enumerate(answers):
            assert not isinstance(answer, Failure), f"rank {rank}:\n{answer.trace}"
        return answers

    def outcomes(
        self, case: Callable[..., Any], *arguments: Any, seconds: float = SECONDS
    ) -> list[Any]:
        """What each rank returned, or its :class:`Failure`."""
        file = sys.modules[case.__module__].__file__
        for pipe in self._pipes:
            pipe.send((file, case.__name__, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(seconds):
                self.close()
                raise AssertionError(f"rank {rank} of {self.size} hangs in {case.__name__}")
            answers.append(pipe.recv())
        return answers

    @property
    def is_open(self) -> bool:
        return bool(self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []
        self._folder.cleanup()


def _serve(
    rank: int, size: int, backend: str, store: str, pipe: Connection, path: list[str]
) -> None:
    import torch

    sys.path[:] = path
    # One thread: pools of threads do not survive a fork, and the ranks share the cores.
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        # Later than that of a case, so that a hang is known for what it is.
        timeout=timedelta(seconds=5 * SECONDS),
    )
    modules: dict[str, Any] = {}
    while True:
        try:
            file, name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = getattr(_module(file, modules), name)(*arguments)
        except Exception as error:
            answer = Failure(type(error).__name__, str(error), traceback.format_exc())
        pipe.send(answer)


def _module(file: str, modules: dict[str, Any]) -> Any:
    if file not in modules:
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        assert spec is not None and spec.loader is not None
        modules[file] = importlib.util.module_from_spec(spec)
        sys.modules[Path(file).stem] = modules[file]
        spec.loader.exec_module(modules[file])
    return modules[file]
