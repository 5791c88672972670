"""The compiled datagram loop; ``ext/peerd/_loop.pyx`` has the theory."""

from asyncio import AbstractEventLoop, Task
from collections.abc import Callable, Coroutine, Mapping
from contextvars import Context
from typing import Any, Final, final

from peerd._envelope import Message, Reply
from peerd._scoreboard import Slot
from peerd.settings import DEFAULT_MAX_REPLY_RATE

DROP_REASON_NAMES: Final[tuple[str, ...]]
"""Why a reply was not sent, in the order of the C enum."""

@final
class DatagramLoop:
    """Receives on a bound UDP socket, calls handlers and sends their replies, in one thread.

    ``fd``
        A bound UDP socket, IPv4 or IPv6. The loop does not own it and never blocks on it.
    ``handlers``
        Magic code to ``handler(message)``, called once per message. It returns bytes (a reply with
        the magic and version of the request), a Message (a reply as it is) or None (no reply).
        A handler must not block: while it runs, this peer receives nothing.
    ``batch_handlers``
        Magic code to ``handler(messages)``, called once per turn with a non-empty list that the
        handler may keep. It returns None.
    ``coroutine_handlers``
        As ``handlers``, with coroutine functions. They need :meth:`attach` and an event loop that
        calls :meth:`turn` when the socket can be read, instead of :meth:`run`.
    ``max_waiting``
        Magic code to the number of its coroutines that may wait; further messages are dropped, and
        counted as ``rx_max_waiting``.
    ``slot``
        Heartbeat and counters are written here.
    ``on_handler_error``
        Called with (magic, sender, exception) when a handler raises an Exception (or, a coroutine,
        CancelledError) or returns something else. The loop has counted it and goes on. What this
        callable raises, and what a handler raises beside that (SystemExit), ends :meth:`run`.
    ``on_icmp_error``
        Called with (address, errno) when a host or router reports that a reply did not arrive.
        None: these errors are only counted.
    ``on_replies_dropped``
        Called after a flush with (reason, address, errno, count) for each reason of which replies
        were dropped: an entry of DROP_REASON_NAMES, the address and errno (0 for none) of one of
        them, and their number. None: drops are only counted.
    ``gro``, ``gso``
        Ask the kernel to join datagrams of one sender (UDP_GRO), and to take neighbouring replies
        of one size to one address joined (UDP_SEGMENT); both udp(7).
    ``linger_s``
        After a batch that was not full, sleep this long before the next recvmmsg, if that was worth
        it before (``ext/peerd/linger.pxd``). 0 for never.

    ``max_reply_rate``
        Replies per second to one source (address and port); 0 for no limit. The default is for
        sources below port 32768, where servers listen, and a twentieth of it for replies with the
        request's magic code; another value is for every source (``ext/peerd/loop_guard.pxd``).

    Raises OSError when a system call fails; ICMP errors and a full queue do not count as failures.
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
        max_waiting: Mapping[str, int] | None = None,
        on_icmp_error: Callable[[tuple[str, int] | None, int], object] | None = None,
        on_replies_dropped: Callable[[str, tuple[str, int] | None, int, int], object] | None = None,
        gro: bool = True,
        gso: bool = True,
        linger_s: float = 0.0,
        max_reply_rate: int = DEFAULT_MAX_REPLY_RATE,
    ) -> None:
        """Raises ValueError for two handlers of one magic code, or one that is not ASCII."""

    @property
    def gro(self) -> bool:
        """Whether the kernel joins datagrams for this socket."""

    @property
    def gso(self) -> bool:
        """Whether runs of replies leave joined. Becomes False when too many addresses refused them."""

    @property
    def wakeup_fd(self) -> int:
        """A pipe whose every byte wakes the loop: for ``signal.set_wakeup_fd``."""

    def run(self) -> None:
        """Serve until :meth:`stop`. Python's signal handlers run between turns (main thread)."""

    def turn(self) -> int:
        """Receive, dispatch and answer what one recvmmsg gives now, without waiting.

        Returns the number of datagrams taken (at most 16 buffers full).
        """

    def fileno(self) -> int:
        """The socket, for an event loop."""

    def attach(
        self,
        event_loop: AbstractEventLoop,
        new_task: Callable[[Any, Context], Task[None]],
        on_suspended: Callable[[Task[None], Message], object],
        on_ended: Callable[[Task[None], Message, Any], object],
    ) -> None:
        """Let coroutine handlers run in an event loop.

        ``new_task``: makes a SpareTask of a coroutine object and a context. ``on_suspended`` is called
        when a handler waits for something, with its task, which steps it from there on. ``on_ended`` is
        called when such a handler has returned or raised, which is the third argument either way; the
        event loop passes it on to :meth:`answer`. Neither may raise.
        """

    def detach(self) -> None:
        """Undo :meth:`attach`; outside a turn. The spare task ends in the event loop's next iteration."""

    def answer(self, message: Message, result: Reply | BaseException) -> None:
        """Queue the result of a continued coroutine, or count its error. :meth:`flush` sends the reply.

        Raises what is neither an Exception nor CancelledError.
        """

    def flush(self) -> None:
        """Send what is queued, as far as the kernel takes it."""

    def take_dropped(self) -> dict[str, tuple[int, int]]:
        """Magic code to (messages dropped since the last call, its ``max_waiting``)."""

    def set_reading(self, is_reading: bool) -> None:
        """Publish in the slot whether the socket is read, or not because too many coroutines wait."""

    def beat(self) -> None:
        """Write a heartbeat: the event loop is not blocked, though it does not call :meth:`turn`."""

    @property
    def suspended(self) -> int:
        """The number of coroutines that wait."""

    @property
    def queued_replies(self) -> int:
        """The number of replies that the kernel has not taken yet."""

    def stop(self, drain_s: float = 0.0, *, hand_over: bool = False) -> None:
        """End :meth:`run` after the turn it is in; from any thread, or from a signal handler.

        ``drain_s``: before that, for at most this many seconds, serve what the socket's queue still
        holds, and send the replies that the kernel has not taken yet. ``hand_over``: only the latter,
        because a successor reads from the same socket.
        """
