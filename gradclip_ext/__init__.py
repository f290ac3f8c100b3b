"""Fast, accurate, drop-in gradient clipping for PyTorch.

>>> from gradclip_ext import clip_grad_norm_  # instead of: from torch.nn.utils import ...
"""

from gradclip_ext import _build_check
from gradclip_ext._version import __version__

_build_check.check()

from gradclip_ext import _C, _torch_private  # noqa: E402
from gradclip_ext.functional import (  # noqa: E402
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)

_C.set_device_mode_type(_torch_private.DeviceContext)

__all__ = [
    "__version__",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
]
