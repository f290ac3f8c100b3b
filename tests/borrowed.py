"""pytest --borrowed SECONDS: for a machine that is at hand for minutes, and holds what it holds.

No test may take longer than so many seconds. What fails is named at once, in a line after "!! ",
since there may be no time for a summary; hypothesis does not shrink it. Test files that import a
package which the machine lacks are skipped.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--borrowed", type=int, metavar="SECONDS", help=__doc__)


def pytest_configure(config: pytest.Config) -> None:
    seconds = config.option.borrowed
    if not seconds:
        return
    # A process of pytest-xdist has it.
    is_worker = hasattr(config, "workerinput")
    config.pluginmanager.register(Borrowed(seconds, is_worker), "borrowed machine")
    with contextlib.suppress(ImportError):
        from hypothesis import Phase, settings

        phases = [phase for phase in Phase if phase.name not in ("shrink", "explain")]
        settings.register_profile("borrowed", phases=phases, database=None)
        settings.load_profile("borrowed")


class Borrowed:
    """Hooks that are in place only where the option is given."""

    def __init__(self, seconds: int, is_worker: bool) -> None:
        self.seconds, self.is_worker = seconds, is_worker
        # That of the process, which pytest redirects while a test runs.
        self.stderr = os.fdopen(os.dup(2), "w")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_make_collect_report(self) -> Iterator[None]:
        outcome: Any = yield
        report = outcome.get_result()
        missing = re.search(r"No module named '(hypothesis|numpy)['.]", str(report.longrepr))
        if report.failed and missing:
            report.outcome = "skipped"
            report.longrepr = (report.nodeid, 0, f"Skipped: {missing[1]} is not installed")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.name_if_failed(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.name_if_failed(report)

    def name_if_failed(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        # What the workers report comes to the first process.
        if report.failed and not self.is_worker:
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = str(crash.message if crash else report.longrepr).strip().splitlines()
            # Of an error in collecting, the last line says what it was.
            line = lines[0 if crash else -1] if lines else ""
            print(f"\n!! {report.nodeid} - {line}", file=self.stderr, flush=True)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        def stop(*_: object) -> None:
            pytest.fail(f"took more than {self.seconds} s")

        # A test that waits outside of Python, for a GPU that hangs, does not come back to be
        # interrupted: its process ends, and pytest-xdist starts another for the tests after it.
        faulthandler.dump_traceback_later(2 * self.seconds, exit=True, file=self.stderr)
        before = signal.signal(signal.SIGALRM, stop)
        # Again and again, because hypothesis repeats what failed.
        signal.setitimer(signal.ITIMER_REAL, self.seconds, self.seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            faulthandler.cancel_dump_traceback_later()
        if self.is_worker and gpu_is_lost():
            print(f"{item.nodeid}: the CUDA context is lost", file=self.stderr, flush=True)
            os._exit(1)


def gpu_is_lost() -> bool:
    """Whether a kernel has gone wrong in a way after which every call of this process fails."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
