"""The C programs, compiled anew for every run, which takes half a second."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.children import BenchmarkError

SOURCES = Path(__file__).parent / "programs"


@dataclass(frozen=True)
class Programs:
    folder: Path

    def path(self, name: str) -> str:
        return str(self.folder / name)


@contextlib.contextmanager
def built_programs(*names: str) -> Iterator[Programs]:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory(prefix="peerd-benchmark-") as folder:
        programs = Programs(Path(folder))
        for name in names:
            source = str(SOURCES / f"{name}.c")
            command = [*compiler, "-O2", "-Wall", "-Wextra", "-o", programs.path(name), source]
            try:
                subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
            except OSError as error:
                raise BenchmarkError(
                    f"no C compiler for {name}.c: {compiler[0]}: {error.strerror}. "
                    "Install gcc, or name another with the environment variable CC"
                ) from None
            except subprocess.CalledProcessError:
                raise BenchmarkError(f"{name}.c does not compile (the errors are above)") from None
        yield programs
