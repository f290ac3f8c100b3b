"""What torch calls at the end of its own import, through the entry point that is registered.

Every process of the environment that imports torch comes here, whether it clips or not. So this is
a module of its own, outside of the package, which imports nothing.
"""


def load() -> None:
    """Import gradclip_ext if GRADCLIP_EXT_PATCH=1 is set, which then patches torch.

    Never raises, since that would make torch impossible to import.
    """
    import os

    if os.environ.get("GRADCLIP_EXT_PATCH") != "1":
        return
    try:
        # If torch is being imported by gradclip_ext, this only finds it, and it patches later.
        import gradclip_ext  # noqa: F401
    except Exception as error:
        import contextlib
        import sys

        with contextlib.suppress(Exception):
            print(
                "gradclip_ext: GRADCLIP_EXT_PATCH=1 is set, but torch's own functions stay in "
                f"place: {error}",
                file=sys.stderr,
            )
