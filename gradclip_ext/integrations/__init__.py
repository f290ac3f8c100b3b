"""Where trainers have a place for clipping, a ``GradClipper`` in that place.

One module for each framework, imported by its name and importing the framework:
``gradclip_ext.integrations.lightning``, ``.pytorch_lightning``, ``.transformers``, ``.accelerate``.
Each has a class ``GradClipping``, which takes what :class:`gradclip_ext.GradClipper` takes.
"""
