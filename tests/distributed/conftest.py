"""The worlds of this process, started when a test first asks for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from worlds import World

_worlds: dict[int, World] = {}


@pytest.fixture(scope="session", autouse=True)
def _closed_in_the_end() -> Iterator[None]:
    yield
    for world in _worlds.values():
        world.close()


@pytest.fixture
def world() -> Callable[[int], World]:
    """Gives the world of a size."""

    def of_size(size: int) -> World:
        if size not in _worlds or not _worlds[size].is_open:
            _worlds[size] = World(size)
        return _worlds[size]

    return of_size
