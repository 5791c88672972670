"""Builds each ext/peerd/*.pyx into an extension module; everything else is in pyproject.toml.

PEERD_DEBUG=1     no optimisation, with debug symbols
PEERD_SANITIZE=1  AddressSanitizer and UBSan (run Python with LD_PRELOAD="$(gcc -print-file-name=libasan.so)")
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

COMPILE_ARGS = [
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-cast-function-type",
]
LINK_ARGS = []

if os.environ.get("PEERD_DEBUG") == "1":
    COMPILE_ARGS += ["-O0", "-g"]
else:
    COMPILE_ARGS += ["-O3"]
if os.environ.get("PEERD_SANITIZE") == "1":
    COMPILE_ARGS += ["-g", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
    LINK_ARGS += ["-fsanitize=address,undefined"]


def extension(name: str) -> Extension:
    return Extension(
        f"peerd.{name}",
        [f"ext/peerd/{name}.pyx"],
        define_macros=[("_GNU_SOURCE", "1")],
        extra_compile_args=COMPILE_ARGS,
        extra_link_args=LINK_ARGS,
    )


setup(
    ext_modules=cythonize(
        [extension(path.stem) for path in sorted(Path("ext/peerd").glob("*.pyx"))],
        include_path=["ext"],
        compiler_directives={"language_level": 3, "freethreading_compatible": False},
    )
)
