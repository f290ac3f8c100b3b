"""Lightning: a callback that clips by the rule of a ``GradClipper`` and logs norms.

For ``import lightning``; :mod:`gradclip_ext.integrations.pytorch_lightning` is for
``import pytorch_lightning``.
"""

from __future__ import annotations

import lightning
from lightning.pytorch import Callback

from gradclip_ext.integrations._lightning import LightningClipping
from gradclip_ext.integrations._versions import warn_if_untested

__all__ = ["GradClipping"]

warn_if_untested(__name__, "lightning", lightning.__version__)


class GradClipping(LightningClipping, Callback):
    __doc__ = LightningClipping.__doc__
