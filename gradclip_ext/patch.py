"""Puts the drop-ins of this package behind torch's own names, for code that calls those.

torch wraps each of its clipping functions in a closure that switches autograd off. :func:`patch`
changes what that closure calls, not what a name is bound to, so whoever holds one of torch's
functions follows: names imported earlier, partials, attributes of classes, entries of dicts.
"""

from __future__ import annotations

import contextlib
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import clip_grad

from gradclip_ext import functional

__all__ = [
    "FUNCTIONS",
    "Patch",
    "original_functions",
    "patch",
    "patch_with",
    "replaced_names",
    "unpatch",
]

Function = Callable[..., Any]

# What replaces each function of torch.nn.utils.
FUNCTIONS: dict[str, Function] = {
    "clip_grad_norm_": functional.clip_grad_norm_,
    "clip_grad_value_": functional.clip_grad_value_,
    "clip_grads_with_norm_": functional.clip_grads_with_norm_,
    "get_total_norm": functional.get_total_norm,
}


@dataclass(frozen=True)
class _Closure:
    """One of torch's functions, and the cell that holds what it calls."""

    name: str
    function: Function
    cell: types.CellType
    original: Function
    ours: Function

    def current(self) -> Any:
        return self.cell.cell_contents

    def put(self, function: Function) -> None:
        self.cell.cell_contents = function

    def covers(self, function: Any) -> bool:
        return self.function is function


@dataclass(frozen=True)
class _Attribute:
    """A name of a module, for a function of torch that is no closure."""

    name: str
    module: types.ModuleType
    attribute: str
    original: Function
    ours: Function

    def current(self) -> Any:
        return getattr(self.module, self.attribute)

    def put(self, function: Function) -> None:
        setattr(self.module, self.attribute, function)

    def covers(self, function: Any) -> bool:
        return self.ours is function


_lock = threading.RLock()
_places: list[_Closure | _Attribute] = []
# Patches that hold until unpatch() is called, and how many `with` blocks are being run.
_lasting: list[Patch] = []
_blocks = 0


class Patch:
    """What :func:`patch` returns, to be used in a ``with`` statement or dropped."""

    def __enter__(self) -> Patch:
        global _blocks
        with _lock:
            # Again, because a block may be entered more than once.
            _install(FUNCTIONS)
            _blocks += 1
            if self in _lasting:
                _lasting.remove(self)
        return self

    def __exit__(self, *exception: object) -> None:
        global _blocks
        with _lock:
            _blocks -= 1
            if not _lasting and _blocks == 0:
                _restore("with patch()")


def patch() -> Patch:
    """Make torch's own clipping functions those of this package, for all code in this process.

    The functions are :func:`torch.nn.utils.clip_grad_norm_`, ``clip_grad_value_``,
    ``clip_grads_with_norm_`` and ``get_total_norm``, under whatever names they were imported.
    They stay the same objects, with their own signature and docstring. Until :func:`unpatch` is
    called, or until the end of the block:

    >>> from gradclip_ext import patch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3e20, 4e20])
    >>> torch.nn.utils.clip_grad_norm_(weight, 1.0)
    tensor(inf)
    >>> weight.grad = torch.tensor([3e20, 4e20])
    >>> with patch():
    ...     torch.nn.utils.clip_grad_norm_(weight, 1.0)
    tensor(5.0000e+20)

    Blocks may be nested, and run in several threads at once: the functions are torch's again when
    the last one ends. Calling ``patch()`` again changes nothing.

    Returns:
        An object for a ``with`` statement; entering it makes the patch end with the block.

    Raises:
        RuntimeError: something else has replaced one of the functions. None is changed then.
    """
    return patch_with(FUNCTIONS)


def patch_with(functions: Mapping[str, Function]) -> Patch:
    """As :func:`patch`, with these functions; a place that has been patched keeps what it has."""
    with _lock:
        _install(functions)
        result = Patch()
        _lasting.append(result)
    return result


def unpatch() -> None:
    """Make torch's clipping functions its own again, however often :func:`patch` was called.

    Blocks that are being run, as ``with patch():``, stay patched to their end.

    Raises:
        RuntimeError: :func:`patch` was not called before, or something else has replaced what it
            put in place. Nothing is changed then.
    """
    with _lock:
        if not _lasting and (_blocks > 0 or not _places):
            if _blocks > 0:
                raise RuntimeError(
                    "unpatch: the functions of torch.nn.utils are patched by a `with patch():` "
                    "block, which ends that by itself"
                )
            raise RuntimeError(
                "unpatch: the functions of torch.nn.utils are torch's own, patch() was not called"
            )
        if _blocks == 0:
            _restore("unpatch")
        _lasting.clear()


@contextlib.contextmanager
def original_functions() -> Iterator[None]:
    """torch's own functions, patched or not, in this process until the end of the block."""
    with _lock:
        undone = list(_places)
        for place in undone:
            place.put(place.original)
        try:
            yield
        finally:
            for place in undone:
                place.put(place.ours)


def replaced_names() -> list[tuple[str, str]]:
    """The names in torch.nn.utils that something else has replaced since, and by what."""
    functions = {name: getattr(torch.nn.utils, name) for name in FUNCTIONS}
    return [
        (name, _describe(function))
        for name, function in functions.items()
        if _places and not any(place.covers(function) for place in _places)
    ]


def _install(functions: Mapping[str, Function]) -> None:
    """Put these functions in the places of torch's, except where one of ours is already."""
    found = []
    for name, function in functions.items():
        found += _find_places(name, function)
    for place in found:
        place.put(place.ours)
    _places.extend(found)


def _restore(caller: str) -> None:
    for place in _places:
        if place.current() is not place.ours:
            raise RuntimeError(
                f"{caller}: torch.nn.utils.{place.name} has been replaced since by "
                f"{_describe(place.current())}; undo that first"
            )
    for place in _places:
        place.put(place.original)
    _places.clear()


def _find_places(name: str, ours: Function) -> list[_Closure | _Attribute]:
    """Where to put our function, as far as it is not there yet."""
    functions = []
    public = getattr(torch.nn.utils, name)
    private_name = getattr(public, "__name__", name)
    # Two functions of the same name after one of the modules was reloaded.
    for function in (public, getattr(clip_grad, private_name, public)):
        if function not in functions and not any(place.covers(function) for place in _places):
            _require_own(function, name)
            functions.append(function)
    places: list[_Closure | _Attribute] = []
    for function in functions:
        cell = _cell(function, name)
        if cell is not None:
            places.append(_Closure(name, function, cell, function.__wrapped__, ours))
    if len(places) == len(functions):
        return places
    warnings.warn(
        f"patch: torch.nn.utils.{name} of torch {torch.__version__} is not the closure that "
        "earlier versions have; it is replaced in torch.nn.utils and torch.nn.utils.clip_grad, "
        "not where it was imported from there before",
        stacklevel=5,
    )
    return [
        _Attribute(name, module, attribute, getattr(module, attribute), ours)
        for module, attribute in ((torch.nn.utils, name), (clip_grad, private_name))
        if hasattr(module, attribute)
    ]


def _require_own(function: Any, name: str) -> None:
    """Raise if a function is not torch's own: that of torch_xla, a mock, a wrapper around it."""
    module = getattr(function, "__globals__", {}).get("__name__", "")
    if not isinstance(function, types.FunctionType) or not module.startswith("torch."):
        raise _replaced(name, function)


def _cell(function: Any, name: str) -> types.CellType | None:
    """The cell of a closure that holds the function it wraps; None if it is no such closure."""
    original = getattr(function, "__wrapped__", None)
    cells: tuple[types.CellType, ...] = function.__closure__ or ()
    if original is None or not cells:
        return None
    contents = [cell.cell_contents for cell in cells]
    for cell, content in zip(cells, contents, strict=True):
        if content is original:
            return cell
    raise _replaced(name, next(filter(callable, contents), contents[0]))


def _replaced(name: str, by: Any) -> RuntimeError:
    return RuntimeError(
        f"patch: torch.nn.utils.{name} has been replaced by {_describe(by)}; undo that first, or "
        "call the functions of gradclip_ext themselves"
    )


def _describe(replacement: Any) -> str:
    code_globals = getattr(replacement, "__globals__", None)
    if code_globals is None:
        return repr(replacement)
    return f"{code_globals.get('__name__', '?')}.{replacement.__qualname__}"
