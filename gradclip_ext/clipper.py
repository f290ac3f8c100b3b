"""A clipper that knows its parameters, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from gradclip_ext import _arguments, _counters, _names, _ops
from gradclip_ext._clipper_step import ClipperStep
from gradclip_ext._ops import Scalar
from gradclip_ext._parameters import Collection
from gradclip_ext._report import ClipReport, report_of
from gradclip_ext._rules import Group, name_of, places_of, read_rules, require_length
from gradclip_ext._settings import read_settings
from gradclip_ext._step import Step, raise_together
from gradclip_ext.thresholds import AGC, StatelessRule, Threshold, TimesLimit, takes_numbers

__all__ = ["ClipReport", "GradClipper"]

_FUNCTION = "GradClipper"


class GradClipper:
    """Clips the gradients of one model at every step, and keeps statistics.

    It collects the parameters once, and again when those of the model or the optimizer change.
    There is no device sync, except for the policy ``"raise"`` and for what reads numbers:
    :meth:`report`, :meth:`state_dict` and :meth:`load_state_dict`.

    Args:
        source: a module, its ``named_parameters()``, parameters, an optimizer, a list of several
            optimizers, or parameter groups. Pass the optimizer rather than its ``param_groups``,
            which ``optimizer.load_state_dict`` replaces. A parameter that comes twice counts once.
        max_norm: largest norm, positive; or a rule that gives a limit, such as
            :class:`gradclip_ext.AutoClip`; or a sequence with one of these for each parameter
            group, which is then clipped by its own norm. With ``inf`` the norms are only measured.
            A group that is left out has an entry too, which is not used.
        clip_value: largest magnitude of an element; clamped after the norm is clipped.
        norm_type: type of the p-norm.
        nonfinite: what to do with a norm that is NaN or infinite. ``"propagate"``: what torch does.
            ``"raise"``: a RuntimeError that names the first non-finite gradient, with nothing
            changed. ``"zero"``: all gradients become 0. ``"skip"``: they are not scaled, and
            ``found_inf`` becomes 1.
        weight_decay: coupled L2 regularization, added to the gradients before they are measured,
            in the same pass; see :func:`gradclip_ext.add_weight_decay_`. Leave that of the
            optimizer at 0.
        include: a function of a name and a parameter, called whenever parameters are collected.
            Those for which it returns False are neither measured nor changed. The parameters of
            groups with ``"clip_grad": False`` are left out as well.
        skip_above: skip a step whose norm is above this number, or above a multiple of its limit,
            :class:`gradclip_ext.TimesLimit`: its gradients stay as they are, no rule takes it in,
            and ``found_inf`` becomes 1. So does one whose norm is not finite, unless ``nonfinite``
            is ``"zero"`` or ``"raise"``.
        max_skips_in_a_row: how many steps may be skipped one right after another before
            :meth:`report` and :meth:`state_dict` raise. Can be changed later.
        process_groups: as in :func:`gradclip_ext.clip_grad_norm_`; the limit is for the norm over
            all ranks. There may be no parameters on this one then.

    Attributes:
        found_inf: 0-dim float32 tensor, 1 if the last norm was not finite or the step is to be
            skipped, else 0. Handed to one of torch's fused optimizers, ``optimizer.found_inf =
            clipper.found_inf``, it makes the optimizer skip the update in such a step.
            ``GradScaler.step`` replaces it by the scaler's own flag; see docs/clipper.md.
        max_skips_in_a_row: the argument of that name.

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
        skip_above: float | TimesLimit | None = None,
        max_skips_in_a_row: int | None = None,
        include: Callable[[str, Tensor], bool] | None = None,
        process_groups: Any = None,
    ) -> None:
        include = _arguments.predicate(include, _FUNCTION, "include")
        groups_of_ranks = _ops.read_process_groups(process_groups, _FUNCTION)
        self._collection = Collection(
            source,
            _FUNCTION,
            include=include,
            obeys_groups=True,
            may_be_empty=process_groups is not None,
        )
        if max_norm is None and clip_value is None:
            raise ValueError(
                f"{_FUNCTION}: there is nothing to do; pass max_norm (inf measures only), "
                "clip_value or both"
            )
        groups = len(self._collection.groups)
        self._rules = read_rules(math.inf if max_norm is None else max_norm, groups)
        self._has_own_rules = not all(map(takes_numbers, self._rules))
        self._settings = read_settings(
            self._rules,
            norm_type=norm_type,
            nonfinite=nonfinite,
            clip_value=clip_value,
            weight_decay=weight_decay,
            skip_above=skip_above,
            process_groups=groups_of_ranks,
        )
        self.max_skips_in_a_row = max_skips_in_a_row
        if max_skips_in_a_row is not None:
            self.max_skips_in_a_row = _arguments.whole_number(
                max_skips_in_a_row, _FUNCTION, "max_skips_in_a_row", 0
            )
        # On a GPU these become tensors there, read only on demand.
        self._counters = _counters.Counters()
        self._last: Step | None = None
        self._groups = self._known = self._read_groups()
        self._grouped = self._collection.groups
        devices = [parameter.device for parameter in self._collection.parameters[:1]]
        self.found_inf = _flag(devices[0] if devices else torch.device("cpu"))

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters, as collected last."""
        return list(self._collection.parameters)

    @_ops.outside_graphs
    def clip_(self) -> Tensor:
        """Clip the gradients in place.

        Returns:
            The norm of all gradients before clipping, a 0-dim float64 tensor on their device.

        Raises:
            RuntimeError: the norm is not finite and the policy is ``"raise"``; or a gradient cannot
                be written to. Nothing is changed then: no gradient, no rule, no counter.
            TypeError: a rule of your own returns something other than a tensor.
            ValueError: a rule of your own has limits for each parameter, no ``rearrange``, and the
                parameters have changed; or it returns a limit that is negative, NaN or of another
                shape.
        """
        self._follow()
        step = self._decided(1.0)
        step.write()
        self._count(step)
        return step.returned

    @_ops.outside_graphs
    def step(
        self, optimizer: Optimizer | Sequence[Optimizer], scaler: GradScaler | None = None
    ) -> Tensor:
        """Clip the gradients and step, which a fused optimizer does in a single pass.

        The same as :meth:`clip_` and then ``optimizer.step()``; with a scaler as its ``unscale_``,
        :meth:`clip_` and its ``step``. The optimizer is not called in a step that ``nonfinite`` or
        ``skip_above`` skips. Where one coefficient for all gradients is not all that the clipper
        does, or not all gradients are clipped, they are written before the step. See
        :func:`gradclip_ext.clip_and_step`.

        Returns:
            As :meth:`clip_`, without the scale.

        Raises:
            As :meth:`clip_` and :func:`gradclip_ext.clip_and_step`. Nothing is changed then, but
                the scaler may have unscaled the gradients, and takes note of it.
        """
        self._follow()
        try:
            together = ClipperStep(optimizer, scaler, self._settings, self._groups)
        except Exception as error:
            raise_together(error, self._settings, self._groups)
            raise
        with together.unscaled() as inverse:
            step = self._decided(inverse)
            together.write(step)
        self._count(step)
        together.take()
        return step.returned

    @_ops.outside_graphs
    def report(self) -> ClipReport:
        """The statistics so far. Syncs with the GPU, so call it only as often as you log.

        Raises:
            RuntimeError: nothing has been clipped yet; or more steps in a row were skipped than
                ``max_skips_in_a_row``; or another rank has failed, of which a GPU has told.
        """
        if self._last is None:
            raise RuntimeError("GradClipper: there is nothing to report before the first clip_()")
        _ops.raise_unread(_FUNCTION)
        return report_of(self._last, self._read_counters())

    @_ops.outside_graphs
    def state_dict(self) -> dict[str, Any]:
        """Counters and the state of the rules, to save with those of model and optimizer.

        ``"last_norm_is_finite"`` is 0 in a checkpoint taken right after a NaN or infinite norm.

        Raises:
            RuntimeError: more steps in a row were skipped than ``max_skips_in_a_row``.
        """
        return {
            "names": [name for group in self._groups for name in group.names],
            **self._read_counters(),
            "rules": self._states_of_rules(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the state of a clipper with the same parameters and rules.

        Raises:
            TypeError: the state is not a mapping, or a counter in it is not a whole number.
            ValueError: the state is that of another model or of other rules, or cannot be that of
                a clipper. Nothing is changed then.
        """
        self._follow()
        required, optional = _counters.keys()
        required |= {"names", "rules"}
        _arguments.state_keys(state, required, optional, _FUNCTION)
        for key in ("names", "rules"):
            if not isinstance(state[key], (list, tuple)):
                raise TypeError(
                    f"{_FUNCTION}: state[{key!r}] has to be a list, found "
                    f"{_arguments.describe(state[key])}"
                )
        names, own = tuple(state["names"]), self._collection.names
        if not _names.agree(own, names):
            raise ValueError(
                f"{_FUNCTION}: the state is that of another model: expected "
                f"{_arguments.count_and_first_difference(own, _names.without_wrappers(names))}"
            )
        numbers = _counters.read(state, _FUNCTION)
        states = state["rules"]
        if len(states) != len(self._rules):
            raise ValueError(
                f"{_FUNCTION}: the state has rules for {len(states)} groups, expected "
                f"{len(self._rules)}"
            )
        for rule, own_state in zip(self._rules, states, strict=True):
            if isinstance(rule, StatelessRule) != (own_state is None):
                known = own_state.get("rule") if isinstance(own_state, Mapping) else own_state
                raise ValueError(
                    f"{_FUNCTION}: the state is that of other rules: expected {name_of(rule)}, "
                    f"found {known}"
                )
        before = self._states_of_rules()
        try:
            self._restore_rules(states)
            for group in self._groups:
                require_length(group)
        except Exception:
            self._restore_rules(before)
            raise
        self._counters.load_state_dict(numbers)

    def _decided(self, inverse: Scalar) -> Step:
        """A step that is measured and decided; rules get their states back if one raises."""
        step = Step(self._settings, self._groups, inverse)
        if not self._has_own_rules:
            step.decide()
            return step
        before = self._states_of_rules()
        try:
            with torch.no_grad():
                step.decide()
        except Exception:
            self._restore_rules(before)
            raise
        return step

    def _count(self, step: Step) -> None:
        self._counters.count(step.clips(), step.is_finite, step.skips)
        self._tell(step.returned, step.skips | (step.is_finite ^ True))
        self._last = step

    def _tell(self, norm: Tensor, flag: bool | Tensor) -> None:
        """Set ``found_inf``, on the device of the norm; in most steps it is right already."""
        told = _ops.known(self.found_inf)
        if isinstance(flag, bool) and isinstance(told, float) and told == flag:
            return
        if self.found_inf.device != norm.device:
            # The model was moved, or exists only now.
            self.found_inf = _flag(norm.device)
        self.found_inf.fill_(flag)

    def _read_counters(self) -> dict[str, int]:
        numbers = self._counters.state_dict()
        skips, most = numbers["skips_in_a_row"], self.max_skips_in_a_row
        if most is not None and skips > most:
            first, last = numbers["steps"] - skips + 1, numbers["steps"]
            raise RuntimeError(
                f"{_FUNCTION}: steps {first} to {last} were skipped, {skips} in a row, expected at "
                f"most {most}; look at the data or lower the learning rate, or set "
                "clipper.max_skips_in_a_row to continue"
            )
        return numbers

    def _states_of_rules(self) -> list[dict[str, Any] | None]:
        return [
            None if isinstance(rule, StatelessRule) else rule.state_dict() for rule in self._rules
        ]

    def _restore_rules(self, states: Sequence[Mapping[str, Any] | None]) -> None:
        for rule, state in zip(self._rules, states, strict=True):
            if state is not None:
                rule.load_state_dict(state)

    def _read_groups(self) -> list[Group]:
        names, parameters = self._collection.names, self._collection.parameters
        return [
            Group(rule, names[own.start : own.stop], parameters[own.start : own.stop])
            for rule, own in zip(self._rules, self._ranges(), strict=True)
        ]

    def _follow(self) -> None:
        """Follow the source to other parameters: what a rule knows of one stays with its name."""
        try:
            self._collection.refresh()
            self._read_anew()
        except Exception as error:
            # The other ranks of DTensors or process groups would wait for this one.
            raise_together(error, self._settings, self._groups)
            raise

    def _read_anew(self) -> None:
        if self._grouped is self._collection.groups:
            return
        groups = self._read_groups()
        changes = []
        for place, group in enumerate(groups):
            if not group.names or not group.rule.per_parameter:
                continue
            # Those that it had when it last had any, for a group that was left out in between.
            known = self._known[place]
            places = places_of(known, group)
            if places == list(range(len(known.names))):
                continue
            if not hasattr(group.rule, "rearrange"):
                raise ValueError(
                    f"{_FUNCTION}: the rule {name_of(group.rule)} has limits for each parameter "
                    "and cannot follow others; give it a method rearrange, as Threshold describes, "
                    "or pass a new clipper"
                )
            changes.append((group.rule, places))
        for rule, places in changes:
            rule.rearrange(places)
        self._known = [
            group if group.names else known
            for known, group in zip(self._known, groups, strict=True)
        ]
        self._groups = groups
        self._grouped = self._collection.groups

    def _ranges(self) -> list[range]:
        """The parameters of each rule: all for a single rule, else those of its group."""
        if len(self._rules) == 1:
            return [range(len(self._collection.parameters))]
        if len(self._rules) != len(self._collection.groups):
            raise ValueError(
                f"GradClipper: there are {len(self._collection.groups)} parameter groups now, "
                f"expected {len(self._rules)}, as many as entries of max_norm"
            )
        return self._collection.groups


def _flag(device: torch.device) -> Tensor:
    # Float32 and not an inference tensor, whatever is active: torch's optimizers ask for that.
    with torch.inference_mode(False):
        return torch.zeros((), dtype=torch.float32, device=device)
