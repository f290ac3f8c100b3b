"""What the callbacks of all frameworks share: clippers of optimizers that a trainer has made."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradclip_ext.clipper import GradClipper

__all__ = ["LOGS", "Clippers"]

# What is logged: all of a report, all but the norm of each parameter, or nothing.
LOGS = ("each", "summary", None)


class Clippers:
    """A clipper for each optimizer of a training, all with the same settings.

    Args:
        function: what messages call the callback.
        max_norm: as in :class:`gradclip_ext.GradClipper`; each optimizer gets its own copy of a
            rule.
        settings: the other arguments of :class:`gradclip_ext.GradClipper`.
        prefix: what the names of logged numbers begin with.
        log: one of :data:`LOGS`.

    Raises:
        TypeError: there is no such setting.
        ValueError: ``log`` is something else.
    """

    def __init__(
        self, function: str, max_norm: Any, settings: Mapping[str, Any], prefix: str, log: Any
    ) -> None:
        try:
            inspect.signature(GradClipper).bind(None, max_norm, **settings)
        except TypeError as error:
            raise TypeError(f"{function}: {error}") from None
        if log not in LOGS:
            raise ValueError(f"{function}: log has to be one of {LOGS}, found {log!r}")
        # Whether something was clipped that has not been reported.
        self.has_news = False
        self.logs = log is not None
        self._function = function
        self._max_norm = max_norm
        self._settings = dict(settings)
        self._prefix = prefix
        self._each = log == "each"
        self._model: torch.nn.Module | None = None
        self._owned: list[_Owned] = []
        # Whether the optimizers are those of the training that goes on.
        self._are_current = False
        # States that were loaded while they are not.
        self._loaded: list[Any] | None = None

    @property
    def clippers(self) -> list[GradClipper]:
        """The clippers, in the order of the optimizers; none before the training has begun."""
        return [owned.clipper for owned in self._owned]

    def pause(self) -> None:
        """Take a state that is loaded from here on to be for the next :meth:`start`."""
        self._are_current = False

    def start(self, model: torch.nn.Module, optimizers: Iterable[Any]) -> None:
        """Make the clippers, as they were when the state was saved that has been loaded.

        A training that goes on with the same model and parameters goes on with the same clippers.
        """
        _refuse_flat_shards(model, self._function)
        before = [clipper.state_dict() for clipper in self.clippers if self._model is model]
        self._model = model
        self._owned = [self._made(optimizer) for optimizer in optimizers]
        self._are_current = True
        if self._loaded is not None:
            states, self._loaded = self._loaded, None
            self._load(states)
        elif _names(before) == _names([clipper.state_dict() for clipper in self.clippers]):
            self._load(before)

    def clip_(self, optimizer: Any) -> Tensor | None:
        """Clip the gradients of an optimizer.

        Those of a step that the clipper skips become None, so that no optimizer uses them.

        Returns:
            The norm, as :meth:`gradclip_ext.GradClipper.clip_`; None if there are no gradients.
        """
        if _is_idle(optimizer):
            return None
        owned = self._of(optimizer)
        norm = owned.clipper.clip_()
        owned.has_clipped = self.has_news = True
        if self._skips(owned.clipper, norm):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        return norm

    def metrics(self) -> dict[str, float]:
        """What the clippers report, by name; those of several optimizers by their places.

        Those that have not clipped yet are left out.
        """
        self.has_news = False
        result: dict[str, float] = {}
        for index, owned in enumerate(self._owned):
            if not owned.has_clipped:
                continue
            prefix = self._prefix
            if len(self._owned) > 1:
                prefix = f"{prefix}optimizer[{index}]/"
            numbers = owned.clipper.report().as_dict(prefix)
            each = f"{prefix}norm/"
            result.update(
                (name, number)
                for name, number in numbers.items()
                if self._each or not name.startswith(each)
            )
        return result

    def state_dict(self) -> dict[str, Any]:
        """The states of the clippers, in the order of the optimizers."""
        if self._loaded is not None:
            return {"clippers": list(self._loaded)}
        return {"clippers": [clipper.state_dict() for clipper in self.clippers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state, now or when the training begins.

        Raises:
            ValueError: the state is that of another number of optimizers, or does not fit a
                clipper. Nothing is changed then.
        """
        states = list(state["clippers"])
        if self._are_current:
            self._load(states)
        else:
            # One that was saved before there were clippers holds none.
            self._loaded = states or None

    def _load(self, states: Sequence[Any]) -> None:
        if len(states) != len(self._owned):
            raise ValueError(
                f"{self._function}: the state is that of {len(states)} optimizers, expected "
                f"{len(self._owned)}"
            )
        before = [clipper.state_dict() for clipper in self.clippers]
        try:
            for clipper, state in zip(self.clippers, states, strict=True):
                clipper.load_state_dict(state)
        except Exception:
            for clipper, state in zip(self.clippers, before, strict=True):
                clipper.load_state_dict(state)
            raise

    def _of(self, optimizer: Any) -> _Owned:
        for owned in self._owned:
            if owned.optimizer is optimizer:
                return owned
        # One that was made during the training.
        owned = self._made(optimizer)
        self._owned.append(owned)
        return owned

    def _made(self, optimizer: Any) -> _Owned:
        assert self._model is not None
        groups = _NamedGroups(optimizer, self._model)
        clipper = GradClipper(groups, copy.deepcopy(self._max_norm), **self._settings)
        return _Owned(optimizer, clipper)

    def _skips(self, clipper: GradClipper, norm: Tensor) -> bool:
        """Whether the step is to be skipped; waits for a GPU only where the settings may skip."""
        policy = self._settings.get("nonfinite", "propagate")
        if policy != "skip" and self._settings.get("skip_above") is None:
            return False
        if not bool(clipper.found_inf):
            return False
        # Gradients that became 0 are stepped.
        return policy != "zero" or bool(norm.isfinite())


@dataclass
class _Owned:
    """A clipper, and the optimizer whose gradients it clips."""

    optimizer: Any
    clipper: GradClipper
    # In this training, so that there is something to report.
    has_clipped: bool = False


class _NamedGroups:
    """The parameter groups of an optimizer, as they are at any time, with the names of a model.

    A group without parameters, as trainers make for those without weight decay, is left out.
    """

    def __init__(self, optimizer: Any, model: torch.nn.Module) -> None:
        self._optimizer = optimizer
        self._model = model
        # By id, together with the parameter, so that no other gets its id.
        self._named: dict[int, tuple[Tensor, str | None]] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups = [group for group in self._optimizer.param_groups if group["params"]]
        if any(id(p) not in self._named for group in groups for p in group["params"]):
            self._named = {id(p): (p, None) for group in groups for p in group["params"]}
            self._named.update((id(p), (p, name)) for name, p in self._model.named_parameters())
        named = self._named
        return [
            {**group, "param_names": [named[id(p)][1] for p in group["params"]]} for group in groups
        ]


def _names(states: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [state["names"] for state in states]


def _is_idle(optimizer: Any) -> bool:
    """Whether there is nothing to clip, on any rank."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(parameter.grad is not None for parameter in parameters):
        return False
    # Another rank may have gradients of these, and would wait for this one.
    return not any(_is_distributed(parameter) for parameter in parameters)


def _is_distributed(parameter: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def _refuse_flat_shards(model: torch.nn.Module, function: str) -> None:
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
        raise ValueError(
            f"{function}: the gradients of FullyShardedDataParallel are pieces of a flat one, of "
            "which only its own clip_grad_norm_ knows the norm; use FSDP2, torch's fully_shard"
        )
