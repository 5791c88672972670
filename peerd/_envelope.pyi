"""Messages and their envelope; ``ext/peerd/_envelope.pyx`` has the manual, which ``help()`` shows."""

from typing import Any, Final, TypeAlias, final

from typing_extensions import Buffer

DECODE_REASONS: Final[tuple[str, ...]]
"""Why a datagram is not an envelope, in the order of the C enum; the first entry is ``ok``."""

@final
class Message:
    """A message that a handler receives; a handler that returns one replies with its magic code."""

    def __init__(
        self, magic: str, version: str, body: bytes, sender: tuple[str, int] | None = None
    ) -> None: ...
    @property
    def magic(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def body(self) -> bytes: ...
    @property
    def sender(self) -> tuple[str, int] | None: ...
    @property
    def local(self) -> tuple[str, int] | None: ...
    def json(self) -> Any: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

def encode(magic: str, version: str, body: bytes = b"") -> bytes:
    """The datagram of a message. Raises ValueError when magic or version is not ASCII."""

def decode(datagram: Buffer, sender: tuple[str, int] | None = None) -> Message:
    """The message in a datagram. Raises :class:`peerd.DecodeError`, and nothing else, on any bytes."""

Reply: TypeAlias = bytes | Message | None
