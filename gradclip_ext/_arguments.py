"""Checks the arguments of the public functions and words their errors.

Every error names the function, the argument and the index, what was expected and what was found.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def tensor_list(
    value: Any, function: str, argument: str, read: list[Any] | None = None
) -> list[Any] | tuple[Any, ...]:
    """The argument as a list or tuple; a single tensor becomes a list of one.

    Its elements are checked later, and only if the native engine declines the list. Into ``read``
    go those that an iterator gives, for the caller to have them if it raises halfway.
    """
    if type(value) is list or type(value) is tuple:
        return value
    if isinstance(value, Tensor):
        return [value]
    remedy = _remedy_for_container(value)
    if remedy is not None:
        raise TypeError(
            f"{function}: {argument} has to be an iterable of tensors or a single tensor, "
            f"found {describe(value)}; {remedy}"
        )
    items: list[Any] = [] if read is None else read
    items.extend(value)
    if not items and argument == "parameters" and isinstance(value, types.GeneratorType):
        _warn_of_empty_generator(function)
    return items


def _warn_of_empty_generator(function: str) -> None:
    # As in torch, only this function warns.
    if function == "clip_grad_norm_":
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.",
            stacklevel=_stack_level_of_caller(),
        )


def _stack_level_of_caller() -> int:
    """The stack level, for a warning of the calling function, of the line that called the package.

    Where torch's functions call ours, see :mod:`.patch`, that is the line that called those.
    """
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_on_the_way(frame.f_globals.get("__name__", "")):
        level += 1
        frame = frame.f_back
    return level


def _is_on_the_way(module: str) -> bool:
    return module.startswith("gradclip_ext.") or module == "torch.nn.utils.clip_grad"


def _remedy_for_container(value: Any) -> str | None:
    if isinstance(value, torch.nn.ParameterList):
        return None
    if isinstance(value, torch.nn.Module):
        return "pass module.parameters()"
    if isinstance(value, Mapping):
        if value and isinstance(next(iter(value)), Tensor):
            return None  # dict.fromkeys(parameters), a set that keeps its order
        return "iterating over it gives its keys, pass its .values()"
    if isinstance(value, torch.optim.Optimizer):
        return (
            "pass [p for group in optimizer.param_groups for p in group['params']] or "
            "model.parameters()"
        )
    # Python also iterates over objects that have __getitem__.
    iterable = isinstance(value, Iterable) or hasattr(type(value), "__getitem__")
    if isinstance(value, str) or not iterable:
        return "pass model.parameters()"
    return None


def describe(value: Any) -> str:
    name = type(value).__name__
    if isinstance(value, str):
        return f"{value!r} (str)"
    if value is None or isinstance(value, (int, float)):
        return f"{value!r}" if value is None else f"{value!r} ({name})"
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def count_and_first_difference(expected: Sequence[str], found: Sequence[str]) -> str:
    """The first way in which two lists of names differ."""
    if len(expected) != len(found):
        return f"{len(expected)} parameters, found {len(found)}"
    different = next(pair for pair in zip(expected, found, strict=True) if pair[0] != pair[1])
    return f"a parameter {different[0]!r}, found {different[1]!r}"


def item_error(item: Any, function: str, argument: str, index: int) -> TypeError:
    """The error for an element of ``parameters`` or ``tensors`` that is not a tensor."""
    message = f"{function}: {argument}[{index}] has to be a torch.Tensor, found {describe(item)}"
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        message += "; pass model.parameters() instead of model.named_parameters()"
    elif isinstance(item, Mapping) and "params" in item:
        message += (
            "; pass the parameters of the groups, "
            "[p for group in optimizer.param_groups for p in group['params']]"
        )
    elif isinstance(item, torch.nn.Module):
        message += "; pass module.parameters()"
    elif isinstance(item, str):
        message += "; iterating over a dict or ParameterDict gives its keys, pass its .values()"
    return TypeError(message)


def norm_type(norm_type: Any, function: str) -> float:
    """``norm_type`` as a float, as torch reads it (``'inf'`` is allowed)."""
    if type(norm_type) is float:
        return norm_type
    return _number(norm_type, function, "norm_type")


def max_norm(max_norm: Any, function: str) -> float | Tensor:
    """``max_norm`` as a float that is not negative, or as the one-element tensor it came as."""
    # First, and without a further call, because nearly every caller passes this.
    if type(max_norm) is float and max_norm >= 0.0:
        return max_norm
    if isinstance(max_norm, Tensor):
        return _one_element(max_norm, function, "max_norm")
    return non_negative(max_norm, function, "max_norm")


def clip_value(clip_value: Any, function: str) -> float:
    """``clip_value`` as a float that is not negative."""
    if type(clip_value) is not float and isinstance(clip_value, Tensor):
        clip_value = _one_element(clip_value, function, "clip_value")
    return non_negative(clip_value, function, "clip_value")


def total_norm(total_norm: Any, function: str) -> float | Tensor:
    """``total_norm`` as it is: a number, or a tensor of one element."""
    if isinstance(total_norm, Tensor):
        return _one_element(total_norm, function, "total_norm")
    return _number(total_norm, function, "total_norm")


def result_dtype(dtype: Any, function: str) -> None:
    """Refuse a ``dtype`` that is not None, float32 or float64."""
    if dtype not in (None, torch.float32, torch.float64):
        raise TypeError(
            f"{function}: dtype has to be None, torch.float32 or torch.float64, found {dtype!r}"
        )


def one_of(value: Any, choices: Sequence[str], function: str, argument: str) -> str:
    """One of a few strings."""
    if value not in choices:
        raise ValueError(
            f"{function}: {argument} has to be one of {', '.join(map(repr, choices))}, "
            f"found {value!r}"
        )
    return str(value)


def yes_or_no(value: Any, function: str, argument: str) -> bool:
    """A bool, or what equals one: of NumPy, 0 or 1."""
    try:
        is_either = not isinstance(value, Tensor) and value in (True, False)
    except ValueError:  # an array, which is neither as a whole
        is_either = False
    if not is_either:
        raise TypeError(f"{function}: {argument} has to be True or False, found {describe(value)}")
    return bool(value)


def predicate(value: Any, function: str, argument: str) -> Callable[[str, Tensor], bool] | None:
    """None, or something to call with the name of a parameter and the parameter."""
    if value is not None and not callable(value):
        raise TypeError(
            f"{function}: {argument} has to be a function of a name and a parameter, "
            f"found {describe(value)}"
        )
    return value  # type: ignore[no-any-return]


def function_without_arguments(value: Any, function: str, argument: str) -> None:
    """Refuse what cannot be called."""
    if not callable(value):
        raise TypeError(
            f"{function}: {argument} has to be a function without arguments, "
            f"found {describe(value)}"
        )


def clip_bound(value: Any, function: str, argument: str) -> float:
    """``max_norm`` or ``clip_value`` of a clipper: a number greater than 0, infinity included."""
    number = _known_number(value)
    if number is None or isinstance(value, bool):
        raise TypeError(
            f"{function}: {argument} has to be a number or a rule such as AutoClip(), "
            f"found {describe(value)}"
        )
    # Written so that NaN fails.
    if not number > 0.0:
        raise ValueError(f"{function}: {argument} has to be a positive number, found {value}")
    return number


def weight_decay(value: Any, function: str) -> float:
    """``weight_decay`` of a clipper: finite and not negative."""
    number = None if isinstance(value, bool) else _known_number(value)
    if number is None or not 0.0 <= number < math.inf:
        raise ValueError(
            f"{function}: weight_decay has to be a finite number that is not negative, "
            f"found {value!r}"
        )
    return number


def state_keys(state: Any, required: set[str], optional: set[str], function: str) -> None:
    """Refuse a saved state that is not a mapping with these keys."""
    if not isinstance(state, Mapping):
        raise TypeError(f"{function}: the state has to be a mapping, found {describe(state)}")
    if not required <= set(state) <= required | optional:
        raise ValueError(
            f"{function}: the state has to have the keys {', '.join(sorted(required))}, "
            f"found {', '.join(sorted(map(str, state))) or 'none'}"
        )


def non_negative(value: Any, function: str, argument: str) -> float:
    """A number that is not negative."""
    number = value if type(value) is float else _number(value, function, argument)
    # Written so that NaN fails.
    if not number >= 0.0:
        raise ValueError(
            f"{function}: {argument} has to be a number that is not negative, found {number}"
        )
    return number


def positive(value: Any, function: str, argument: str) -> float:
    """A number greater than 0; NaN is refused."""
    expected = "a number greater than 0"
    return _setting(value, function, argument, expected, lambda number: number > 0.0)


def at_least(value: Any, low: int, function: str, argument: str) -> float:
    """A number that is at least ``low``, infinity included."""
    expected = f"a number that is at least {low}"
    return _setting(value, function, argument, expected, lambda number: number >= low)


def between(value: Any, low: int, high: int, function: str, argument: str) -> float:
    """A number from ``low`` to ``high``."""
    expected = f"a number from {low} to {high}"
    return _setting(value, function, argument, expected, lambda number: low <= number <= high)


def whole_number(
    value: Any, function: str, argument: str, smallest: int, largest: int | None = None
) -> int:
    """A whole number in a range, of any type that Python accepts as an index."""
    expected = (
        f"a whole number that is at least {smallest}"
        if largest is None
        else f"a whole number from {smallest} to {largest}"
    )
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{function}: {argument} has to be {expected}, found {value!r}")
    number = operator.index(value)
    if number < smallest or (largest is not None and number > largest):
        raise ValueError(f"{function}: {argument} has to be {expected}, found {number}")
    return number


def patterns(value: Any, function: str, argument: str) -> tuple[str, ...]:
    """Name patterns; a single string is refused, as it would give a pattern for each letter."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(
            f"{function}: {argument} has to be an iterable of patterns, found {value!r}"
        )
    result = tuple(value)
    for index, pattern in enumerate(result):
        if not isinstance(pattern, str):
            raise TypeError(f"{function}: {argument}[{index}] has to be a str, found {pattern!r}")
    return result


def named_parameters(value: Any, function: str) -> list[tuple[str, Tensor]]:
    """Pairs of a name and a tensor, as ``module.named_parameters()`` yields them."""
    if isinstance(value, (torch.nn.Module, Tensor, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(
            f"{function}: named_parameters has to be an iterable of pairs of a name and a tensor, "
            f"found {type(value).__name__}; pass module.named_parameters()"
        )
    pairs = list(value)
    for index, pair in enumerate(pairs):
        if not is_named_parameter(pair):
            raise TypeError(
                f"{function}: named_parameters[{index}] has to be a pair of a name and a tensor, "
                f"found {type(pair).__name__}; pass module.named_parameters()"
            )
    return pairs


def is_named_parameter(item: Any) -> bool:
    """Whether an item is a pair of a name and a tensor, which a tensor of two elements is not."""
    return (
        isinstance(item, tuple)
        and len(item) == 2
        and isinstance(item[0], str)
        and isinstance(item[1], Tensor)
    )


def _one_element(tensor: Tensor, function: str, argument: str) -> Tensor:
    if tensor.is_complex():
        raise TypeError(
            f"{function}: {argument} has to be real, found a tensor of dtype {tensor.dtype}"
        )
    if tensor.numel() != 1:
        raise ValueError(
            f"{function}: {argument} has to be a number or a tensor of one element, "
            f"found a tensor of shape {tuple(tensor.shape)}"
        )
    return tensor


def _number(value: Any, function: str, argument: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(
            f"{function}: {argument} has to be a number, found {describe(value)}"
        ) from error


def _known_number(value: Any) -> float | None:
    """A number of any type that needs no device sync to be read, else None: no strings.

    Python's bool is a number here, that of NumPy or torch is none.
    """
    if isinstance(value, Tensor):
        is_number = value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
        if not is_number or value.device.type != "cpu":
            return None
        value = value.detach()
    elif not isinstance(value, numbers.Real) and (
        # Decimal and arrays of one number, but nothing that would lose its imaginary part.
        isinstance(value, (str, numbers.Complex))
        or not hasattr(type(value), "__float__")
        or _is_bool_or_complex(value)
    ):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _is_bool_or_complex(value: Any) -> bool:
    """Whether it is of NumPy and of a kind that is no real number."""
    return getattr(getattr(value, "dtype", None), "kind", "") in ("b", "c")


def _setting(
    value: Any, function: str, argument: str, expected: str, accepts: Callable[[float], bool]
) -> float:
    """A number for the constructor of a rule."""
    # No tensor: a rule is made before the step, where a number may still be on its way.
    number = None if isinstance(value, (bool, Tensor)) else _known_number(value)
    if number is None:
        raise TypeError(f"{function}: {argument} has to be {expected}, found {value!r}")
    if not accepts(number):
        raise ValueError(f"{function}: {argument} has to be {expected}, found {value}")
    return number
