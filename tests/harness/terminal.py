"""Runs a command in a terminal of a given size, as a person does."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]")


class Terminal:
    """The command and its output so far, for a ``with`` block."""

    def __init__(
        self, command: Sequence[str], columns: int = 80, rows: int = 24, cwd: Path | None = None
    ) -> None:
        self._fd, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color"}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            command,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            cwd=cwd,
            env=environment,
            # Makes this the controlling terminal, so that Ctrl-C is a SIGINT.
            preexec_fn=_take_terminal,
        )
        os.close(inner)
        self._written = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)

    @property
    def raw(self) -> str:
        """Everything so far, with the colours and the movements of the cursor."""
        self._read()
        return self._written.decode()

    @property
    def text(self) -> str:
        return ESCAPE.sub("", self.raw).replace("\r", "")

    def type(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def wait(self, within_s: float = 60) -> int:
        """The exit code. Reads the output while it waits."""
        give_up_s = time.monotonic() + within_s
        while self.process.poll() is None:
            assert time.monotonic() < give_up_s, f"still running: {self.text[-2000:]}"
            self._read(0.05)
        self._read()
        return self.process.returncode

    def _read(self, timeout_s: float = 0) -> None:
        while select.select([self._fd], [], [], timeout_s)[0]:
            try:
                chunk = os.read(self._fd, 1 << 16)
            except OSError:  # EIO: the other end is closed
                return
            self._written += chunk


def _take_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
