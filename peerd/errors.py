"""Every error that peerd raises, named after what the caller can do about it.

Library errors (OSError, grpc, etcd3) are translated where they are met; none of them leaves the
package except an OSError of the datagram loop, which carries the name of the failed system call.
"""

from __future__ import annotations


class PeerdError(Exception):
    """Base of all errors of this package. ``str(error)`` names the thing, the cause and the next step."""


class DecodeError(PeerdError, ValueError):
    """The bytes are not an envelope: the sender's fault, so count it and drop the datagram.

    ``reason`` is one of ``empty``, ``short``, ``negative_length``, ``length_past_end``,
    ``not_ascii``; the scoreboard counts each as ``decode_<reason>``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str]]:
        return type(self), (self.reason, str(self))


class SettingsError(PeerdError, ValueError):
    """A setting has a value that cannot work: change the flag, variable or file that it came from.

    ``flags`` are those that it is about, without their dashes; none where no flag sets it.
    """

    def __init__(self, message: str, *flags: str) -> None:
        super().__init__(message)
        self.flags = flags


class AppLoadError(PeerdError):
    """``--app module:attr`` does not give an App: correct the name, or the module."""


class BindError(PeerdError):
    """A socket cannot be bound: choose another address or port, or stop who has it."""


class PortInUseError(BindError):
    """The port is taken. ``holder`` is a description of the process that has it, or None."""

    def __init__(self, port: int, holder: str | None, message: str) -> None:
        super().__init__(message)
        self.port = port
        self.holder = holder


class NoAnswerError(PeerdError):
    """A peer did not answer in time, or the host says that nobody listens there: try again or elsewhere."""


class NotRunningError(PeerdError):
    """No supervisor answers at the control socket: start one, or name its socket."""


class ControlError(PeerdError):
    """The supervisor refused or failed a command, or its answer makes no sense."""


class RegistryError(PeerdError):
    """Base of the registry's errors."""


class RegistryUnavailableError(RegistryError):
    """etcd does not answer in time: try again later; nothing is known about what was asked."""


class RegistryAuthError(RegistryError):
    """etcd refuses the credentials or the permission: change them."""


class PeerConflictError(RegistryError):
    """The peer id belongs to somebody else's live lease: choose another, or wait until it is gone."""


class InvalidRecordError(RegistryError, ValueError):
    """A record that cannot be stored, or a stored value that is no record."""
