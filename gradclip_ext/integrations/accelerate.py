"""Accelerate: ``accelerator.clip_grad_norm_`` clips by the rule of a ``GradClipper``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from torch import Tensor

from gradclip_ext.clipper import GradClipper
from gradclip_ext.integrations._accelerator import own_clipping
from gradclip_ext.integrations._clipping import Clippers
from gradclip_ext.integrations._versions import warn_if_untested

__all__ = ["GradClipping"]

warn_if_untested(__name__, "accelerate", accelerate.__version__)

_FUNCTION = "GradClipping"
_NAME = "clip_grad_norm_"


class GradClipping:
    """Clips where ``accelerator.clip_grad_norm_`` is called, by the rule of a ``GradClipper``.

    The largest norm in the call is not used. Gradients are unscaled first, as in Accelerate's own
    function. A call for parameters of which none is this optimizer's is left to that function, so
    that several models can each have their clipping.

    A step that ``nonfinite="skip"`` or ``skip_above`` skips has no gradients: they become None.
    With one of these two each step waits for the GPU.

    Args:
        max_norm: as in :class:`gradclip_ext.GradClipper`.
        prefix: what the names in :meth:`metrics` begin with.
        log: ``"each"``, or ``"summary"`` to leave out the norm of each parameter.
        settings: the other arguments of :class:`gradclip_ext.GradClipper`.

    Raises:
        TypeError: there is no such setting.
        ValueError: ``log`` is something else.
    """

    def __init__(
        self,
        max_norm: Any = None,
        *,
        prefix: str = "gradients/",
        log: str | None = "each",
        **settings: Any,
    ) -> None:
        self._clippers = Clippers(_FUNCTION, max_norm, settings, prefix, log)

    @property
    def clipper(self) -> GradClipper:
        """The clipper; after :meth:`attach`."""
        (clipper,) = self._clippers.clippers
        return clipper

    def attach(self, accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> None:
        """Clip the gradients of an optimizer from now on.

        The clipper's state is saved by ``accelerator.save_state`` and loaded by ``load_state``.

        Args:
            accelerator: the accelerator, whose method is replaced on this object only.
            model: what names the parameters, as ``prepare`` returned it or before.
            optimizer: what ``prepare`` returned.

        Raises:
            ValueError: the gradients are kept where only the accelerator's own clipping sees them:
                by DeepSpeed, Megatron-LM, XLA or FSDP 1; or this object is attached already.
        """
        kind = own_clipping(accelerator)
        if kind is not None:
            raise ValueError(
                f"{_FUNCTION}: {kind} keeps gradients where only its own clipping sees them; set "
                "the largest norm there"
            )
        if self._clippers.clippers:
            raise ValueError(f"{_FUNCTION}: attached already; make another for each optimizer")
        self._clippers.start(model, [optimizer])
        original = getattr(accelerator, _NAME)

        def clip_grad_norm_(
            parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2
        ) -> Tensor | None:
            listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            if not self._is_for(listed):
                result: Tensor | None = original(listed, max_norm, norm_type)
                return result
            if not accelerator.sync_gradients:
                raise RuntimeError(
                    f"Accelerator.{_NAME}: called while gradients are accumulated, expected only "
                    "where accelerator.sync_gradients is True"
                )
            accelerator.unscale_gradients(optimizer)
            return self._clippers.clip_(optimizer)

        setattr(accelerator, _NAME, clip_grad_norm_)
        accelerator.register_for_checkpointing(self)

    def metrics(self) -> dict[str, float]:
        """What the clipper reports, by name, for ``accelerator.log``. Waits for a GPU."""
        return self._clippers.metrics()

    def state_dict(self) -> dict[str, Any]:
        """The state of the clipper, for a checkpoint."""
        return self._clippers.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint."""
        self._clippers.load_state_dict(state)

    def _is_for(self, parameters: list[Tensor]) -> bool:
        """Whether a call is for the gradients that are clipped here.

        Raises:
            ValueError: it is for some of them only.
        """
        given = {id(parameter) for parameter in parameters}
        own = [parameter for parameter in self.clipper.parameters if parameter.grad is not None]
        common = sum(id(parameter) in given for parameter in own)
        if common not in (0, len(own)):
            raise ValueError(
                f"Accelerator.{_NAME}: called for {common} of {len(own)} parameters that "
                f"{_FUNCTION} clips by their common norm, expected all or none"
            )
        return common > 0
