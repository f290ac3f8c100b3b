"""Loads the compiled engine, once, after checking that it matches the installed torch.

Imported before the rest of the package, so that a missing or replaced torch is found here, with a
message that says what to run.
"""

from gradclip_ext import _build_check


def _load() -> None:
    _build_check.check()
    from gradclip_ext import _C
    from gradclip_ext._ops import torch_private

    _C.set_device_mode_type(torch_private.DeviceContext)


_load()
