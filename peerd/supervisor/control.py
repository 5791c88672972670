"""The control socket: how a command line talks to a running supervisor.

Unix stream, mode 0600, and the peer's uid must be ours or root's (unix(7), SO_PEERCRED). A request is
one line of JSON, ``{"v": 1, "command": "status"}``, with ``"arguments"`` where there are some; the answer,
when it is done, is one line,
``{"v": 1, "ok": true, "result": ...}`` or ``{"v": 1, "ok": false, "error": "..."}``. A client that
sends garbage, too much, or nothing at all costs one bounded entry in a table: the server never
blocks on it, and when the table is full, the oldest goes that is not waiting for the end of its command.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import stat
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peerd.errors import ControlError, NotRunningError
from peerd.supervisor.listener import Listener
from peerd.supervisor.loop import Loop

log = logging.getLogger(__name__)

VERSION = 1
MAX_REQUEST_BYTES = 64 * 1024
MAX_CLIENTS = 64

Command = Callable[[Mapping[str, Any]], object]
"""Takes the arguments, and returns the result or a Pending. Raises ControlError to refuse."""


class Pending:
    """The answer to a command that takes its time. Nobody may want it any more when it comes."""

    def __init__(self) -> None:
        self._answer: dict[str, object] | None = None
        self._deliver: Callable[[dict[str, object]], None] | None = None

    def finish(self, result: object) -> None:
        self._end({"v": VERSION, "ok": True, "result": result})

    def fail(self, error: str) -> None:
        self._end({"v": VERSION, "ok": False, "error": error})

    def _end(self, answer: dict[str, object]) -> None:
        self._answer = answer
        if self._deliver is not None:
            self._deliver(answer)


def directory() -> Path:
    """Where sockets live by default: the user's run-time directory, or one that only they can use."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime, "peerd")
    if os.getuid() == 0:
        return Path("/run/peerd")
    return Path(f"/tmp/peerd-{os.getuid()}")


def default_path(base_port: int) -> Path:
    return directory() / f"{base_port}.sock"


TAKE_THEIR_TIME = ("reload", "restart", "scale", "stop")
"""Commands that change something, and that go on when nobody waits for them any more."""


def request(
    path: Path, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float = 5.0
) -> Any:
    """What a supervisor answers. Raises NotRunningError or ControlError."""
    import orjson

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        _limit_waits(client, timeout_s)
        try:
            client.connect(str(path))
            asked = {"v": VERSION, "command": command, "arguments": arguments or {}}
            client.sendall(orjson.dumps(asked) + b"\n")
            answer = b""
            while not answer.endswith(b"\n") and (chunk := client.recv(1 << 16)):
                answer += chunk
        except (FileNotFoundError, ConnectionRefusedError):
            raise NotRunningError(
                f"no supervisor answers at {path}: start one with 'peerd supervise', "
                "or name its socket with --control"
            ) from None
        except PermissionError:
            raise ControlError(
                f"{path} belongs to another user: run this as them, or as root"
            ) from None
        except BlockingIOError:
            if command in TAKE_THEIR_TIME:
                raise ControlError(
                    f"{command!r} has not ended within {timeout_s:g} s; the supervisor goes on with it "
                    "as soon as it can: see 'peerd events'"
                ) from None
            raise ControlError(
                f"the supervisor at {path} does not answer within {timeout_s:g} s: is it stopped?"
            ) from None
        except OSError as error:
            raise ControlError(
                f"the supervisor at {path} does not answer: {error.strerror or error}"
            ) from None
    if not answer:
        raise ControlError(f"the supervisor at {path} hung up without an answer: has it ended?")
    try:
        reply = orjson.loads(answer)
        ok, body = reply["ok"], reply.get("result", reply.get("error"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ControlError(f"what listens at {path} is no peerd supervisor") from None
    if not ok:
        raise ControlError(str(body))
    return body


def find_running() -> Path:
    """The socket of the only running supervisor of this user.

    Raises NotRunningError when none answers, ControlError when there are several to choose from.
    """
    found = [path for path in sorted(directory().glob("*.sock")) if _answers(path)]
    if not found:
        raise NotRunningError(
            f"no supervisor is running (no socket in {directory()} answers): "
            "start one with 'peerd supervise', or name its socket with --control"
        )
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise ControlError(f"several supervisors are running: choose one with --control: {names}")
    return found[0]


class ControlServer:
    """Answers commands from within the supervisor's selector; never blocks."""

    def __init__(self, path: Path, commands: Mapping[str, Command], loop: Loop) -> None:
        """Raises OSError when the place cannot be written, ControlError when somebody answers there."""
        self._commands = commands
        self._selector = loop.selector
        self._clients: dict[socket.socket, _Client] = {}
        self._path = path
        self._listener = Listener(loop, _listen(path), self._admit)
        self._inode = path.stat().st_ino

    def close(self) -> None:
        for client in list(self._clients.values()):
            self._drop(client)
        self._listener.close()
        # Only our own file: after a clean-up by somebody, it may be a successor's.
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()

    def _admit(self, connection: socket.socket) -> None:
        if not _is_allowed(connection):
            connection.close()
            return
        connection.setblocking(False)
        if len(self._clients) >= MAX_CLIENTS:
            oldest = next(iter(self._clients.values()))
            self._drop(next((each for each in self._clients.values() if not each.waits), oldest))
        client = _Client(connection)
        self._clients[connection] = client
        self._selector.register(
            connection, selectors.EVENT_READ, lambda events: self._serve(client, events)
        )

    def _serve(self, client: _Client, events: int) -> None:
        try:
            if events & selectors.EVENT_READ and not self._read(client):
                return
            self._answer_next(client)
            while client.unsent:
                client.unsent = client.unsent[client.connection.send(client.unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        # One answer a turn: others wait, too, and this one may have asked for many.
        has_more = client.unsent or (b"\n" in client.received and not client.waits)
        wanted = selectors.EVENT_WRITE if has_more else selectors.EVENT_READ
        self._selector.modify(client.connection, wanted, lambda events: self._serve(client, events))

    def _read(self, client: _Client) -> bool:
        chunk = client.connection.recv(1 << 16)
        client.received += chunk
        if not chunk or len(client.received) > MAX_REQUEST_BYTES:
            self._drop(client)
            return False
        return True

    def _answer_next(self, client: _Client) -> None:
        """One request at a time, when the answer before is gone: so answers cannot pile up."""
        line, newline, rest = client.received.partition(b"\n")
        if newline and not client.unsent and not client.waits:
            client.received = rest
            answer = self._answer(line)
            if isinstance(answer, Pending) and answer._answer is None:
                client.waits = True
                answer._deliver = lambda answer: self._deliver(client, answer)
                return
            if isinstance(answer, Pending):  # it took no time at all
                answer = answer._answer or {}
            client.unsent = _line(answer)

    def _deliver(self, client: _Client, answer: dict[str, object]) -> None:
        if client.connection in self._clients:
            client.waits = False
            client.unsent = _line(answer)
            self._serve(client, 0)

    def _answer(self, line: bytes) -> dict[str, object] | Pending:
        import orjson

        try:
            asked = orjson.loads(line)
            if asked["v"] != VERSION:
                raise ControlError(f"this supervisor speaks version {VERSION} of the protocol")
            if asked["command"] not in self._commands:
                known = ", ".join(sorted(self._commands))
                raise ControlError(f"unknown command {asked['command']!r}; known: {known}")
            arguments = asked.get("arguments", {})
            if not isinstance(arguments, dict):
                raise TypeError(arguments)
            command = self._commands[asked["command"]]
        except ControlError as error:
            return {"v": VERSION, "ok": False, "error": str(error)}
        except (ValueError, KeyError, TypeError, AttributeError):
            return {"v": VERSION, "ok": False, "error": 'a request is {"v": 1, "command": "..."}'}
        try:
            result = command(arguments)
        except ControlError as error:
            return {"v": VERSION, "ok": False, "error": str(error)}
        except Exception:  # no client's request is worth the whole service
            log.exception("the command %r failed", asked["command"])
            return {"v": VERSION, "ok": False, "error": "internal error: see the supervisor's log"}
        return (
            result if isinstance(result, Pending) else {"v": VERSION, "ok": True, "result": result}
        )

    def _drop(self, client: _Client) -> None:
        if self._clients.pop(client.connection, None) is None:
            return
        self._selector.unregister(client.connection)
        client.connection.close()


def _line(answer: dict[str, object]) -> memoryview:
    # Not at the top, as the first peers would wait for it.
    import orjson

    return memoryview(orjson.dumps(answer) + b"\n")


class _Client:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.received = b""
        self.unsent = memoryview(b"")
        self.waits = False  # for the answer to a command that takes its time


def _listen(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if path.parent == directory() and path.parent.stat().st_uid != os.getuid():
        raise ControlError(f"{path.parent} belongs to another user")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            if _answers(path):
                raise ControlError(f"another supervisor answers at {path}")
            path.unlink()  # left by one that was killed
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


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        _limit_waits(client, 1.0)
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True


def _limit_waits(client: socket.socket, timeout_s: float) -> None:
    """Not settimeout: with a full backlog, connect would then fail at once instead of waiting."""
    # Nothing at all would mean for ever (socket(7)).
    timeval = struct.pack("ll", *divmod(max(1, int(timeout_s * 1e6)), 1_000_000))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)


def _is_allowed(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
    )
    _, uid, _ = struct.unpack("3i", credentials)
    return uid in (0, os.getuid())
