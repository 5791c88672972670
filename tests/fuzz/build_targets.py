"""Builds the fuzz targets: one libFuzzer executable for each ``fuzz_*.pyx`` beside this file.

``python tests/fuzz/build_targets.py build/fuzz`` leaves ``build/fuzz/fuzz_envelope`` and so on there,
with ASan and UBSan in them. It needs Cython, the Python headers and clang with its runtime library.

The fuzzed code is nogil, so no interpreter ever runs in a target. libpython is linked because the C file
that Cython makes of a module also has the code of its import.
PEERD_CLANG names another clang.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FLAGS = [
    "-std=gnu11",
    "-O1",
    "-g",
    "-D_GNU_SOURCE",
    "-fno-omit-frame-pointer",
    "-fsanitize=fuzzer,address,undefined",
    "-fno-sanitize-recover=all",
    # What Cython generates around the targets, not what is in them.
    "-Wno-everything",
]


def main(build: Path) -> None:
    clang = find_clang()
    build.mkdir(parents=True, exist_ok=True)
    for source in sorted(HERE.glob("fuzz_*.pyx")):
        generated = build / f"{source.stem}.c"
        cython = [sys.executable, "-m", "cython", "-3", "-I", str(ROOT / "ext")]
        run([*cython, "-o", str(generated), str(source)])
        headers = f"-I{sysconfig.get_path('include')}"
        target = str(build / source.stem)
        run([clang, *FLAGS, headers, str(generated), "-o", target, *libpython()])


def find_clang() -> str:
    for name in filter(None, (os.environ.get("PEERD_CLANG"), "clang", "clang-14")):
        if path := shutil.which(name):
            return path
    sys.exit("no clang. On Debian and Ubuntu: apt-get install -y clang-14 libclang-rt-14-dev")


def libpython() -> list[str]:
    """How to link this interpreter's library, shared (Debian, docker) or static (pyenv's default)."""
    variables = sysconfig.get_config_vars(
        "LIBDIR", "LIBPL", "LIBRARY", "LDVERSION", "LIBS", "SYSLIBS"
    )
    directory, config_directory, archive, version, *others = map(str, variables)
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        return [f"-L{directory}", f"-Wl,-rpath,{directory}", f"-lpython{version}"]
    return [str(Path(config_directory) / archive), *" ".join(others).split()]


def run(command: list[str]) -> None:
    if code := subprocess.run(command).returncode:
        sys.exit(f"exit code {code}: {' '.join(command)}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/fuzz/build_targets.py DIRECTORY")
    main(Path(sys.argv[1]))
