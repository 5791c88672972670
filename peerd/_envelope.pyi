"""Messages and their envelope.

The wire format (``ext/peerd/wire.pxd`` has the byte table) is an int32 length and an ASCII magic
code, an int32 length and an ASCII version, and a body to the end of the datagram; integers are big
endian. :func:`encode` and :func:`decode` run the same C functions as the datagram loop.
"""

from typing import Any, Final, TypeAlias, final

from typing_extensions import Buffer

DECODE_REASONS: Final[tuple[str, ...]]
"""Why a datagram is not an envelope, in the order of the C enum; the first entry is ``ok``."""

@final
class Message:
    """One message: what a handler receives, and, returned by it, a reply with its own magic code.

    The body is a copy and may be kept. Two messages are equal when their four fields are.
    """

    def __init__(
        self, magic: str, version: str, body: bytes, sender: tuple[str, int] | None = None
    ) -> None:
        """Raises ValueError when magic or version is not ASCII."""

    @property
    def magic(self) -> str:
        """The magic code, which selects the handler. ASCII."""

    @property
    def version(self) -> str:
        """The sender's version of the protocol. ASCII, may be empty."""

    @property
    def body(self) -> bytes:
        """Everything behind the version, may be empty."""

    @property
    def sender(self) -> tuple[str, int] | None:
        """The (address, port) that the datagram came from, built at the first access.

        An IPv4 address in an IPv6 socket is shown as IPv4. None for a message made by hand.
        """

    @property
    def local(self) -> tuple[str, int] | None:
        """(address, port) of this host that the datagram was sent to.

        None for a message made by hand, and for a datagram that came by IPv6 multicast.
        """

    def json(self) -> Any:
        """The body as JSON (orjson). Raises orjson.JSONDecodeError, a ValueError."""

    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

def encode(magic: str, version: str, body: bytes = b"") -> bytes:
    """The datagram of a message. Raises ValueError when magic or version is not ASCII.

    The size is not checked: a UDP datagram holds at most 65,507 bytes on IPv4.
    """

def decode(datagram: Buffer, sender: tuple[str, int] | None = None) -> Message:
    """The message in a datagram. Raises :class:`peerd.DecodeError`, and nothing else, on any bytes."""

Reply: TypeAlias = bytes | Message | None
