"""The server's side of the control socket; peerd/control/ has the protocol and the client.

The socket has mode 0600, and a client's uid must be the supervisor's or root's (unix(7), SO_PEERCRED).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peerd import control
from peerd.control.protocol import VERSION
from peerd.errors import ControlError
from peerd.supervisor.bounded_server import BoundedServer, Reply, ServerProtocol
from peerd.supervisor.loop import Loop, Promise

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 64 * 1024
MAX_CLIENTS = 64

Command = Callable[[Mapping[str, Any]], object]
"""Takes the arguments, returns the result or a Promise of it. Raises ControlError to refuse."""

MALFORMED = 'a request is {"v": 1, "command": "..."}'


class ControlServer:
    """Answers commands from within the supervisor's selector."""

    def __init__(self, path: Path, commands: Mapping[str, Command], loop: Loop) -> None:
        """Raises OSError when no socket can be made at ``path``, ControlError when one is served there."""
        self._commands = commands
        self._path = path
        self._server = BoundedServer(
            loop,
            _listen(path),
            ServerProtocol(
                max_clients=MAX_CLIENTS,
                max_request_bytes=MAX_REQUEST_BYTES,
                split=_split,
                answer=self._answer,
                is_allowed=_is_allowed,
            ),
        )
        self._inode = path.stat().st_ino

    def close(self) -> None:
        self._server.close()
        # Only our own file: if ours was removed, this one may be a later supervisor's.
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()

    def _answer(self, line: bytes, reply: Reply) -> None:
        def succeed(result: object) -> None:
            reply([_line({"v": VERSION, "ok": True, "result": result})])

        def fail(why: str) -> None:
            reply([_line({"v": VERSION, "ok": False, "error": why})])

        name = None
        try:
            name, arguments = self._parse(line)
            result = self._commands[name](arguments)
        except ControlError as error:
            fail(str(error))
        except Exception:  # a failing command must not end the service
            log.exception("the command %r failed", name)
            fail("internal error: see the supervisor's log")
        else:
            if isinstance(result, Promise):
                result.then(succeed, fail)
            else:
                succeed(result)

    def _parse(self, line: bytes) -> tuple[str, dict[str, Any]]:
        """The command and its arguments. Raises ControlError."""
        import orjson  # not at the top: the first peers would wait for it

        try:
            asked = orjson.loads(line)
            if asked["v"] != VERSION:
                raise ControlError(f"this supervisor speaks version {VERSION} of the protocol")
            name, arguments = asked["command"], asked.get("arguments", {})
            if name not in self._commands:
                known = ", ".join(sorted(self._commands))
                raise ControlError(f"unknown command {name!r}; known: {known}")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ControlError(MALFORMED) from None
        if not isinstance(arguments, dict):
            raise ControlError(MALFORMED)
        return name, arguments


def _split(received: bytes) -> tuple[bytes, bytes] | None:
    line, newline, rest = received.partition(b"\n")
    return (line, rest) if newline else None


def _line(answer: dict[str, object]) -> bytes:
    import orjson  # not at the top: the first peers would wait for it

    return orjson.dumps(answer) + b"\n"


def _listen(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if path.parent == control.directory() and path.parent.stat().st_uid != os.getuid():
        raise ControlError(f"{path.parent} belongs to another user")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            if control.has_listener(path):
                raise ControlError(f"another supervisor answers at {path}")
            path.unlink()  # left behind by a supervisor that was killed
        previous = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(previous)
        listener.listen(MAX_CLIENTS)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _is_allowed(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
    )
    _, uid, _ = struct.unpack("3i", credentials)
    return uid in (0, os.getuid())
