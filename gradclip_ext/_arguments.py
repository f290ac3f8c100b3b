"""Reading the arguments of the public functions, and what to say when they are wrong.

Every error names the function, the argument and the index, what was expected and what was found.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def tensor_list(value: Any, function: str, argument: str) -> list[Any] | tuple[Any, ...]:
    """The argument as a list or tuple; a single tensor becomes a list of one.

    What is in the list is checked later, and only if the native way declines it.
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
    items = list(value)
    if not items and argument == "parameters" and isinstance(value, types.GeneratorType):
        _warn_of_empty_generator(function)
    return items


def _warn_of_empty_generator(function: str) -> None:
    # As torch: only this function warns. The level points at the line that called it.
    if function == "clip_grad_norm_":
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=4
        )


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
    # Python iterates over what has __getitem__, too.
    iterable = hasattr(type(value), "__iter__") or hasattr(type(value), "__getitem__")
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
    """Two lists of names, as few words as tell them apart."""
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


def norm_order(norm_type: Any, function: str) -> float:
    """``norm_type`` as a float, as torch reads it (``'inf'`` is allowed)."""
    if type(norm_type) is float:
        return norm_type
    return _number(norm_type, function, "norm_type")


def limit(max_norm: Any, function: str) -> float | Tensor:
    """``max_norm`` as a float that is not negative, or as the one-element tensor it came as."""
    # First and without another call, because it is what nearly every call brings.
    if type(max_norm) is float and max_norm >= 0.0:
        return max_norm
    if isinstance(max_norm, Tensor):
        return _one_element(max_norm, function, "max_norm")
    return _non_negative(max_norm, function, "max_norm")


def bound(clip_value: Any, function: str) -> float:
    """``clip_value`` as a float that is not negative."""
    if type(clip_value) is not float and isinstance(clip_value, Tensor):
        clip_value = _one_element(clip_value, function, "clip_value")
    return _non_negative(clip_value, function, "clip_value")


def given_norm(total_norm: Any, function: str) -> float | Tensor:
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


def _non_negative(value: Any, function: str, argument: str) -> float:
    number = value if type(value) is float else _number(value, function, argument)
    # Written so that NaN fails.
    if not number >= 0.0:
        raise ValueError(
            f"{function}: {argument} has to be a number that is not negative, found {number}"
        )
    return number


def _number(value: Any, function: str, argument: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(
            f"{function}: {argument} has to be a number, found {describe(value)}"
        ) from error


def nonfinite_error(
    norm_type: float, gradients: Sequence[Tensor], names: Sequence[str]
) -> RuntimeError:
    """Torch's error for a non-finite norm, and which gradients are to blame."""
    message = (
        f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so "
        "it cannot be clipped. To disable this error and scale the gradients by the non-finite "
        "norm anyway, set `error_if_nonfinite=False`"
    )
    culprits = [
        f"{name} of shape {tuple(gradient.shape)}"
        for name, gradient in zip(names, gradients, strict=True)
        if not _is_finite(gradient)
    ]
    if culprits:
        message += (
            f". The first of {len(culprits)} non-finite gradients (out of {len(gradients)}) "
            f"is that of {culprits[0]}."
        )
    else:
        message += f". All {len(gradients)} gradients are finite, but their norm is not."
    return RuntimeError(message)


def _is_finite(gradient: Tensor) -> bool:
    values = gradient.coalesce().values() if gradient.layout == torch.sparse_coo else gradient
    return bool(torch.isfinite(values).all())
