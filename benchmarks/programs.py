"""The C programs, compiled anew for every run: it takes half a second."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from children import BenchmarkError

HERE = Path(__file__).parent
NAMES = ("load", "ping", "echo_load", "flood", "reference")


@dataclass(frozen=True)
class Programs:
    folder: Path

    def path(self, name: str) -> str:
        return str(self.folder / name)


def build_programs(folder: Path, names: Iterable[str] = NAMES) -> Programs:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    for name in names:
        source, program = str(HERE / f"{name}.c"), str(folder / name)
        command = [*compiler, "-O2", "-Wall", "-Wextra", "-o", program, source]
        try:
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise BenchmarkError(
                f"no C compiler for {name}.c: {compiler[0]}: {error.strerror}. "
                "Install gcc, or name another with the environment variable CC"
            ) from None
        except subprocess.CalledProcessError:
            raise BenchmarkError(f"{name}.c does not compile (the errors are above)") from None
    return Programs(folder)
