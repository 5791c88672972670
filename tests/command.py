"""Runs a command of peerd to its end, as a script does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def peerd(*args: str, stdin: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*args), input=stdin, capture_output=True, text=True, timeout=60, cwd=cwd
    )


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "peerd", *args]
