"""The errors that peerd raises, named after what the caller can do about them.

Errors of libraries (OSError, grpc, etcd3) are translated where they occur. Only the datagram loop raises
OSError, with the name of the failed system call.
"""

from __future__ import annotations


class PeerdError(Exception):
    """Base of all errors of this package. ``str(error)`` names the thing, the cause and the next step."""


class DecodeError(PeerdError, ValueError):
    """The bytes are not an envelope. The sender is at fault: count the datagram and drop it.

    ``reason`` is one of ``empty``, ``short``, ``negative_length``, ``length_past_end``,
    ``not_ascii``; the scoreboard counts each as ``decode_<reason>``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str]]:
        return type(self), (self.reason, str(self))


class SettingsError(PeerdError, ValueError):
    """A setting has an invalid value: change the flag, variable or file that it came from.

    ``flags`` are the flags that it is about, without dashes; empty if no flag sets it.
    """

    def __init__(self, message: str, *flags: str) -> None:
        super().__init__(message)
        self.flags = flags


class AppLoadError(PeerdError):
    """``--app module:attr`` does not name an App that can be loaded: correct the name or the module."""


class BindError(PeerdError):
    """A socket cannot be bound: choose another address or port, or stop the process that has it."""


class PortInUseError(BindError):
    """The port is taken. ``holder`` describes the process that has it, or is None if unknown."""

    def __init__(self, port: int, holder: str | None, message: str) -> None:
        super().__init__(message)
        self.port = port
        self.holder = holder


class NoAnswerError(PeerdError):
    """A peer did not answer in time, or no process listens there: try again, or another peer."""


class NotRunningError(PeerdError):
    """No supervisor answers at the control socket: start one, or pass the path of its socket."""


class ControlError(PeerdError):
    """The supervisor rejected a command or failed to run it, or its answer cannot be parsed."""


class RegistryError(PeerdError):
    """Base of the errors of the registry."""


class RegistryUnavailableError(RegistryError):
    """etcd did not answer in time: try again later. Whether it has done what was asked is unknown."""


class RegistryAuthError(RegistryError):
    """etcd rejected the credentials or denied permission: change them."""


class PeerConflictError(RegistryError):
    """Another live lease has the peer id: choose another id, or wait until its owner is gone."""


class InvalidRecordError(RegistryError, ValueError):
    """A record cannot be stored, or a stored value is not a record."""
