"""The worlds of this process, started when a test first asks for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from worlds import World

_worlds: dict[tuple[int, str], World] = {}


@pytest.fixture(scope="session", autouse=True)
def _closed_in_the_end() -> Iterator[None]:
    yield
    for world in _worlds.values():
        world.close()


@pytest.fixture
def world() -> Callable[[int], World]:
    """Gives the world of a size, and of a backend."""

    def of_size(size: int, backend: str = "gloo") -> World:
        key = (size, backend)
        if key not in _worlds or not _worlds[key].is_open:
            _worlds[key] = World(size, backend)
        return _worlds[key]

    return of_size
