"""Thresholds that adapt to the gradients of the steps before, from the literature.

A rule looks at the norms of each step, on the device where they are, and says how large the
gradients may be: :class:`AutoClip` and :class:`ZClip` for all gradients together, :class:`AdaGC`
for each parameter. :class:`AGC` needs no history; it compares each unit of a gradient with its
weights. Each paper has a file of its own; :mod:`.rule` holds what they have in common.

No step reads a number on the host, so none waits for the device. What was measured so far is in
float64 tensors beside the gradients; they are created at the first step. Moving them, after
:meth:`~Threshold.load_state_dict` or when the model moves to another device, is a copy like any
other, once.
"""

from gradclip_ext.thresholds.adagc import AdaGC
from gradclip_ext.thresholds.agc import AGC, adaptive_clip_grad_
from gradclip_ext.thresholds.autoclip import AutoClip
from gradclip_ext.thresholds.rule import FixedThreshold, StatelessRule, Threshold
from gradclip_ext.thresholds.zclip import ZClip

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "FixedThreshold",
    "StatelessRule",
    "Threshold",
    "ZClip",
    "adaptive_clip_grad_",
]
