"""Transformers: a callback that clips by the rule of a ``GradClipper`` and reports norms."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from gradclip_ext.clipper import GradClipper
from gradclip_ext.integrations._accelerator import own_clipping
from gradclip_ext.integrations._clipping import Clippers
from gradclip_ext.integrations._versions import is_older, warn_if_untested

__all__ = ["GradClipping"]

warn_if_untested(__name__, "transformers", transformers.__version__)

_FUNCTION = "GradClipping"
_STATE = "clippers"


class GradClipping(TrainerCallback, ExportableState):
    """Clips before each step of the Trainer's optimizer, and reports the norm of each parameter.

    ``TrainingArguments(max_grad_norm=0)`` is required, or the Trainer would clip as well; it then
    measures the norm, which it logs as ``grad_norm``, and unscales the gradients. Gradients are
    clipped only in steps that are taken. The state of the clipper is saved in the
    ``trainer_state.json`` of each checkpoint, and restored when the training is resumed.

    A step that ``nonfinite="skip"`` or ``skip_above`` skips has no gradients: they become None.
    With one of these two each step waits for the GPU.

    Args:
        max_norm: as in :class:`gradclip_ext.GradClipper`.
        prefix: what the reported names begin with.
        log: ``"each"``, or ``"summary"`` to leave out the norm of each parameter, or None.
        settings: the other arguments of :class:`gradclip_ext.GradClipper`.

    Raises:
        TypeError: there is no such setting.
        ValueError: ``log`` is something else. When the training begins: ``max_grad_norm`` is not 0;
            gradients are kept where only DeepSpeed or FSDP 1 sees them; the checkpoint is that of
            another training; or the Trainer is so old that it would leave float16 gradients scaled.
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
        self._handler: Any = None

    @property
    def clipper(self) -> GradClipper:
        """The clipper; after the training has begun."""
        (clipper,) = self._clippers.clippers
        return clipper

    def attach(self, trainer: Trainer) -> None:
        """Add this callback to a Trainer, with what it logs going to the Trainer's reporters.

        These are all callbacks with ``on_log`` that do not write to the console. Passed as one of
        the Trainer's ``callbacks``, it clips, and leaves reporting :meth:`metrics` to you.
        """
        self._handler = trainer.callback_handler
        if self not in self._handler.callbacks:
            trainer.add_callback(self)
        _refuse_replacement(trainer.args)

    def metrics(self) -> dict[str, float]:
        """What the clipper reports, by name. Waits for a GPU."""
        return self._clippers.metrics()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks at the arguments."""
        _refuse_replacement(args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the clipper, as it was in the checkpoint."""
        _refuse_replacement(args)
        if args.max_grad_norm is not None and args.max_grad_norm > 0:
            raise ValueError(
                f"{_FUNCTION}: TrainingArguments(max_grad_norm={args.max_grad_norm!r}) would clip "
                "the gradients once more; set max_grad_norm=0"
            )
        kind = own_clipping(AcceleratorState())
        if kind is not None:
            raise ValueError(
                f"{_FUNCTION}: {kind} keeps gradients where only its own clipping sees them; "
                "set max_grad_norm instead of adding this callback"
            )
        if args.fp16 and is_older("transformers", transformers.__version__):
            raise ValueError(
                f"{_FUNCTION}: with max_grad_norm=0 the Trainer of transformers "
                f"{transformers.__version__} does not unscale float16 gradients; use bf16=True or "
                "a later version"
            )
        self._clippers.pause()
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name)
        if saved is None:
            # A checkpoint without this callback. The Trainer adds no entry when it saves.
            state.stateful_callbacks[name] = self.state()
        elif state.global_step > 0:
            self._clippers.load_state_dict(_unpacked(saved["attributes"][_STATE]))
        self._clippers.start(kwargs["model"], [kwargs["optimizer"]])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Clips."""
        self._clippers.clip_(kwargs["optimizer"])

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Reports, beside what the Trainer logs of the training."""
        if self._handler is None or not self._clippers.logs or "loss" not in (logs or {}):
            return
        metrics = self.metrics()
        for callback in list(self._handler.callbacks):
            if callback is not self and not isinstance(
                callback, (PrinterCallback, ProgressCallback)
            ):
                callback.on_log(args, state, control, logs=dict(metrics), **kwargs)

    def state(self) -> dict[str, Any]:
        """The state of the clipper, for ``trainer_state.json``."""
        return {"args": {}, "attributes": {_STATE: _packed(self._clippers.state_dict())}}


def _refuse_replacement(args: Any) -> None:
    if args.restore_callback_states_from_checkpoint:
        raise ValueError(
            f"{_FUNCTION}: with restore_callback_states_from_checkpoint=True the Trainer would "
            "replace this callback by one without its settings; leave it False, the state of the "
            "clipper is restored anyway"
        )


def _packed(state: Mapping[str, Any]) -> str:
    """A state as text: JSON knows neither tensors nor NaN."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _unpacked(text: str) -> Any:
    buffer = io.BytesIO(base64.b64decode(text))
    return torch.load(buffer, map_location="cpu", weights_only=True)
