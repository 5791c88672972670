"""Imports an app in a process of its own, for ``peerd check``.

``python -m peerd.cli.app_probe module:attr FD`` writes its result to a descriptor, as JSON, because the
app may print. Its exit code is 0 if there is a result, good or bad.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass
from typing import IO

import orjson

from peerd.errors import AppLoadError
from peerd.serving.app import load_app


@dataclass(frozen=True)
class FoundApp:
    """The magic codes that an app answers, by kind of handler."""

    handlers: list[str]
    coroutine_handlers: list[str]
    batch_handlers: list[str]


def probe(name: str | None, timeout_s: float) -> FoundApp:
    """Load the app in another process, so that it leaves nothing in this one.

    The app's standard output goes to standard error, and processes that it started are killed. Raises
    AppLoadError, whose text ends with the traceback if the app raised.
    """
    if name is None:
        return _found(None)
    with tempfile.TemporaryFile() as result:
        process = subprocess.Popen(
            [sys.executable, "-m", "peerd.cli.app_probe", name, str(result.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=[result.fileno()],
            process_group=0,
        )
        try:
            # Reaped only after its group is killed: until then, its pid cannot belong to another group.
            pidfd = os.pidfd_open(process.pid)
            try:
                ended = bool(select.select([pidfd], [], [], timeout_s)[0])
            finally:
                os.close(pidfd)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        if not ended:
            raise AppLoadError(f"app {name!r} did not load within --boot-timeout, {timeout_s:g} s")
        return _read(result, name, code)


def _read(result: IO[bytes], name: str, code: int) -> FoundApp:
    result.seek(0)
    text = result.read()
    if not text:
        how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        raise AppLoadError(f"app {name!r}: importing it ended the process: {how}")
    found = orjson.loads(text)
    if "error" in found:
        raise AppLoadError(found["error"])
    return FoundApp(**found)


def _found(name: str | None) -> FoundApp:
    app = load_app(name)
    return FoundApp(
        sorted(app.handlers), sorted(app.coroutine_handlers), sorted(app.batch_handlers)
    )


def _main(name: str, fd: int) -> None:
    try:
        result = asdict(_found(name))
    except AppLoadError as error:
        text = str(error)
        if error.__cause__ is not None:
            text = f"{text}\n{''.join(traceback.format_exception(error.__cause__))}".rstrip()
        result = {"error": text}
    with open(fd, "wb") as file:
        file.write(orjson.dumps(result))
    # Skips threads and exit handlers of the app.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
