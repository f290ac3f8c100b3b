"""Gradients that are split over ranks without being DTensors: how to say so.

DTensors, such as those of FSDP2 and tensor parallelism, need nothing of this: they know how they
are distributed.
"""

from __future__ import annotations

from gradclip_ext._ops import ShardGroup

__all__ = ["ShardGroup"]
