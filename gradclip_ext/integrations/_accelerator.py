"""What Accelerate keeps gradients in, for its own users and for those of Transformers."""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType

__all__ = ["own_clipping"]

_OWN_CLIPPING = ("DEEPSPEED", "MEGATRON_LM", "XLA")


def own_clipping(state: Any) -> str | None:
    """What keeps gradients where only Accelerate's own clipping sees them; None if nothing does.

    Args:
        state: an ``AcceleratorState``, or an ``Accelerator``.
    """
    name: str = DistributedType(state.distributed_type).name
    # Accelerate 1.0 knows FSDP 1 only.
    is_fsdp1 = name == "FSDP" and not getattr(state, "is_fsdp2", False)
    return name if is_fsdp1 or name in _OWN_CLIPPING else None
