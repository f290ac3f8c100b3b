"""Norms of single gradients, and a clipper that knows its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradclip_ext import _C, _arguments, _general, _torch_ops
from gradclip_ext._collect import Collection, default_names
from gradclip_ext.functional import clip_grad_value_
from gradclip_ext.textbook import add_weight_decay_
from gradclip_ext.thresholds import AGC, Threshold

__all__ = ["ClipReport", "GradClipper", "GradNorms", "grad_norms"]

# A number that the host knows, or one or more on a device.
_Number = float | Tensor

_POLICIES = ("propagate", "raise", "zero", "skip")


class GradNorms(NamedTuple):
    """What :func:`grad_norms` returns.

    Attributes:
        total: the norm of all gradients together, a 0-dim tensor.
        norms: the norm of each gradient, a 1-D tensor with an entry for each parameter; 0 where a
            parameter has no gradient.
        names: what the parameters are called, in the same order.
    """

    total: Tensor
    norms: Tensor
    names: tuple[str, ...]


def grad_norms(
    source: Any, norm_type: float = 2.0, *, dtype: torch.dtype | None = None
) -> GradNorms:
    """Measure the gradients of a model together and each, in one pass.

    The norms stay on the gradients' device, and nothing waits for it.

    Args:
        source: a module, its ``named_parameters()``, parameters, or an optimizer or its
            ``param_groups``.
        norm_type: order of the norm, as in :func:`gradclip_ext.clip_grad_norm_`.
        dtype: ``torch.float32`` or ``torch.float64``, what the results are rounded to. Without it
            they are float64 tensors, as good as the gradients' own dtype asks for.

    Returns:
        The total norm, the norm of each gradient and the names, see :class:`GradNorms`.

    Raises:
        TypeError: an argument or a parameter has the wrong type.
        ValueError: there are no parameters.

    >>> model = torch.nn.Linear(2, 1)
    >>> model(torch.tensor([3.0, 4.0])).backward()
    >>> grad_norms(model, dtype=torch.float32)
    GradNorms(total=tensor(5.0990), norms=tensor([5., 1.]), names=('weight', 'bias'))
    """
    function = "grad_norms"
    order = _arguments.norm_order(norm_type, function)
    if dtype is not None:
        _arguments.result_dtype(dtype, function)
    # A list of parameters is not looked through in Python: that takes longer than measuring.
    measured = _C.grad_norms(source, order, dtype, 0.0) if _is_plain_list(source) else None
    if measured is None:
        collection = Collection(source, function)
        names = collection.names
        measured = _measured(collection.parameters, order, function, dtype)
    else:
        names = default_names(len(source))
    total, norms = measured
    return (
        GradNorms(total, norms, names)
        if dtype is None
        else GradNorms(total.to(dtype), norms.to(dtype), names)
    )


@dataclass(frozen=True)
class ClipReport:
    """What :meth:`GradClipper.report` read: plain numbers, of the last step and of all.

    Attributes:
        names: what the parameters are called.
        norms: the norm of each gradient before the last step's clipping; 0 without one.
        total_norm: the norm of all together.
        coefficient: the smallest number that a gradient was multiplied by in the last step.
        limits: the thresholds of the last step, one for each group; that of a rule with a limit for
            each parameter is the smallest.
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


class GradClipper:
    """Clips the gradients of one model, step after step, and remembers what it saw.

    It collects the parameters once, and again when the model or the optimizer has got others.
    Nothing it does waits for a GPU, but for the policy ``"raise"`` and what reads numbers:
    :meth:`report` and :meth:`state_dict`.

    Args:
        source: a module, its ``named_parameters()``, parameters, or an optimizer or its
            ``param_groups``.
        max_norm: largest norm, positive; or a rule that finds one, such as
            :class:`gradclip_ext.AutoClip`; or a sequence with one of these for each parameter
            group, each group then being clipped by its own norm. With ``inf`` the norms are only
            measured.
        clip_value: largest magnitude of an element, limited after the norm.
        norm_type: order of the norm.
        nonfinite: what to do with a norm that is NaN or infinite. ``"propagate"``: what torch does.
            ``"raise"``: a RuntimeError that names the culprits, with nothing changed. ``"zero"``:
            all gradients become 0. ``"skip"``: they stay as they are, and ``found_inf`` says so.
        weight_decay: coupled L2 regularization, added to the gradients before they are measured,
            in the same pass; see :func:`gradclip_ext.add_weight_decay_`. Give the optimizer none.

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
    ) -> None:
        function = "GradClipper"
        self._collection = Collection(source, function)
        self._order = _arguments.norm_order(norm_type, function)
        if nonfinite not in _POLICIES:
            raise ValueError(
                f"{function}: nonfinite has to be one of {', '.join(map(repr, _POLICIES))}, "
                f"found {nonfinite!r}"
            )
        self._nonfinite = nonfinite
        if max_norm is None and clip_value is None:
            raise ValueError(
                f"{function}: there is nothing to do; pass max_norm (inf measures only), "
                "clip_value or both"
            )
        self._rules = self._read_rules(math.inf if max_norm is None else max_norm)
        self._clip_value = None if clip_value is None else _positive(clip_value, "clip_value")
        if not (isinstance(weight_decay, (int, float)) and 0.0 <= weight_decay < math.inf):
            raise ValueError(
                f"{function}: weight_decay has to be a finite number that is not negative, "
                f"found {weight_decay!r}"
            )
        self._weight_decay = float(weight_decay)
        writes_elements = clip_value is not None or any(isinstance(r, AGC) for r in self._rules)
        if nonfinite == "skip" and writes_elements:
            raise ValueError(
                f"{function}: nonfinite='skip' leaves the gradients as they are, which only a GPU "
                "would know in time; it cannot be combined with clip_value or AGC"
            )
        self._steps = 0
        # On a GPU they become tensors there, which are read only when somebody asks.
        self._clipped_steps: int | Tensor = 0
        self._nonfinite_steps: int | Tensor = 0
        self._last: tuple[Tensor, Tensor, list[_Number], list[_Number]] | None = None
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
        self._collection.refresh()
        parameters = self._collection.parameters
        groups = self._groups()
        if self._nonfinite == "raise" and self._weight_decay > 0.0:
            # Before anything is added: an error leaves the gradients as they were.
            self._require_finite(_measured(parameters, self._order, "GradClipper", None)[0])
        measured = [self._decayed_and_measured(group) for group in groups]
        total, norms = measured[0] if len(measured) == 1 else self._together(measured)
        is_finite = math.isfinite(total.item()) if _is_on_host(total) else total.isfinite()
        if self._nonfinite == "raise":
            self._require_finite(total)

        limits: list[_Number] = []
        coefficients: list[_Number] = []
        for rule, (group_total, group_norms) in zip(self._rules, measured, strict=True):
            limit, coefficient = _decided(rule, group_total, group_norms)
            limits.append(limit)
            coefficients.append(self._with_policy(coefficient, is_finite))
        # These first, since they may refuse a gradient.
        for rule, names, group in zip(self._rules, self._group_names(), groups, strict=True):
            if isinstance(rule, AGC):
                rule.clip_(zip(names, group, strict=True))
        for rule, group, coefficient in zip(self._rules, groups, coefficients, strict=True):
            self._scale(rule, group, coefficient, total.device)
        if self._clip_value is not None:
            clip_grad_value_(parameters, self._clip_value)
        self._remember(total, norms, coefficients, limits, is_finite)
        return total

    def report(self) -> ClipReport:
        """What the clipper saw. Waits for the GPU, so ask for it as often as you log.

        Raises:
            RuntimeError: nothing has been clipped yet.
        """
        if self._last is None:
            raise RuntimeError("GradClipper: there is nothing to report before the first clip_()")
        total, norms, coefficients, limits = self._last
        return ClipReport(
            names=self._collection.names,
            norms=tuple(norms.tolist()),
            total_norm=total.item(),
            coefficient=min(_smallest(coefficient) for coefficient in coefficients),
            limits=tuple(_smallest(limit) for limit in limits),
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
            "rules": [
                rule.state_dict() if isinstance(rule, Threshold) else None for rule in self._rules
            ],
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
        if names != own:
            raise ValueError(
                "GradClipper: the state is that of another model: expected "
                f"{_arguments.count_and_first_difference(own, names)}"
            )
        if len(state["rules"]) != len(self._rules):
            raise ValueError(
                f"GradClipper: the state has rules for {len(state['rules'])} groups, expected "
                f"{len(self._rules)}"
            )
        before = [
            rule.state_dict() if isinstance(rule, Threshold) else None for rule in self._rules
        ]
        try:
            for rule, rule_state in zip(self._rules, state["rules"], strict=True):
                if isinstance(rule, Threshold) != (rule_state is not None):
                    raise ValueError(
                        "GradClipper: the state is that of other rules: expected "
                        f"{type(rule).__name__}, found {rule_state and rule_state.get('rule')}"
                    )
                if isinstance(rule, Threshold):
                    rule.load_state_dict(rule_state)
        except Exception:
            for rule, rule_state in zip(self._rules, before, strict=True):
                if isinstance(rule, Threshold) and rule_state is not None:
                    rule.load_state_dict(rule_state)
            raise
        self._steps = int(state["steps"])
        self._clipped_steps = int(state["clipped_steps"])
        self._nonfinite_steps = int(state["nonfinite_steps"])

    def _read_rules(self, max_norm: Any) -> list[float | Threshold | AGC]:
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

    def _groups(self) -> list[list[Tensor]]:
        parameters = self._collection.parameters
        return [parameters[own.start : own.stop] for own in self._ranges()]

    def _group_names(self) -> list[tuple[str, ...]]:
        return [self._collection.names[own.start : own.stop] for own in self._ranges()]

    def _decayed_and_measured(self, group: list[Tensor]) -> tuple[Tensor, Tensor]:
        if self._weight_decay > 0.0:
            found = _C.grad_norms(group, self._order, None, self._weight_decay)
            if found is not None:
                return found
            add_weight_decay_(group, self._weight_decay)
        return _measured(group, self._order, "GradClipper", None)

    def _together(self, measured: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The norm of all groups, and the norms of all gradients, where the first group lies."""
        device = measured[0][0].device
        totals = torch.stack([total.to(device) for total, _ in measured])
        norms = torch.cat([norms.to(device) for _, norms in measured])
        return torch.linalg.vector_norm(totals, self._order), norms

    def _with_policy(self, coefficient: _Number, is_finite: bool | Tensor) -> _Number:
        instead = {"zero": 0.0, "skip": 1.0}.get(self._nonfinite)
        if instead is None or is_finite is True:
            return coefficient
        if is_finite is False:
            return instead
        if not isinstance(coefficient, Tensor):
            coefficient = torch.full_like(is_finite, coefficient, dtype=torch.float64)
        return torch.where(is_finite.to(coefficient.device), coefficient, instead)

    def _scale(
        self,
        rule: float | Threshold | AGC,
        group: list[Tensor],
        coefficient: _Number,
        device: torch.device,
    ) -> None:
        only_measures = isinstance(rule, AGC) or rule == math.inf
        if only_measures and self._nonfinite != "zero":
            return
        clears = self._nonfinite == "zero" and (
            isinstance(coefficient, Tensor) or coefficient == 0.0
        )
        if not clears and not _is_for_each(coefficient):
            if _C.scale_(group, coefficient) is None:
                _general.scale_by_(group, _tensor(coefficient, device), "GradClipper")
            return
        each = _tensor(coefficient, device)
        if each.dim() == 0:
            each = each.expand(len(group)).contiguous()
        if _C.scale_each_(group, each) is None:
            _general.scale_each_(group, each, "GradClipper")

    def _remember(
        self,
        total: Tensor,
        norms: Tensor,
        coefficients: list[_Number],
        limits: list[_Number],
        is_finite: bool | Tensor,
    ) -> None:
        self._steps += 1
        self._last = (total, norms, coefficients, limits)
        if not isinstance(is_finite, Tensor):
            clips = is_finite and any(_smallest(c) < 1.0 for c in coefficients)
            self._clipped_steps += int(clips)
            self._nonfinite_steps += int(not is_finite)
            self.found_inf.fill_(float(not is_finite))
            return
        smallest = torch.stack([_tensor(c, total.device).min() for c in coefficients]).min()
        self._clipped_steps = self._clipped_steps + torch.logical_and(smallest < 1.0, is_finite)
        self._nonfinite_steps = self._nonfinite_steps + torch.logical_not(is_finite)
        self.found_inf.copy_(torch.logical_not(is_finite))

    def _require_finite(self, total: Tensor) -> None:
        if total.isfinite():
            return
        pairs = zip(self._collection.names, self._collection.parameters, strict=True)
        found = [(name, p.grad) for name, p in pairs if p.grad is not None]
        raise _arguments.nonfinite_error(
            self._order, [gradient for _, gradient in found], [name for name, _ in found]
        )


def _rule(value: Any, argument: str) -> float | Threshold | AGC:
    if isinstance(value, (Threshold, AGC)):
        return value
    return _positive(value, argument)


def _positive(value: Any, argument: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"GradClipper: {argument} has to be a number or a rule such as AutoClip(), "
            f"found {_arguments.describe(value)}"
        )
    # Written so that NaN fails.
    if not value > 0.0:
        raise ValueError(f"GradClipper: {argument} has to be a positive number, found {value}")
    return float(value)


def _is_plain_list(source: Any) -> bool:
    return type(source) in (list, tuple) and not torch.compiler.is_compiling()


def _measured(
    parameters: list[Tensor], order: float, function: str, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    if not torch.compiler.is_compiling():
        found = _C.grad_norms(parameters, order, dtype, 0.0)
        if found is not None:
            return found
    return _general.grad_norms(parameters, order, function)


def _decided(
    rule: float | Threshold | AGC, total: Tensor, norms: Tensor
) -> tuple[_Number, _Number]:
    """The limit of a rule and the coefficient that keeps it, of all gradients or of each.

    Numbers where they are known, 0-dim tensors on other devices, 1-D tensors of limits for each.
    """
    if isinstance(rule, AGC) or rule == math.inf:
        return math.inf, 1.0
    # Not `isinstance(rule, Threshold)`: asking that of a protocol takes longer than clipping.
    if isinstance(rule, float):
        if _is_on_host(total):
            return rule, min(1.0, rule / (norm + 1e-6)) if (norm := total.item()) == norm else norm
        return rule, _torch_ops.clip_coefficient(rule, total)
    limits = rule.limits(total, norms)
    measured = norms if rule.per_parameter else total
    if rule.epsilon > 0.0:
        coefficient = torch.clamp(limits / (measured + rule.epsilon), max=1.0)
    else:
        coefficient = torch.where(measured <= limits, 1.0, limits / measured)
    # An infinite limit is none, whatever the norm.
    coefficient = torch.where(limits == math.inf, 1.0, coefficient)
    if rule.per_parameter or not _is_on_host(total):
        return limits, coefficient
    return limits.item(), coefficient.item()


def _is_on_host(number: Tensor) -> bool:
    """Whether it may be read; elsewhere that would mean to wait."""
    return number.is_cpu


def _is_for_each(coefficient: _Number) -> bool:
    return isinstance(coefficient, Tensor) and coefficient.dim() == 1


def _tensor(number: _Number, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(device)
    return torch.tensor(number, dtype=torch.float64, device=device)


def _smallest(number: _Number) -> float:
    return number.min().item() if isinstance(number, Tensor) else number
