"""Sends one command to a supervisor and waits for the answer; finds the supervisor that is running."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peerd.control.protocol import LONG_COMMANDS, VERSION, directory
from peerd.errors import ControlError, NotRunningError

CHUNK_BYTES = 64 * 1024

PROBE_TIMEOUT_S = 1.0

HOW_TO_REACH_ONE = "start one with 'peerd supervise', or name its socket with --control"


def request(
    path: Path, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float = 5.0
) -> Any:
    """Return the supervisor's result, decoded from JSON.

    Raises NotRunningError when no supervisor listens at ``path``, and ControlError when it refuses the
    command, does not answer within ``timeout_s``, or does not speak the protocol.
    """
    import orjson  # not at the top: the supervisor imports this package before its first fork

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        _limit_waits(client, timeout_s)
        try:
            client.connect(str(path))
            asked = {"v": VERSION, "command": command, "arguments": arguments or {}}
            client.sendall(orjson.dumps(asked) + b"\n")
            answer = b""
            while not answer.endswith(b"\n") and (chunk := client.recv(CHUNK_BYTES)):
                answer += chunk
        except (FileNotFoundError, ConnectionRefusedError):
            raise NotRunningError(f"no supervisor answers at {path}: {HOW_TO_REACH_ONE}") from None
        except PermissionError:
            raise ControlError(
                f"{path} belongs to another user: run this as that user, or as root"
            ) from None
        except BlockingIOError:
            if command in LONG_COMMANDS:
                raise ControlError(
                    f"{command!r} has not ended within {timeout_s:g} s; the supervisor goes on with it: "
                    "see 'peerd events'"
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
        raise ControlError(f"the listener at {path} is not a peerd supervisor") from None
    if not ok:
        raise ControlError(str(body))
    return body


def find_running() -> Path:
    """Return the socket of the only running supervisor of this user.

    Raises NotRunningError when none answers, ControlError when there are several to choose from.
    """
    found = [path for path in sorted(directory().glob("*.sock")) if has_listener(path)]
    if not found:
        where = f"no socket in {directory()} answers"
        raise NotRunningError(f"no supervisor is running ({where}): {HOW_TO_REACH_ONE}")
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise ControlError(f"several supervisors are running: choose one with --control: {names}")
    return found[0]


def has_listener(path: Path) -> bool:
    """Whether a process accepts connections at ``path``."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        _limit_waits(client, PROBE_TIMEOUT_S)
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True


def _limit_waits(client: socket.socket, timeout_s: float) -> None:
    """Not settimeout(): with a full backlog, connect() would then fail immediately instead of waiting."""
    # At least a microsecond: zero means no timeout at all (socket(7)).
    timeval = struct.pack("ll", *divmod(max(1, int(timeout_s * 1e6)), 1_000_000))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
