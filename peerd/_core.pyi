"""The compiled datagram path: the envelope, the message and the receive loop.

The wire format (``ext/peerd/wire.pxd`` has the byte table) is an int32 length and an ASCII magic
code, an int32 length and an ASCII version, and a body to the end of the datagram; integers are big
endian. :func:`encode` and :func:`decode` run the same C functions as :class:`DatagramLoop`.
"""

from collections.abc import Callable, Coroutine, Mapping
from contextvars import Context
from typing import Any, Final, Protocol, TypeAlias, final

from typing_extensions import Buffer

from peerd._scoreboard import Slot

DECODE_REASONS: Final[tuple[str, ...]]
"""Why a datagram is no envelope, in the order of the C enum; the first entry is ``ok``."""

@final
class Message:
    """One message: what a handler gets, and, when it is returned, a reply with a magic of its own.

    The body is a copy and may be kept. Two messages are equal when their four fields are.
    """

    def __init__(
        self, magic: str, version: str, body: bytes, sender: tuple[str, int] | None = None
    ) -> None:
        """Raises ValueError when magic or version is not ASCII."""

    @property
    def magic(self) -> str:
        """The magic code: which handler a message is for. ASCII."""

    @property
    def version(self) -> str:
        """The sender's version of the protocol. ASCII, may be empty."""

    @property
    def body(self) -> bytes:
        """Everything behind the version, may be empty."""

    @property
    def sender(self) -> tuple[str, int] | None:
        """(address, port) that the datagram came from, built when first asked for.

        An IPv4 address in an IPv6 socket is shown as IPv4. None for a message made by hand.
        """

    def json(self) -> Any:
        """The body as JSON (orjson). Raises orjson.JSONDecodeError, a ValueError."""

    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

def encode(magic: str, version: str, body: bytes = b"") -> bytes:
    """The datagram of a message. Raises ValueError when magic or version is not ASCII.

    Whether it fits into a UDP datagram (65,507 bytes on IPv4) is the sender's business.
    """

def decode(datagram: Buffer, sender: tuple[str, int] | None = None) -> Message:
    """The message in a datagram. Raises :class:`peerd.DecodeError`, and nothing else, on any bytes."""

Reply: TypeAlias = bytes | Message | None

class _Spare(Protocol):
    """What a coroutine handler sees as its task while it has not waited for anything yet."""

    @property
    def context(self) -> Context:
        """What the coroutine runs in."""
    @property
    def clean_context(self) -> Context:
        """A copy of it from before."""
    def enter(self) -> object:
        """Become the event loop's current task."""
    def leave(self) -> object:
        """Cease to be."""
    def discard(self) -> object:
        """A coroutine has left its context changed: it is not to be handed out again."""

@final
class DatagramLoop:
    """Receives on a bound UDP socket, calls handlers and sends their replies, in one thread.

    ``fd``
        A bound UDP socket, IPv4 or IPv6. The loop does not own it and never blocks on it.
    ``handlers``
        Magic code to ``handler(message)``, called once a message. It returns bytes (a reply with
        the magic and version of the request), a Message (a reply as it is) or None (no reply).
        A handler must not block: while it runs, this peer receives nothing.
    ``batch_handlers``
        Magic code to ``handler(messages)``, called once a turn with a non-empty list that the
        handler may keep. It returns None.
    ``coroutine_handlers``
        As ``handlers``, with coroutine functions. They need :meth:`attach` and an event loop that
        calls :meth:`turn` when the socket can be read, instead of :meth:`run`.
    ``slot``
        Heartbeat and counters are written here.
    ``on_handler_error``
        Called with (magic, sender, exception) when a handler raises an Exception (or, a coroutine,
        CancelledError) or returns something else. The loop has counted it and goes on. What this
        callable raises, and what a handler raises beside that (SystemExit), ends :meth:`run`.
    ``on_icmp_error``
        Called with (address, errno) when a host or router says that a reply did not arrive; None:
        these errors are counted only.
    ``gro``, ``gso``
        Ask the kernel to join datagrams of one sender (UDP_GRO), and to take neighbouring replies
        of one size to one address joined (UDP_SEGMENT); both udp(7). The attributes of the same
        names say whether that is done.
    ``linger_s``
        After a batch that was not full, sleep for so long before the next look at the socket, where
        that was worth it before (``ext/peerd/linger.pxd``). 0 for never.

    Raises OSError when a system call fails for a reason other than the network's weather.
    """

    def __init__(
        self,
        fd: int,
        handlers: Mapping[str, Callable[[Message], Reply]],
        batch_handlers: Mapping[str, Callable[[list[Message]], None]],
        slot: Slot,
        on_handler_error: Callable[[str, tuple[str, int] | None, BaseException], object],
        *,
        coroutine_handlers: Mapping[str, Callable[[Message], Coroutine[Any, Any, Reply]]]
        | None = None,
        on_icmp_error: Callable[[tuple[str, int] | None, int], object] | None = None,
        gro: bool = True,
        gso: bool = True,
        linger_s: float = 0.0,
    ) -> None:
        """Raises ValueError for two handlers of one magic code, or one that is not ASCII."""

    @property
    def gro(self) -> bool:
        """Whether the kernel joins datagrams for this socket."""

    @property
    def gso(self) -> bool:
        """Whether runs of replies leave joined; no longer so when too many addresses refused them."""

    @property
    def wakeup_fd(self) -> int:
        """A pipe whose every byte wakes the loop: for ``signal.set_wakeup_fd``."""

    def run(self) -> None:
        """Serve until :meth:`stop`. Python's signal handlers run between turns (main thread)."""

    def turn(self) -> int:
        """Take, hand out and answer what one recvmmsg gives now, without waiting.

        Returns the number of datagrams taken (at most 16 buffers full).
        """

    def fileno(self) -> int:
        """The socket, for an event loop."""

    def attach(
        self,
        new_spare: Callable[[], _Spare],
        continue_: Callable[[_Spare, Coroutine[Any, Any, Reply], Any, Message], object],
    ) -> None:
        """Let coroutine handlers run: where their spare tasks come from, and who continues them.

        ``continue_`` gets the spare, the coroutine, what it waits for (as a task would), and the
        message; in the end it calls :meth:`answer`.
        """

    def answer(self, message: Message, result: Reply | BaseException) -> None:
        """What a continued coroutine returned or raised. Queued: :meth:`flush` sends it.

        Raises what is neither an Exception nor CancelledError.
        """

    def flush(self) -> None:
        """Send what is queued, as far as the kernel takes it."""

    def beat(self) -> None:
        """Write a heartbeat: the event loop turns, and this loop has a reason not to."""

    @property
    def suspended(self) -> int:
        """How many continued coroutines have not ended."""

    @property
    def queued_replies(self) -> int:
        """How many replies the kernel has not taken yet."""

    def stop(self, drain_s: float = 0.0, *, hand_over: bool = False) -> None:
        """End :meth:`run` after the turn it is in; from any thread, or from a signal handler.

        ``drain_s``: for at most so many seconds, first serve what the socket's queue still holds, and
        send the replies that the kernel has not taken yet. ``hand_over``: only the latter, since a
        successor reads on from the same socket.
        """
