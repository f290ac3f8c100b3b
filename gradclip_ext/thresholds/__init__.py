"""Thresholds from the literature that adapt to the gradients of earlier steps.

A rule takes the norms of each step, on their device, and says how large the gradients may be:
:class:`AutoClip` and :class:`ZClip` for all gradients together, :class:`AdaGC` for each parameter.
:class:`AGC` needs no history; it compares each unit of a gradient with its weights. Each paper has
a file of its own; :mod:`.rule` holds what they share.

No step needs a device sync. Where the host knows the norms, on the CPU, rules compute with Python
floats; elsewhere no number is read, and the history is kept in float64 tensors on the gradients'
device, created at the first step. After :meth:`~Threshold.load_state_dict`, or when the model moves
to another device, it is brought there once.
"""

from gradclip_ext.thresholds.adagc import AdaGC
from gradclip_ext.thresholds.agc import AGC, adaptive_clip_grad_
from gradclip_ext.thresholds.autoclip import AutoClip
from gradclip_ext.thresholds.rule import (
    FixedThreshold,
    Rule,
    StatelessRule,
    Threshold,
    takes_numbers,
)
from gradclip_ext.thresholds.times_limit import TimesLimit
from gradclip_ext.thresholds.zclip import ZClip

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "FixedThreshold",
    "Rule",
    "StatelessRule",
    "Threshold",
    "TimesLimit",
    "ZClip",
    "adaptive_clip_grad_",
    "takes_numbers",
]
