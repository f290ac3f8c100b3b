"""The versions of frameworks that the tests have run with."""

from __future__ import annotations

import re
import warnings

__all__ = ["TESTED", "is_older", "warn_if_untested"]

# The first and the last release, by their first two numbers. Each test run has the last ones, in
# tests/frameworks/requirements.txt; docs/frameworks/README.md lists those that came before.
TESTED = {
    "lightning": ("2.4", "2.6"),
    "pytorch-lightning": ("2.4", "2.6"),
    "accelerate": ("1.0", "1.15"),
    "transformers": ("5.12", "5.24"),
}


def warn_if_untested(module: str, distribution: str, found: str) -> None:
    """Warn of a version that the tests have not run with, and go on.

    Args:
        module: the module of this package that relies on the framework.
        distribution: a key of :data:`TESTED`.
        found: the version of the framework that was imported.
    """
    first, last = TESTED[distribution]
    if not is_older(distribution, found) and _numbers(found) <= _numbers(last):
        return
    tested = first if first == last else f"{first} to {last}"
    warnings.warn(
        f"{module}: expected {distribution} {tested}, with which it was tested, found {found}. "
        "It relies on when the framework calls it, which may have changed: see that the report "
        "counts every step, or install a version that was tested",
        stacklevel=3,
    )


def is_older(distribution: str, found: str) -> bool:
    """Whether a version is older than all that the tests have run with."""
    return _numbers(found) < _numbers(TESTED[distribution][0])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
