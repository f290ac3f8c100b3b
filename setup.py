"""Builds gradclip_ext; pyproject.toml sets what does not depend on torch."""

import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
# Build front ends run this file without the project's folders on sys.path.
sys.path.append(str(ROOT / "tools"))

from build_support import BuildExt  # noqa: E402

CSRC = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file())
# Including those of the CUDA engine, which BuildExt leaves out of builds without it.
SOURCES = [path for path in CSRC if path.endswith((".cpp", ".cu"))]

setup(
    # Here, because pyproject.toml has no spelling that both setuptools 64 and 77 accept.
    license="BSD-3-Clause",
    ext_modules=[
        Extension(
            "gradclip_ext._C",
            SOURCES,
            depends=[path for path in CSRC if path not in SOURCES],
            include_dirs=[str(ROOT / "csrc")],
            # No -std: torch passes the C++ standard that its own headers need (17 or 20).
            # -fopenmp makes at::parallel_for parallel. It is not passed to the linker, so that the
            # calls bind to torch's own OpenMP library instead of loading a second one.
            extra_compile_args=[
                "-O3",
                "-fopenmp",
                "-fvisibility=hidden",
                "-Wall",
                "-Wextra",
                "-g0",
            ],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
