"""A clipper that knows its parameters, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _arguments, _names, _ops
from gradclip_ext._ops import Scalar
from gradclip_ext._parameters import Collection
from gradclip_ext.thresholds import AGC, FixedThreshold, StatelessRule, Threshold

__all__ = ["ClipReport", "GradClipper"]

_CALLER = _ops.Caller("GradClipper")

# What to do with a norm that is not finite, and the coefficient that does it, where one does.
_POLICIES = {"propagate": None, "raise": None, "zero": 0.0, "skip": 1.0}


@dataclass(frozen=True)
class ClipReport:
    """What :meth:`GradClipper.report` read: plain numbers, of the last step and of all.

    Attributes:
        names: what the parameters are called.
        norms: the norm of each gradient before the last step's clipping; 0 without one.
        total_norm: the norm of all together.
        coefficient: the smallest number that a gradient was multiplied by in the last step.
        limits: the thresholds of the last step, one for each group, ``inf`` for one that is left
            out; that of a rule with a limit for each parameter is the smallest.
        steps: calls of :meth:`GradClipper.clip_`.
        clipped_steps: those that made a gradient smaller.
        nonfinite_steps: those whose norm was NaN or infinite.
    """

    names: tuple[str, ...]
    norms: tuple[float, ...]
    total_norm: float
    coefficient: float
    limits: tuple[float, ...]
    steps: int
    clipped_steps: int
    nonfinite_steps: int

    def as_dict(self, prefix: str = "gradients/") -> dict[str, float]:
        """Numbers by name, for a logger such as TensorBoard's or Weights & Biases'."""
        limits = {f"{prefix}limit[{i}]": limit for i, limit in enumerate(self.limits)}
        if len(self.limits) == 1:
            limits = {f"{prefix}limit": self.limits[0]}
        return {
            f"{prefix}total_norm": self.total_norm,
            f"{prefix}coefficient": self.coefficient,
            **limits,
            f"{prefix}clipped_share": self.clipped_steps / max(1, self.steps),
            f"{prefix}nonfinite_steps": float(self.nonfinite_steps),
            **{
                f"{prefix}norm/{name}": norm
                for name, norm in zip(self.names, self.norms, strict=True)
            },
        }


@dataclass
class _Step:
    """What a step measured and decided: numbers that the host knows, or tensors on the device.

    Attributes:
        total: the norm of all gradients.
        norms: the norm of each.
        is_finite: whether the total is.
        ranges: the parameters of each entry of ``max_norm``, empty where they are left out.
        limits: for each group with parameters, of all its gradients together, or of each as a 1-D
            tensor.
        coefficients: the same, after the policy.
    """

    total: Tensor
    norms: Tensor
    is_finite: bool | Tensor
    ranges: list[range]
    limits: list[Scalar]
    coefficients: list[Scalar]

    def clips(self) -> bool | Tensor:
        """Whether a finite gradient was made smaller."""
        clips: bool | Tensor = False
        for coefficient in self.coefficients:
            clips = clips | (_ops.smallest(coefficient, self.total.device) < 1.0)
        return clips & self.is_finite


class GradClipper:
    """Clips the gradients of one model, step after step, and remembers what it saw.

    It collects the parameters once, and again when the model or the optimizer has got others.
    Nothing it does waits for a GPU, but for the policy ``"raise"`` and what reads numbers:
    :meth:`report` and :meth:`state_dict`.

    Args:
        source: a module, its ``named_parameters()``, parameters, an optimizer, a list of several
            optimizers, or parameter groups. Of an optimizer with groups pass the optimizer, not its
            ``param_groups``, which ``optimizer.load_state_dict`` replaces. A parameter that comes
            twice counts once.
        max_norm: largest norm, positive; or a rule that finds one, such as
            :class:`gradclip_ext.AutoClip`; or a sequence with one of these for each parameter
            group, each group then being clipped by its own norm. With ``inf`` the norms are only
            measured. A group that is left out has an entry too, which is not used.
        clip_value: largest magnitude of an element, limited after the norm.
        norm_type: order of the norm.
        nonfinite: what to do with a norm that is NaN or infinite. ``"propagate"``: what torch does.
            ``"raise"``: a RuntimeError that names the culprits, with nothing changed. ``"zero"``:
            all gradients become 0. ``"skip"``: they stay as they are, and ``found_inf`` says so.
        weight_decay: coupled L2 regularization, added to the gradients before they are measured,
            in the same pass; see :func:`gradclip_ext.add_weight_decay_`. Give the optimizer none.
        include: a function of a name and a parameter, asked whenever parameters are collected.
            Those that it gives False for are neither measured nor changed. The parameters of groups
            with ``"clip_grad": False`` are left out as well.

    Attributes:
        found_inf: 1-element float32 tensor, 1 if the last norm was not finite, else 0. Once handed
            to one of torch's fused optimizers, ``optimizer.found_inf = clipper.found_inf``, it
            makes that leave the parameters alone in such a step.

    Raises:
        TypeError: an argument or a parameter has the wrong type.
        ValueError: an argument is out of range, there are no parameters, or a group has none.

    >>> model = torch.nn.Linear(2, 1)
    >>> clipper = GradClipper(model, max_norm=1.0)
    >>> model(torch.tensor([3.0, 4.0])).backward()
    >>> clipper.clip_()
    tensor(5.0990, dtype=torch.float64)
    >>> report = clipper.report()
    >>> report.names, report.clipped_steps
    (('weight', 'bias'), 1)
    """

    def __init__(
        self,
        source: Any,
        max_norm: float | Threshold | AGC | Sequence[float | Threshold | AGC] | None = None,
        *,
        clip_value: float | None = None,
        norm_type: float = 2.0,
        nonfinite: str = "propagate",
        weight_decay: float = 0.0,
        include: Callable[[str, Tensor], bool] | None = None,
    ) -> None:
        function = _CALLER.function
        include = _arguments.predicate(include, function, "include")
        self._collection = Collection(source, function, include=include, obeys_groups=True)
        self._norm_type = _arguments.norm_type(norm_type, function)
        self._nonfinite = _arguments.one_of(nonfinite, tuple(_POLICIES), function, "nonfinite")
        if max_norm is None and clip_value is None:
            raise ValueError(
                f"{function}: there is nothing to do; pass max_norm (inf measures only), "
                "clip_value or both"
            )
        self._rules = self._read_rules(math.inf if max_norm is None else max_norm)
        self._clip_value = (
            None
            if clip_value is None
            else _arguments.clip_bound(clip_value, function, "clip_value")
        )
        self._weight_decay = _arguments.weight_decay(weight_decay, function)
        writes_elements = clip_value is not None or any(isinstance(r, AGC) for r in self._rules)
        if nonfinite == "skip" and writes_elements:
            raise ValueError(
                f"{function}: nonfinite='skip' leaves the gradients as they are, which only a GPU "
                "would know in time; it cannot be combined with clip_value or AGC"
            )
        self._callers = self._callers_of_groups()
        self._steps = 0
        # On a GPU they become tensors there, which are read only when somebody asks.
        self._clipped_steps: int | Tensor = 0
        self._nonfinite_steps: int | Tensor = 0
        self._last: _Step | None = None
        # Written in place, so that it has to be handed over only once.
        self.found_inf = torch.zeros(1, device=self._collection.parameters[0].device)

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters, as collected last."""
        return list(self._collection.parameters)

    @torch.no_grad()
    def clip_(self) -> Tensor:
        """Clip the gradients in place.

        Returns:
            The norm of all gradients before clipping, a 0-dim float64 tensor on their device.

        Raises:
            RuntimeError: the norm is not finite and the policy is ``"raise"``.
            ValueError: there are other parameters than before, and a rule has limits for each.
        """
        if self._collection.refresh():
            self._callers = self._callers_of_groups()
        parameters = self._collection.parameters
        all_ranges = self._ranges()
        # A group whose parameters are left out has nothing to measure, and its rule nothing to do.
        rules = [rule for rule, own in zip(self._rules, all_ranges, strict=True) if own]
        ranges = [own for own in all_ranges if own]
        groups = [parameters[own.start : own.stop] for own in ranges]
        if self._nonfinite == "raise" and self._weight_decay > 0.0:
            # Before anything is added: an error leaves the gradients as they were.
            self._require_finite(_ops.grad_norms(parameters, self._norm_type, None, _CALLER)[0])
        measured = [
            _ops.grad_norms(group, self._norm_type, None, caller, self._weight_decay)
            for group, caller in zip(groups, self._callers, strict=True)
        ]
        total, norms = measured[0] if len(measured) == 1 else self._together(measured)
        if self._nonfinite == "raise":
            self._require_finite(total)

        numbers = [_ops.known(group_total) for group_total, _ in measured]
        known_total = numbers[0] if len(numbers) == 1 else _ops.known(total)
        step = _Step(total, norms, _ops.isfinite(known_total), all_ranges, [], [])
        for rule, number, (group_total, group_norms) in zip(rules, numbers, measured, strict=True):
            limit: Scalar = rule.limits(group_total, group_norms)
            if rule.per_parameter:
                self._decide(step, limit, group_norms, rule.epsilon)
            else:
                self._decide(step, _ops.known(limit), number, rule.epsilon)
        # These first, since they may refuse a gradient.
        for rule, own, group in zip(rules, ranges, groups, strict=True):
            if isinstance(rule, AGC):
                names = self._collection.names[own.start : own.stop]
                rule.clip_(zip(names, group, strict=True))
        for rule, group, coefficient in zip(rules, groups, step.coefficients, strict=True):
            self._scale(rule, group, coefficient, total.device)
        if self._clip_value is not None:
            _ops.clip_grad_value_(
                parameters, self._clip_value, None, _ops.Caller("clip_grad_value_")
            )
        self._count(step)
        return total

    def report(self) -> ClipReport:
        """What the clipper saw. Waits for the GPU, so ask for it as often as you log.

        Raises:
            RuntimeError: nothing has been clipped yet.
        """
        if self._last is None:
            raise RuntimeError("GradClipper: there is nothing to report before the first clip_()")
        step = self._last
        limits = iter(step.limits)
        return ClipReport(
            names=self._collection.names,
            norms=tuple(step.norms.tolist()),
            total_norm=step.total.item(),
            coefficient=min(_smallest(coefficient) for coefficient in step.coefficients),
            limits=tuple(_smallest(next(limits)) if own else math.inf for own in step.ranges),
            steps=self._steps,
            clipped_steps=int(self._clipped_steps),
            nonfinite_steps=int(self._nonfinite_steps),
        )

    def state_dict(self) -> dict[str, Any]:
        """Counters and the state of the rules, to be saved beside the model's and optimizer's."""
        return {
            "names": list(self._collection.names),
            "steps": self._steps,
            "clipped_steps": int(self._clipped_steps),
            "nonfinite_steps": int(self._nonfinite_steps),
            "rules": self._states_of_rules(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a clipper with the same parameters and rules was.

        Raises:
            ValueError: the state is that of another model or of other rules; nothing is changed.
        """
        expected = {"names", "steps", "clipped_steps", "nonfinite_steps", "rules"}
        if set(state) != expected:
            raise ValueError(
                f"GradClipper: the state has to have the keys {', '.join(sorted(expected))}, "
                f"found {', '.join(sorted(map(str, state))) or 'none'}"
            )
        names, own = tuple(state["names"]), self._collection.names
        if not _names.agree(own, names):
            raise ValueError(
                "GradClipper: the state is that of another model: expected "
                f"{_arguments.count_and_first_difference(own, _names.without_wrappers(names))}"
            )
        if len(state["rules"]) != len(self._rules):
            raise ValueError(
                f"GradClipper: the state has rules for {len(state['rules'])} groups, expected "
                f"{len(self._rules)}"
            )
        before = self._states_of_rules()
        try:
            for rule, rule_state in zip(self._rules, state["rules"], strict=True):
                if isinstance(rule, StatelessRule) != (rule_state is None):
                    raise ValueError(
                        "GradClipper: the state is that of other rules: expected "
                        f"{_name_of(rule)}, found {rule_state and rule_state.get('rule')}"
                    )
                if rule_state is not None:
                    rule.load_state_dict(rule_state)
        except Exception:
            for rule, rule_state in zip(self._rules, before, strict=True):
                if rule_state is not None:
                    rule.load_state_dict(rule_state)
            raise
        self._steps = int(state["steps"])
        self._clipped_steps = int(state["clipped_steps"])
        self._nonfinite_steps = int(state["nonfinite_steps"])

    def _states_of_rules(self) -> list[dict[str, Any] | None]:
        return [
            None if isinstance(rule, StatelessRule) else rule.state_dict() for rule in self._rules
        ]

    def _read_rules(self, max_norm: Any) -> list[Threshold]:
        if not isinstance(max_norm, (list, tuple)):
            return [_rule(max_norm, "max_norm")]
        groups = len(self._collection.groups)
        if len(max_norm) != groups:
            raise ValueError(
                f"GradClipper: max_norm has to have one entry for each of the {groups} parameter "
                f"groups, found {len(max_norm)}"
            )
        return [_rule(rule, f"max_norm[{i}]") for i, rule in enumerate(max_norm)]

    def _ranges(self) -> list[range]:
        """What each rule is for: all parameters where there is one, else a group."""
        if len(self._rules) == 1:
            return [range(len(self._collection.parameters))]
        if len(self._rules) != len(self._collection.groups):
            raise ValueError(
                f"GradClipper: there are {len(self._collection.groups)} parameter groups now, "
                f"expected {len(self._rules)}, as many as entries of max_norm"
            )
        return self._collection.groups

    def _callers_of_groups(self) -> list[_ops.Caller]:
        """How messages name the parameters of each group that has some."""
        names = self._collection.names
        return [
            _ops.Caller(_CALLER.function, names=names[own.start : own.stop])
            for own in self._ranges()
            if own
        ]

    def _together(self, measured: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The norm of all groups, and the norms of all gradients, where the first group lies."""
        device = measured[0][0].device
        totals = torch.stack([total.to(device) for total, _ in measured])
        norms = torch.cat([norms.to(device) for _, norms in measured])
        return torch.linalg.vector_norm(totals, self._norm_type), norms

    def _decide(self, step: _Step, limit: Scalar, norm: Scalar, epsilon: float) -> None:
        """Make the coefficient that keeps a norm within its limit, or the policy's."""
        coefficient = _ops.clip_coefficient(limit, norm, epsilon)
        instead = _POLICIES[self._nonfinite]
        if instead is not None:
            coefficient = _ops.select(step.is_finite, coefficient, instead)
        step.limits.append(limit)
        step.coefficients.append(coefficient)

    def _scale(
        self, rule: Threshold, group: list[Tensor], coefficient: Scalar, device: torch.device
    ) -> None:
        clears = self._nonfinite == "zero"
        if not clears and isinstance(rule, StatelessRule) and rule.only_measures:
            return
        if isinstance(coefficient, Tensor) and coefficient.dim() == 1:
            _ops.scale_each_(group, coefficient, _CALLER)
        elif clears and (isinstance(coefficient, Tensor) or coefficient == 0.0):
            # Not multiplied all alike, which would leave NaN: here 0 clears.
            each = torch.as_tensor(coefficient, dtype=torch.float64, device=device)
            _ops.scale_each_(group, each.expand(len(group)).contiguous(), _CALLER)
        else:
            _ops.scale_(group, coefficient, _CALLER)

    def _count(self, step: _Step) -> None:
        is_nonfinite = step.is_finite ^ True
        self._steps += 1
        self._clipped_steps = self._clipped_steps + step.clips()
        self._nonfinite_steps = self._nonfinite_steps + is_nonfinite
        self.found_inf.fill_(is_nonfinite)
        self._last = step

    def _require_finite(self, total: Tensor) -> None:
        if total.isfinite():
            return
        pairs = zip(self._collection.names, self._collection.parameters, strict=True)
        found = [(name, p.grad) for name, p in pairs if p.grad is not None]
        raise _arguments.nonfinite_error(
            self._norm_type, [gradient for _, gradient in found], [name for name, _ in found]
        )


def _rule(value: Any, argument: str) -> Threshold:
    if isinstance(value, Threshold):
        return value
    return FixedThreshold(_arguments.clip_bound(value, _CALLER.function, argument))


def _name_of(rule: Threshold) -> str:
    return "float" if isinstance(rule, FixedThreshold) else type(rule).__name__


def _smallest(number: Scalar) -> float:
    return number.min().item() if isinstance(number, Tensor) else number
