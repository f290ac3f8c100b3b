"""Lightning, for ``import pytorch_lightning``; see :mod:`gradclip_ext.integrations.lightning`."""

from __future__ import annotations

import pytorch_lightning
from pytorch_lightning import Callback

from gradclip_ext.integrations._lightning import LightningClipping
from gradclip_ext.integrations._versions import warn_if_untested

__all__ = ["GradClipping"]

warn_if_untested(__name__, "pytorch-lightning", pytorch_lightning.__version__)


class GradClipping(LightningClipping, Callback):
    __doc__ = LightningClipping.__doc__
