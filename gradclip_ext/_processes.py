"""The patch in all processes of a program that :mod:`gradclip_ext.run` starts, and their calls.

Environment variables reach the processes that it starts in turn: with ``GRADCLIP_EXT_PATCH=1`` one
is patched when it imports torch, see ``gradclip_ext_autoload.py``, and ``GRADCLIP_EXT_CALLS`` names
the process that reports and a file, to which each adds a line with its calls when it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing.util
import os
import sys
import tempfile
from importlib.metadata import entry_points

from gradclip_ext._calls import Calls
from gradclip_ext.patch import FUNCTIONS, patch_with, replaced_names

_PATCH = "GRADCLIP_EXT_PATCH"
_CALLS = "GRADCLIP_EXT_CALLS"
# torch's own: whether it calls what is registered in this group.
_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_ENTRY_POINTS = "torch.backends"
# Of launchers and job managers, in the order in which they start one another.
_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")

_NO_CALLS = [
    "0 calls seen",
    "What clips without a call of torch.nn.utils is not reached: DeepSpeed, Megatron, and",
    "FullyShardedDataParallel.clip_grad_norm_ (FSDP1) with sharded parameters.",
    "Calls inside of a compiled graph are not counted.",
]

_calls = Calls()
_is_patched = False
# Why not, if that was tried.
_problem: str | None = None
# If this process reports: its number, and the file that others write to.
_reporter: tuple[int, str] | None = None


def patch_if_asked() -> None:
    """Patch this process, once, if ``GRADCLIP_EXT_PATCH=1`` is set; a failure is only printed."""
    global _is_patched, _problem
    if os.environ.get(_PATCH) != "1" or _is_patched or _problem is not None:
        return
    try:
        patch_with({name: _calls.counted(name, ours) for name, ours in FUNCTIONS.items()})
    except RuntimeError as error:
        _problem = str(error)
        _print([f"not patched: {error}"])
        return
    _is_patched = True
    os.register_at_fork(after_in_child=_calls.clear)
    # Processes that multiprocessing forks end without what atexit calls.
    multiprocessing.util.register_after_fork(_calls, _hand_over_at_end)
    atexit.register(_hand_over)
    if _owner() == os.getpid():
        # The program has replaced itself by another one, as with os.execv.
        _report_at_end()


def patch_and_report() -> None:
    """Patch this process and those that it starts, and report on their calls when it ends.

    A process whose calls another one reports does not report itself, nor does any rank of this
    machine but the first.
    """
    os.environ[_PATCH] = "1"
    patch_if_asked()
    rank = next((os.environ[name] for name in _LOCAL_RANKS if name in os.environ), "0")
    if _CALLS in os.environ or rank != "0":
        return
    file, path = tempfile.mkstemp(prefix="gradclip_ext-", suffix=".jsonl")
    os.close(file)
    os.environ[_CALLS] = f"{os.getpid()}:{path}"
    _report_at_end()


def _owner() -> int | None:
    """The process that reports, if there is one."""
    number = os.environ.get(_CALLS, "").partition(":")[0]
    return int(number) if number.isdecimal() else None


def _file() -> str:
    """Where processes hand over their calls."""
    return os.environ[_CALLS].partition(":")[2]


def _report_at_end() -> None:
    global _reporter
    _reporter = (os.getpid(), _file())
    # Called after all that the program registers.
    atexit.register(_report)


def _hand_over_at_end(_: Calls) -> None:
    multiprocessing.util.Finalize(None, _hand_over, exitpriority=0)


def _hand_over() -> None:
    """Tell the process that reports of the calls in this one."""
    if _owner() in (None, os.getpid()) or not _calls.counts:
        return
    line = json.dumps(_calls.as_dict()) + "\n"
    _calls.clear()
    # Without creating it: who reports may have ended, and then nobody would read or remove it.
    with contextlib.suppress(OSError):
        file = os.open(_file(), os.O_WRONLY | os.O_APPEND)
        try:
            # In one write, which no other process can interrupt.
            os.write(file, line.encode())
        finally:
            os.close(file)


def _report() -> None:
    # A process that was forked from the one that reports comes here too.
    if _reporter is None or _reporter[0] != os.getpid():
        return
    path = _reporter[1]
    with contextlib.suppress(OSError, ValueError):
        with open(path, encoding="utf-8") as file:
            for line in file:
                _calls.add(json.loads(line))
        os.remove(path)
    lines = _calls.report() if _calls.counts else _report_without_calls()
    lines += [
        f"torch.nn.utils.{name} was replaced by {by}: calls of that are not seen"
        for name, by in replaced_names()
    ]
    _print(lines)


def _report_without_calls() -> list[str]:
    if _problem is not None:
        return [f"0 calls seen, since torch is not patched: {_problem}"]
    if os.environ.get(_AUTOLOAD, "1") != "1":
        return [*_NO_CALLS, f"Only this process was patched, since {_AUTOLOAD} is set."]
    if not entry_points(group=_ENTRY_POINTS, name="gradclip_ext"):
        return [
            *_NO_CALLS,
            "Only this process was patched, since torch finds no entry point of gradclip_ext:",
            "it has to be installed, or installed again after an update.",
        ]
    return _NO_CALLS


def _print(lines: list[str]) -> None:
    # Standard error may be closed, and the program's exit code is its own.
    with contextlib.suppress(Exception):
        indented = "\n  ".join(lines)
        print(f"gradclip_ext: {indented}", file=sys.stderr, flush=True)
