"""The callback for Lightning, without Lightning: it comes under two names, with a base each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradclip_ext.clipper import GradClipper
from gradclip_ext.integrations._clipping import Clippers

__all__ = ["LightningClipping"]

_FUNCTION = "GradClipping"
# They keep gradients where only they can measure and clip them.
_OWN_CLIPPING = frozenset({"DeepSpeedStrategy", "FSDPStrategy", "XLAFSDPStrategy"})


class LightningClipping:
    """Clips before each step of each optimizer, and logs what was clipped.

    Each optimizer's gradients are clipped by their own norm, in automatic and in manual
    optimization, only in steps that are taken, and after a ``GradScaler`` has unscaled them. The
    state of the clippers is saved in the Trainer's checkpoints.

    What :meth:`gradclip_ext.ClipReport.as_dict` gives is logged in steps in which the Trainer logs,
    with the names that parameters have in the LightningModule. Other steps do not wait for a GPU.

    A step that ``nonfinite="skip"`` or ``skip_above`` skips has no gradients: they become None.
    With one of these two each step waits for the GPU.

    Args:
        max_norm: as in :class:`gradclip_ext.GradClipper`; each optimizer gets its own copy of a
            rule. A sequence has an entry for each parameter group of each optimizer.
        prefix: what the logged names begin with. With several optimizers their places follow:
            ``gradients/optimizer[0]/total_norm``.
        log: ``"each"``, or ``"summary"`` to leave out the norm of each parameter, or None.
        settings: the other arguments of :class:`gradclip_ext.GradClipper`.

    Raises:
        TypeError: there is no such setting.
        ValueError: ``log`` is something else. When the training begins: the Trainer has a
            ``gradient_clip_val``, which would clip once more; its strategy clips by itself; or the
            checkpoint is that of another training.
        RuntimeError: before a step: gradients are still scaled, since the optimizer is fused and a
            ``GradScaler`` leaves it to its step to unscale them.
    """

    def __init__(
        self,
        max_norm: Any = None,
        *,
        prefix: str = "gradients/",
        log: str | None = "each",
        **settings: Any,
    ) -> None:
        super().__init__()
        self._clippers = Clippers(_FUNCTION, max_norm, settings, prefix, log)

    @property
    def clippers(self) -> list[GradClipper]:
        """The clipper of each optimizer; none before the training has begun."""
        return self._clippers.clippers

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Called before checkpoints are read and optimizers made."""
        if stage == "fit":
            self._clippers.pause()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Makes the clippers."""
        value = trainer.gradient_clip_val
        if value is not None and value > 0 and pl_module.automatic_optimization:
            raise ValueError(
                f"{_FUNCTION}: Trainer(gradient_clip_val={value!r}) would clip the gradients once "
                "more; leave it out"
            )
        own = [kind.__name__ for kind in type(trainer.strategy).__mro__]
        if not _OWN_CLIPPING.isdisjoint(own):
            raise ValueError(
                f"{_FUNCTION}: {own[0]} keeps gradients where only its own clipping sees them; "
                "pass gradient_clip_val to the Trainer instead of this callback"
            )
        self._clippers.start(pl_module, trainer.optimizers)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Clips."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise RuntimeError(
                f"{_FUNCTION}: the gradients are still scaled, because {type(optimizer).__name__} "
                "with fused=True unscales them in its step; use fused=False, or bf16-mixed, which "
                "needs no scaler"
            )
        self._clippers.clip_(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        """Logs."""
        if not (self._clippers.logs and self._clippers.has_news):
            return
        # The only place that knows how Lightning counts steps in manual optimization.
        if trainer._logger_connector.should_update_logs:
            pl_module.log_dict(self._clippers.metrics(), on_step=True, on_epoch=False)

    def state_dict(self) -> dict[str, Any]:
        """The states of the clippers, for a checkpoint."""
        return self._clippers.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a checkpoint, when the training begins."""
        self._clippers.load_state_dict(state_dict)
