"""Thresholds that adapt to the gradients of the steps before, from the literature.

A rule looks at the norms of each step, on the device where they are, and says how large the
gradients may be: :class:`AutoClip` and :class:`ZClip` for all gradients together, :class:`AdaGC`
for each parameter. :class:`AGC` needs no history; it compares each unit of a gradient with its
weights.

No step reads a number on the host, so none waits for the device. What was measured so far is in
float64 tensors beside the gradients; they are created at the first step. Moving them, after
:meth:`~Threshold.load_state_dict` or when the model moves to another device, is a copy like any
other, once.
"""

from __future__ import annotations

import fnmatch
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gradclip_ext import _arguments

__all__ = ["AGC", "AdaGC", "AutoClip", "Threshold", "ZClip", "adaptive_clip_grad_"]

# The most elements that torch.quantile and torch.nanquantile sort.
_LARGEST_WINDOW = 2**24

# Elements of a history at its first step; it doubles from there.
_FIRST_CAPACITY = 64


@runtime_checkable
class Threshold(Protocol):
    """What a rule has to offer: limits for this step's norms, and a state that can be saved.

    Attributes:
        per_parameter: whether :meth:`limits` gives one limit for each parameter.
        epsilon: what is added to a norm before a limit is divided by it. A coefficient is
            ``min(1, limit / (norm + epsilon))``, and 1 where the norm is within its limit.
    """

    per_parameter: bool
    epsilon: float

    def limits(self, total: Tensor, norms: Tensor) -> Tensor:
        """Take in the norms of this step and give its limits.

        Args:
            total: the norm of all gradients together before clipping, 0-dim, float64.
            norms: the norm of each parameter's gradient, 1-D, float64, on the device of ``total``;
                0 for a parameter that has no gradient.

        Returns:
            A float64 tensor on the same device: 0-dim, or as long as ``norms`` where
            ``per_parameter`` is set. ``inf`` where nothing is to be clipped.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Copies of what was measured so far: tensors and numbers, and the class as ``"rule"``."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was called."""
        ...


class _Rule:
    """What the rules have in common: a state of tensors, which is created, moved, saved, loaded."""

    per_parameter: bool = False
    # The papers divide by the norm itself.
    epsilon: float = 0.0

    def __init__(self) -> None:
        # Empty before the first step: only then are the device and the parameters known.
        self._state: dict[str, Tensor] = {}

    def limits(self, total: Tensor, norms: Tensor) -> Tensor:
        """Take in the norms of this step and give its limits, as :meth:`Threshold.limits`.

        A ``total`` that is not finite leaves the state as it was and gives a limit computed from
        that. What becomes of such gradients is for the caller to decide.
        """
        # Nothing of the graph that computed the norms may live on in the state.
        total = total.detach().to(torch.float64)
        norms = norms.detach().to(torch.float64)
        state = self._state or self._initial(norms.numel(), total.device)
        state = {name: tensor.to(total.device) for name, tensor in state.items()}
        with torch.no_grad():
            limits, self._state = self._advance(state, total, norms)
        return limits

    def state_dict(self) -> dict[str, Any]:
        """Copies of what was measured so far: tensors and numbers, and the class as ``"rule"``."""
        state = self._state or self._initial(0, torch.device("cpu"))
        copies = {name: tensor.clone() for name, tensor in state.items()}
        return {"rule": self._name, **copies, **self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was called, with the same bits.

        The arguments of the rule are its own; none is taken from ``state``.

        Raises:
            TypeError: ``state`` is not a mapping.
            ValueError: it is the state of another rule, lacks something, or does not fit this
                object. Nothing is changed then.
        """
        tensors = self._read(state)
        self._check(tensors, state)
        self._restore({name: tensor.detach().clone() for name, tensor in tensors.items()})

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _initial(self, parameter_count: int, device: torch.device) -> dict[str, Tensor]:
        """The state before the first step."""
        raise NotImplementedError

    def _advance(
        self, state: dict[str, Tensor], total: Tensor, norms: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This step's limits, and the state after it."""
        raise NotImplementedError

    def _settings(self) -> dict[str, Any]:
        """The arguments without which the state could not be understood."""
        return {}

    def _check(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Refuse a state of the right form that does not fit this object."""

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        self._state = tensors

    def _read(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of a state, in the form that :meth:`_initial` gives them."""
        if not isinstance(state, Mapping):
            raise TypeError(
                f"{self._name}: state has to be a mapping, found {type(state).__name__}"
            )
        if state.get("rule") != self._name:
            raise ValueError(
                f"{self._name}: state['rule'] has to be {self._name!r}, "
                f"found {state.get('rule', 'nothing')!r}"
            )
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
            form = f"a tensor of {model.dim()} dimensions and dtype {model.dtype}"
            if not isinstance(found, Tensor):
                raise ValueError(
                    f"{self._name}: state[{name!r}] has to be {form}, found {type(found).__name__}"
                )
            if found.dim() != model.dim() or found.dtype != model.dtype:
                raise ValueError(
                    f"{self._name}: state[{name!r}] has to be {form}, "
                    f"found {found.dim()} dimensions and dtype {found.dtype}"
                )
        return {name: state[name] for name in pattern}


class AutoClip(_Rule):
    r"""The limit is a percentile of the norms so far, this step's included.

    .. math::
        G_t = (\lVert g_1 \rVert, \dots, \lVert g_t \rVert), \qquad
        \text{limit}_t = \text{percentile}_p(G_t)

    with linear interpolation between neighbours, as :func:`numpy.percentile`. The method is that of
    Seetharaman, Wichern, Pardo and Le Roux, "AutoClip: Adaptive Gradient Clipping for Source
    Separation Networks" (2020), arXiv 2007.14469. The paper keeps every norm; here the last
    ``window`` ones count, because they are sorted at each step.

    Norms that are not finite are not part of the history. Before the first finite one the limit
    is ``inf``.

    Args:
        percentile: which one, from 0 to 100. With 10, the paper's, nine of ten steps are clipped.
        window: how many norms are kept, at most 2**24, which is as many as
            :func:`torch.nanquantile` takes. Memory is 8 bytes for each, and grows with the steps.

    Raises:
        TypeError: an argument is not a number.
        ValueError: ``percentile`` or ``window`` is outside its range.

    >>> rule = AutoClip(percentile=50.0)
    >>> for norm in (1.0, 2.0, 6.0):
    ...     total = torch.tensor(norm, dtype=torch.float64)
    ...     print(rule.limits(total, total.view(1)).item())
    1.0
    1.5
    2.0
    """

    def __init__(self, percentile: float = 10.0, window: int = 10_000) -> None:
        super().__init__()
        self.percentile = _number(
            percentile,
            "AutoClip",
            "percentile",
            "a number from 0 to 100",
            lambda number: 0.0 <= number <= 100.0,
        )
        self.window = _whole_number(window, "AutoClip", "window", 1, _LARGEST_WINDOW)
        # At least as many as there are norms in the history: how many of them were finite is
        # known on the device only.
        self._steps = 0

    def _settings(self) -> dict[str, Any]:
        # The order of the ring, and where it goes on, depend on its length.
        return {"window": self.window}

    def _initial(self, parameter_count: int, device: torch.device) -> dict[str, Tensor]:
        return {
            "count": torch.zeros((), dtype=torch.float64, device=device),
            "history": _unknown(min(self.window, _FIRST_CAPACITY), device),
        }

    def _advance(
        self, state: dict[str, Tensor], total: Tensor, norms: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        count, history = state["count"], self._grown(state["history"])
        finite = total.isfinite()
        # The place is computed on the device and moves on after finite norms only. Otherwise each
        # non-finite one would push a good one out of a full ring, and many of them all.
        place = count.remainder(self.window).to(torch.int64).view(1)
        kept = torch.where(finite, total, history.index_select(0, place))
        history.index_copy_(0, place, kept)
        self._steps += 1
        # Places that are not taken yet hold NaN, which nanquantile passes over.
        limit = torch.nanquantile(history, self.percentile / 100.0)
        limit = limit.masked_fill(limit.isnan(), math.inf)
        return limit, {"count": count + finite, "history": history}

    def _grown(self, history: Tensor) -> Tensor:
        """The history, with a place for the norm of this step."""
        capacity = history.numel()
        needed = min(self._steps + 1, self.window)
        while capacity < needed:
            capacity = min(2 * capacity, self.window)
        if capacity == history.numel():
            return history
        return torch.cat([history, _unknown(capacity - history.numel(), history.device)])

    def _check(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        if state["window"] != self.window:
            raise ValueError(
                f"AutoClip: state['window'] has to be {self.window}, as this object's, "
                f"found {state['window']!r}"
            )
        capacity = tensors["history"].numel()
        count = float(tensors["count"])
        if not 1 <= capacity <= self.window:
            raise ValueError(
                f"AutoClip: state['history'] has to hold 1 to {self.window} norms, found {capacity}"
            )
        if not (count >= 0.0 and min(count, self.window) <= capacity):
            raise ValueError(
                f"AutoClip: state['history'] has to have a place for each of state['count'] norms, "
                f"found {capacity} places for {count}"
            )

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        super()._restore(tensors)
        self._steps = int(tensors["count"])


class ZClip(_Rule):
    r"""The limit applies where the norm is many standard deviations above its moving average.

    With the mean :math:`\mu` and the variance :math:`\sigma^2` of the steps before, a norm
    :math:`g` has the score

    .. math:: z = \frac{g - \mu}{\sigma + 10^{-6}}, \qquad
        g^* = \begin{cases}
            \mu + \dfrac{\text{z\_threshold}^2}{z} \, \sigma & z > \text{z\_threshold} \\
            g & \text{otherwise}
        \end{cases}

    In the first case :math:`g^*` is the limit, in the second there is none. Then

    .. math:: \mu \leftarrow \alpha \mu + (1 - \alpha) g^*, \qquad
        \sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha) (g^* - \mu)^2

    with the new :math:`\mu`. During warm-up nothing is clipped but by ``max_norm``; at its end
    :math:`\mu` and :math:`\sigma^2` are the mean and the population variance of its norms. The
    method is that of Kumar, Owen, Roy Chowdhury and Güra, "ZClip: Adaptive Spike Mitigation for
    LLM Pre-Training" (2025), arXiv 2504.02507.

    A norm that is not finite is no step of the warm-up. After it, its limit is :math:`\mu`, towards
    which that of a finite one goes as it grows.

    Args:
        alpha: weight of what was measured before, from 0 to 1.
        z_threshold: score above which a norm is a spike, greater than 0.
        warmup_steps: finite norms to collect first, at least 1.
        max_norm: a limit that holds besides in every step, greater than 0; None for none. The
            averages take in the norm as it is before this one.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        alpha: float = 0.97,
        z_threshold: float = 2.5,
        warmup_steps: int = 25,
        max_norm: float | None = None,
    ) -> None:
        super().__init__()
        self.alpha = _fraction(alpha, "ZClip", "alpha")
        self.z_threshold = _positive(z_threshold, "ZClip", "z_threshold")
        self.warmup_steps = _whole_number(warmup_steps, "ZClip", "warmup_steps", 1)
        self.max_norm = None if max_norm is None else _positive(max_norm, "ZClip", "max_norm")

    def _initial(self, parameter_count: int, device: torch.device) -> dict[str, Tensor]:
        return {
            name: torch.zeros((), dtype=torch.float64, device=device)
            for name in ("count", "mean", "variance")
        }

    def _advance(
        self, state: dict[str, Tensor], total: Tensor, norms: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        count, mean, variance = state["count"], state["mean"], state["variance"]
        finite = total.isfinite()
        # Whether the warm-up is over is known on the device only, so both ways are computed.
        warming = count < self.warmup_steps

        # Mean and population variance of the norms up to now, from those of the ones before
        # (Welford 1962): the norms themselves need not be kept.
        distance = total - mean
        early_mean = mean + distance / (count + 1.0)
        early_variance = variance + (distance * (total - early_mean) - variance) / (count + 1.0)

        deviation = variance.sqrt()
        score = (distance / (deviation + 1e-6)).masked_fill(finite.logical_not(), math.inf)
        spike = score > self.z_threshold
        reached = mean + self.z_threshold * self.z_threshold / score * deviation
        clipped = torch.where(spike, reached, total)
        late_mean = self.alpha * mean + (1.0 - self.alpha) * clipped
        late_variance = self.alpha * variance + (1.0 - self.alpha) * (clipped - late_mean).square()

        limit = reached.masked_fill(warming | spike.logical_not(), math.inf)
        if self.max_norm is not None:
            limit = limit.clamp(max=self.max_norm)
        return limit, {
            "count": count + finite,
            "mean": torch.where(finite, torch.where(warming, early_mean, late_mean), mean),
            "variance": torch.where(
                finite, torch.where(warming, early_variance, late_variance), variance
            ),
        }


class AdaGC(_Rule):
    r"""Each parameter's limit follows a moving average of its own clipped norms.

    During warm-up all gradients are clipped together, and the smallest norm of each parameter
    after that is kept:

    .. math:: h = \min\left(\frac{\text{absolute\_limit}}{\lVert g \rVert}, 1\right), \qquad
        \gamma_i \leftarrow \min(\gamma_i, h \lVert g_i \rVert)

    Afterwards parameter :math:`i` is clipped on its own:

    .. math:: \text{limit}_i = \text{relative\_limit} \cdot \gamma_i, \qquad
        \gamma_i \leftarrow \beta \gamma_i
            + (1 - \beta) \min(\lVert g_i \rVert, \text{limit}_i)

    The method is that of Wang et al., "AdaGC: Improving Training Stability for Large Language
    Model Pretraining" (2025), arXiv 2502.11034.

    A norm of 0, as without a gradient, leaves :math:`\gamma_i` as it was. A parameter that has its
    first gradient after the warm-up is not clipped in that step, and its norm becomes
    :math:`\gamma_i`. A step whose total is not finite changes nothing and is none of the
    warm-up's; its limits are those of the second formula.

    Args:
        relative_limit: how far a norm may be above its average, as a factor greater than 0.
        beta: weight of what was measured before, from 0 to 1.
        warmup_steps: steps with a finite total that are clipped together, not negative.
        absolute_limit: the limit of the total norm in these, greater than 0.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is outside its range; in :meth:`limits`, the number of parameters
            is another one than in the steps before.
    """

    per_parameter: bool = True

    def __init__(
        self,
        relative_limit: float = 1.05,
        beta: float = 0.98,
        warmup_steps: int = 100,
        absolute_limit: float = 1.0,
    ) -> None:
        super().__init__()
        self.relative_limit = _positive(relative_limit, "AdaGC", "relative_limit")
        self.beta = _fraction(beta, "AdaGC", "beta")
        self.warmup_steps = _whole_number(warmup_steps, "AdaGC", "warmup_steps", 0)
        self.absolute_limit = _positive(absolute_limit, "AdaGC", "absolute_limit")

    def _initial(self, parameter_count: int, device: torch.device) -> dict[str, Tensor]:
        return {
            "count": torch.zeros((), dtype=torch.float64, device=device),
            "gamma": torch.full((parameter_count,), math.inf, dtype=torch.float64, device=device),
        }

    def _advance(
        self, state: dict[str, Tensor], total: Tensor, norms: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        count, gamma = state["count"], state["gamma"]
        if norms.shape != gamma.shape:
            raise ValueError(
                f"AdaGC: norms has to hold one for each of the {gamma.numel()} parameters of the "
                f"steps before, found shape {tuple(norms.shape)}"
            )
        finite = total.isfinite()
        warming = count < self.warmup_steps
        # A total of 0 makes the quotient infinite, and the coefficient 1.
        together = norms * (self.absolute_limit / total).clamp(max=1.0)
        limits = torch.where(warming & finite, together, self.relative_limit * gamma)

        clipped = torch.minimum(norms, limits)
        average = self.beta * gamma + (1.0 - self.beta) * clipped
        late = torch.where(gamma.isinf(), clipped, average)
        updated = torch.where(warming, torch.minimum(gamma, clipped), late)
        counts = finite & norms.isfinite() & (norms > 0.0)
        return limits, {"count": count + finite, "gamma": torch.where(counts, updated, gamma)}

    def _check(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        found = tensors["gamma"].numel()
        if self._state and found and found != self._state["gamma"].numel():
            raise ValueError(
                f"AdaGC: state['gamma'] has to hold one norm for each of "
                f"{self._state['gamma'].numel()} parameters, found {found}"
            )

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        # Saved before its first step, a rule does not know yet how many parameters there are.
        super()._restore(tensors if tensors["gamma"].numel() else {})


def adaptive_clip_grad_(
    parameters: Tensor | Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3
) -> None:
    r"""Clip each unit of the gradients by the norm of its weights.

    A unit is what leads to one output: a row of a linear layer's weight, a filter of a
    convolution's, in general all elements with the same first index. A tensor of one dimension or
    none is a single unit. Where the gradient :math:`G_i` of a unit with the weights :math:`W_i` is
    larger than

    .. math:: \text{limit}_i = \text{clip\_factor} \cdot \max(\lVert W_i \rVert, \text{eps})

    it is scaled in place by :math:`\text{limit}_i / \max(\lVert G_i \rVert, 10^{-6})`. The norms
    are computed in float32, in float64 for such gradients, and a 16-bit gradient is rounded once. A
    unit whose gradient is not finite is left as it is. The method is that of Brock, De, Smith and
    Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization" (2021), arXiv
    2102.06171.

    Args:
        parameters: the tensors whose ``.grad`` is clipped, or a single one. Those without a
            gradient are passed over. Leave out the last linear layer, as the paper does;
            :class:`AGC` does that by name.
        clip_factor: how large a gradient may be, relative to its weights; greater than 0.
        eps: the norm that weights count with at least, so that those that start at zero can
            grow; greater than 0.

    Raises:
        NotImplementedError: a gradient is sparse.
        RuntimeError: a gradient cannot be written to, because its elements share memory.
        TypeError: an argument or an element of ``parameters`` has the wrong type.
        ValueError: ``clip_factor`` or ``eps`` is not greater than 0.

    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    >>> weight.grad = torch.tensor([[0.0, 2.0], [0.0, 0.001]])
    >>> adaptive_clip_grad_(weight, clip_factor=0.1)
    >>> weight.grad
    tensor([[0.0000, 0.5000],
            [0.0000, 0.0010]])
    """
    function = "adaptive_clip_grad_"
    items = _arguments.tensor_list(parameters, function, "parameters")
    factor = _positive(clip_factor, function, "clip_factor")
    smallest = _positive(eps, function, "eps")
    for index, item in enumerate(items):
        if not isinstance(item, Tensor):
            raise _arguments.item_error(item, function, "parameters", index)
    named = [(f"parameters[{index}]", item) for index, item in enumerate(items)]
    _clip_units(named, function, factor, smallest)


class AGC:
    """Adaptive gradient clipping with the parameters that are left out chosen by their names.

    As :func:`adaptive_clip_grad_`, which also names the source. It has no history, and so no state
    to save.

    Args:
        clip_factor: as in :func:`adaptive_clip_grad_`.
        eps: as in :func:`adaptive_clip_grad_`.
        exclude: patterns of names, as of a shell (``*``, ``?``, ``[...]``; case counts), whose
            gradients are left as they are: ``("head.*",)`` for the classifier.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``clip_factor`` or ``eps`` is not greater than 0.
    """

    def __init__(
        self, clip_factor: float = 0.01, eps: float = 1e-3, exclude: Iterable[str] = ()
    ) -> None:
        self.clip_factor = _positive(clip_factor, "AGC", "clip_factor")
        self.eps = _positive(eps, "AGC", "eps")
        # A single pattern would be taken for one pattern per letter.
        if isinstance(exclude, str) or not isinstance(exclude, Iterable):
            raise TypeError(f"AGC: exclude has to be an iterable of patterns, found {exclude!r}")
        self.exclude = tuple(exclude)
        for index, pattern in enumerate(self.exclude):
            if not isinstance(pattern, str):
                raise TypeError(f"AGC: exclude[{index}] has to be a str, found {pattern!r}")

    def clip_(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Clip the gradients in place, those of excluded names aside.

        Args:
            named_parameters: pairs of a name and a tensor, as ``module.named_parameters()`` gives
                them.

        Raises:
            NotImplementedError: a gradient is sparse.
            RuntimeError: a gradient cannot be written to, because its elements share memory.
            TypeError: ``named_parameters`` is not made of pairs.
        """
        if isinstance(named_parameters, (torch.nn.Module, Tensor, Mapping)) or not isinstance(
            named_parameters, Iterable
        ):
            raise TypeError(
                "AGC: named_parameters has to be an iterable of pairs of a name and a tensor, "
                f"found {type(named_parameters).__name__}; pass module.named_parameters()"
            )
        named = list(named_parameters)
        for index, pair in enumerate(named):
            # As torch gives them, so that a tensor of two elements is no pair.
            if not (
                isinstance(pair, tuple)
                and len(pair) == 2
                and isinstance(pair[0], str)
                and isinstance(pair[1], Tensor)
            ):
                raise TypeError(
                    f"AGC: named_parameters[{index}] has to be a pair of a name and a tensor, "
                    f"found {type(pair).__name__}; pass module.named_parameters()"
                )
        chosen = [(name, tensor) for name, tensor in named if not self._excludes(name)]
        _clip_units(chosen, "AGC", self.clip_factor, self.eps)

    def _excludes(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude)


def _clip_units(
    named: Sequence[tuple[str, Tensor]], function: str, clip_factor: float, eps: float
) -> None:
    with torch.no_grad():
        pairs = [
            (parameter, parameter.grad, name)
            for name, parameter in named
            if parameter.grad is not None
        ]
        # All before the first is written, so that an error changes nothing.
        for _, gradient, name in pairs:
            _check_writable(gradient, name, function)
        for parameter, gradient, _ in pairs:
            _clip_units_of(parameter, gradient, clip_factor, eps)


def _check_writable(gradient: Tensor, name: str, function: str) -> None:
    if gradient.layout != torch.strided:
        raise NotImplementedError(
            f"{function}: the gradient of {name} has to be dense, found layout {gradient.layout}"
        )
    sizes = zip(gradient.shape, gradient.stride(), strict=True)
    if any(size > 1 and stride == 0 for size, stride in sizes):
        raise RuntimeError(
            f"{function}: the gradient of {name} has to have memory for each element, found shape "
            f"{tuple(gradient.shape)} with strides {gradient.stride()}; clone() it first"
        )


def _clip_units_of(parameter: Tensor, gradient: Tensor, clip_factor: float, eps: float) -> None:
    limits = _unit_norms(parameter).clamp(min=eps) * clip_factor
    norms = _unit_norms(gradient)
    exceeds = (norms > limits) & norms.isfinite()
    coefficients = (limits / norms.clamp(min=1e-6)).masked_fill(exceeds.logical_not(), 1.0)
    wide = gradient.dtype in (torch.float64, torch.complex128)
    # At least one dimension, and float32 for 16 bits: torch would round a 0-dim coefficient to the
    # gradient's dtype before it multiplies.
    whole = gradient if gradient.dim() else gradient.unsqueeze(0)
    whole.mul_(coefficients.to(torch.float64 if wide else torch.float32))


def _unit_norms(tensor: Tensor) -> Tensor:
    """The norm of each unit in float64, in a shape that broadcasts with the tensor's."""
    if tensor.dim() == 0:
        tensor = tensor.unsqueeze(0)
    dimensions = tuple(range(1, tensor.dim())) if tensor.dim() > 1 else (0,)
    # In 16 bits a sum of many squares would lose most of them.
    wide = torch.promote_types(tensor.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(tensor, 2, dimensions, keepdim=True, dtype=wide)
    return norms.to(torch.float64)


def _unknown(size: int, device: torch.device) -> Tensor:
    return torch.full((size,), math.nan, dtype=torch.float64, device=device)


def _number(
    value: Any, owner: str, argument: str, expected: str, accepts: Callable[[float], bool]
) -> float:
    # Not what float() takes: that would wait for a tensor, and read strings.
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{owner}: {argument} has to be {expected}, found {value!r}")
    if not accepts(float(value)):
        raise ValueError(f"{owner}: {argument} has to be {expected}, found {value}")
    return float(value)


def _positive(value: Any, owner: str, argument: str) -> float:
    # NaN is greater than nothing.
    return _number(value, owner, argument, "a number greater than 0", lambda number: number > 0.0)


def _fraction(value: Any, owner: str, argument: str) -> float:
    return _number(
        value, owner, argument, "a number from 0 to 1", lambda number: 0.0 <= number <= 1.0
    )


def _whole_number(
    value: Any, owner: str, argument: str, smallest: int, largest: int | None = None
) -> int:
    expected = (
        f"a whole number that is at least {smallest}"
        if largest is None
        else f"a whole number from {smallest} to {largest}"
    )
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{owner}: {argument} has to be {expected}, found {value!r}")
    number = operator.index(value)
    if number < smallest or (largest is not None and number > largest):
        raise ValueError(f"{owner}: {argument} has to be {expected}, found {number}")
    return number
