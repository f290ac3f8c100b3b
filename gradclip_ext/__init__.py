"""Fast, accurate, drop-in gradient clipping for PyTorch.

>>> from gradclip_ext import clip_grad_norm_  # instead of: from torch.nn.utils import ...
"""

from gradclip_ext import _build_check
from gradclip_ext._version import __version__

_build_check.check()

from gradclip_ext import _C, _torch_private  # noqa: E402
from gradclip_ext.clipper import ClipReport, GradClipper, GradNorms, grad_norms  # noqa: E402
from gradclip_ext.functional import (  # noqa: E402
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from gradclip_ext.textbook import add_weight_decay_, clip_grad_norm, grad_clipping  # noqa: E402
from gradclip_ext.thresholds import (  # noqa: E402
    AGC,
    AdaGC,
    AutoClip,
    Threshold,
    ZClip,
    adaptive_clip_grad_,
)

_C.set_device_mode_type(_torch_private.DeviceContext)

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "ClipReport",
    "GradClipper",
    "GradNorms",
    "Threshold",
    "ZClip",
    "__version__",
    "adaptive_clip_grad_",
    "add_weight_decay_",
    "clip_grad_norm",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "grad_clipping",
    "grad_norms",
]
