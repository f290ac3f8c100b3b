"""Fast, accurate, drop-in gradient clipping for PyTorch.

>>> from gradclip_ext import clip_grad_norm_  # instead of: from torch.nn.utils import ...
"""

from gradclip_ext import _native as _native
from gradclip_ext._processes import patch_if_asked as _patch_if_asked
from gradclip_ext._version import __version__
from gradclip_ext.amp import unscale_and_clip_grad_norm_
from gradclip_ext.clipper import ClipReport, GradClipper
from gradclip_ext.distributed import ShardGroup
from gradclip_ext.functional import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from gradclip_ext.norms import GradNorms, grad_norms
from gradclip_ext.optim import clip_and_step
from gradclip_ext.patch import patch, unpatch
from gradclip_ext.textbook import add_weight_decay_, clip_grad_norm, grad_clipping
from gradclip_ext.thresholds import (
    AGC,
    AdaGC,
    AutoClip,
    Threshold,
    TimesLimit,
    ZClip,
    adaptive_clip_grad_,
)

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "ClipReport",
    "GradClipper",
    "GradNorms",
    "ShardGroup",
    "Threshold",
    "TimesLimit",
    "ZClip",
    "__version__",
    "adaptive_clip_grad_",
    "add_weight_decay_",
    "clip_and_step",
    "clip_grad_norm",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "grad_clipping",
    "grad_norms",
    "patch",
    "unpatch",
    "unscale_and_clip_grad_norm_",
]

# For programs under gradclip_ext.run, of which torch imports this in every process.
_patch_if_asked()
