"""The interface of a rule, and what the rules from the literature share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, Protocol, TypeGuard, TypeVar, runtime_checkable

import torch
from torch import Tensor

from gradclip_ext import _ops
from gradclip_ext._ops import Scalar

__all__ = [
    "LARGEST_COUNT",
    "FixedThreshold",
    "Rule",
    "StatelessRule",
    "Threshold",
    "is_observation",
    "outside_inference",
    "takes_numbers",
]


# Up to here float64 counts by ones.
LARGEST_COUNT = 2**53

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def outside_inference(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorator for everything that creates a tensor of the state.

    Otherwise a step inside ``torch.inference_mode()`` would leave tensors that a later step outside
    of it could not write.
    """

    @functools.wraps(function)
    def outside(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        # Checked first, because leaving the mode takes a tenth of a step.
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(mode=False):
            return function(*args, **kwargs)

    return outside


def is_observation(norm: Scalar) -> bool | Tensor:
    """Where a norm tells how large gradients are: finite, and not the 0 of having none."""
    return (norm > 0.0) & (norm < math.inf)


@runtime_checkable
class Threshold(Protocol):
    """Interface of a rule: limits for this step's norms, and a state that can be saved.

    A rule with ``per_parameter`` may also have a method ``rearrange(places)``. It is called before
    :meth:`limits` when the parameters or their order have changed: ``places`` holds, for each
    parameter of the coming steps, its previous index, or None for a new one. Without that method, a
    change of the parameters is an error.

    Attributes:
        per_parameter: whether :meth:`limits` gives one limit for each parameter.
        epsilon: added to a norm before a limit is divided by it. A coefficient is
            ``min(1, limit / (norm + epsilon))``, and 1 for 0 / 0 and for an infinite limit.
    """

    per_parameter: bool
    epsilon: float

    def limits(self, total: Tensor, norms: Tensor) -> Tensor:
        """Take the norms of this step and return its limits.

        Args:
            total: the norm of all gradients together before clipping, 0-dim, float64.
            norms: the norm of each parameter's gradient, 1-D, float64, on the device of ``total``;
                0 for a parameter that has no gradient.

        Returns:
            A float64 tensor on the same device: 0-dim, or as long as ``norms`` if
            ``per_parameter`` is set. ``inf`` where nothing is to be clipped.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: tensors and numbers, and the name of the class as ``"rule"``."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from where :meth:`state_dict` was called."""
        ...


class Rule:
    """Base class of the rules: creates, moves, saves and loads a state.

    Where the host knows the total, the scalars of the state are Python floats; elsewhere they are
    tensors on the device of the total. Saved are tensors in both cases.
    """

    per_parameter: bool = False
    # The papers divide by the norm itself.
    epsilon: float = 0.0

    def __init__(self) -> None:
        # Empty before the first step, at which the device and the parameters become known.
        self._state: dict[str, Any] = {}
        # The device of its tensors; None where the scalars are known on the host.
        self._place: torch.device | None = None

    def limits(self, total: Tensor, norms: Tensor) -> Tensor:
        """Take the norms of this step and return its limits, see :meth:`Threshold.limits`.

        A ``total`` that is 0, as without any gradient, or not finite is no observation: it leaves
        the state as it was and gives a limit computed from that. What becomes of gradients that are
        not finite is for the caller to decide. On the meta device nothing is measured: the limits
        are meta tensors, and the state stays what it was on another.
        """
        if total.is_meta:
            like = norms if self.per_parameter else total
            return torch.full_like(like, math.inf, dtype=torch.float64)
        # Nothing of the graph that computed the norms may live on in the state.
        total = total.detach().to(torch.float64)
        norms = norms.detach().to(torch.float64)
        with torch.no_grad():
            return _ops.in_tensor(self.limit_for(_ops.known(total), norms), total.device)

    @outside_inference
    def limit_for(self, total: Scalar, norms: Tensor) -> Scalar:
        """As :meth:`limits`, with a total that may be known on the host; so is the limit then.

        Gradients are not recorded. ``norms`` are float64.
        """
        place = total.device if isinstance(total, Tensor) else None
        state = self._state
        if not state or place != self._place:
            state = self._placed(place, norms.numel())
        limits, self._state = self._advance(state, total, norms)
        self._place = place
        return limits

    def rearrange(self, places: Sequence[int | None]) -> None:
        """Go on with other parameters; see :class:`Threshold`.

        Nothing is to be done for a rule with one limit for all.
        """

    @outside_inference
    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: tensors and numbers, and the name of the class as ``"rule"``."""
        copies = {name: tensor.clone() for name, tensor in self._tensors(0).items()}
        return {"rule": self._name, **copies, **self._settings()}

    @outside_inference
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from where :meth:`state_dict` was called, bit for bit.

        The arguments of the rule are its own; none is taken from ``state``. Norms of 0, which
        earlier versions counted, are left out where they can be told from the others.

        Raises:
            TypeError: ``state`` is not a mapping.
            ValueError: it is the state of another rule, lacks something, holds numbers that no
                steps lead to, or does not fit this object. Nothing is changed then.
        """
        tensors = self._read(state)
        self._check(tensors, state)
        self._restore(tensors)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _initial(self, parameter_count: int, device: torch.device) -> dict[str, Tensor]:
        """The state before the first step."""
        raise NotImplementedError

    def _advance(
        self, state: dict[str, Any], total: Scalar, norms: Tensor
    ) -> tuple[Scalar, dict[str, Any]]:
        """This step's limits, and the state after it. The scalars of a state are as the total."""
        raise NotImplementedError

    def _placed(self, place: torch.device | None, parameter_count: int) -> dict[str, Any]:
        """The state as it is needed in a place, which may be a new one."""
        return self._in_place(self._tensors(parameter_count), place)

    def _in_place(
        self, tensors: Mapping[str, Tensor], place: torch.device | None
    ) -> dict[str, Any]:
        """A state of tensors as a step in a place needs it."""
        if place is None:
            return {name: self._on_host(name, tensors) for name in tensors}
        return {name: tensor.to(place) for name, tensor in tensors.items()}

    def _tensors(self, parameter_count: int) -> dict[str, Tensor]:
        """The state in tensors, or that before the first step."""
        if not self._state:
            return self._initial(parameter_count, torch.device("cpu"))
        device = self._place or torch.device("cpu")
        return {name: _ops.in_tensor(value, device) for name, value in self._state.items()}

    def _on_host(self, name: str, tensors: Mapping[str, Tensor]) -> Any:
        """A part of the state as it is held where the total is known: scalars as numbers."""
        tensor = tensors[name].to("cpu")
        return float(_ops.known(tensor)) if tensor.dim() == 0 else tensor

    def _settings(self) -> dict[str, Any]:
        """The arguments that are needed to interpret the state."""
        return {}

    def _check(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Refuse a state of the right form that cannot be, or does not fit this object."""
        count = tensors["count"].item()
        whole = 0.0 <= count <= LARGEST_COUNT and count == int(count)
        self._require(whole, "count", f"be a whole number from 0 to {LARGEST_COUNT}", count)

    def _require(self, holds: bool, key: str, expected: str, found: Any, index: str = "") -> None:
        if not holds:
            raise ValueError(
                f"{self._name}: state[{key!r}]{index} has to {expected}, found {found}"
            )

    def _require_each(self, holds: Tensor, key: str, expected: str, found: Tensor) -> None:
        """As :meth:`_require`, of the elements of a tensor; the first that is wrong is named."""
        wrong = holds.logical_not().nonzero().flatten().tolist()
        for index in wrong[:1]:
            self._require(False, key, expected, found[index].item(), f"[{index}]")

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        device = tensors["count"].device
        # Here and not in the first step, which on the CPU will ask for numbers.
        self._place = None if device.type == "cpu" else device
        self._state = self._in_place(tensors, self._place)

    def _read(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Copies of the tensors of a state, in the form that :meth:`_initial` gives them."""
        if not isinstance(state, Mapping):
            raise TypeError(
                f"{self._name}: state has to be a mapping, found {type(state).__name__}"
            )
        found = state.get("rule", "nothing")
        same = isinstance(found, str) and found == self._name
        self._require(same, "rule", f"be {self._name!r}", repr(found))
        pattern = self._initial(0, torch.device("cpu"))
        expected = [*pattern, *self._settings()]
        missing = [key for key in expected if key not in state]
        if missing:
            raise ValueError(
                f"{self._name}: state has to hold {', '.join(map(repr, expected))}, "
                f"found none of {', '.join(map(repr, missing))}"
            )
        for name, model in pattern.items():
            found = state[name]
            form = f"be a tensor of {model.dim()} dimensions and dtype {model.dtype}"
            self._require(isinstance(found, Tensor), name, form, type(found).__name__)
            self._require(
                found.dim() == model.dim() and found.dtype == model.dtype,
                name,
                form,
                f"{found.dim()} dimensions and dtype {found.dtype}",
            )
            self._require(
                found.layout == torch.strided and not found.is_meta,
                name,
                "be a dense tensor that holds numbers",
                f"layout {found.layout} on device {found.device}",
            )
        return {name: state[name].detach().clone() for name in pattern}


class StatelessRule:
    """A rule without history, so that there is nothing to save.

    Attributes:
        only_measures: whether it never limits the norm of a whole gradient.
    """

    per_parameter: bool = False
    epsilon: float = 0.0
    only_measures: bool = False

    def limits(self, total: Tensor, norms: Tensor) -> Tensor:
        """The same limit in every step, as a 0-dim tensor; see :meth:`Threshold.limits`."""
        return _ops.in_tensor(self.limit_for(total, norms), total.device)

    def limit_for(self, total: Scalar, norms: Tensor) -> Scalar:
        """As :meth:`limits`, with a total that may be known on the host; so is the limit then."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accept an empty state.

        Raises:
            TypeError: ``state`` is not a mapping.
            ValueError: the state is not empty, and so that of another rule.
        """
        if not isinstance(state, Mapping):
            raise TypeError(
                f"{type(self).__name__}: state has to be a mapping, found {type(state).__name__}"
            )
        if state:
            raise ValueError(
                f"{type(self).__name__}: state has to be empty, found {', '.join(map(str, state))}"
            )


class FixedThreshold(StatelessRule):
    """A plain number as a rule: the same limit in every step, as in ``clip_grad_norm_``.

    Args:
        max_norm: largest norm, greater than 0; with ``inf`` nothing is clipped.
    """

    # As in torch's clip_grad_norm_.
    epsilon: float = 1e-6

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm
        self.only_measures = max_norm == math.inf
        # On the device of the norms, so that no step has to bring it there.
        self._limit: Tensor | None = None

    def limit_for(self, total: Scalar, norms: Tensor) -> Scalar:
        """``max_norm``, on the device of a total that is not known on the host."""
        if not isinstance(total, Tensor):
            return self.max_norm
        if self._limit is None or self._limit.device != total.device:
            self._limit = self._on(total.device)
        return self._limit

    @outside_inference
    def _on(self, device: torch.device) -> Tensor:
        # Not moved: what has been on the meta device holds no number any more.
        return _ops.in_tensor(self.max_norm, device)


def takes_numbers(rule: Threshold) -> TypeGuard[Rule | StatelessRule]:
    """Whether it can be asked by ``limit_for``: its ``limits`` are not overridden."""
    own = getattr(rule.limits, "__func__", None)
    return own is Rule.limits or own is StatelessRule.limits
