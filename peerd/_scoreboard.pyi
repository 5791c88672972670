"""What all processes of a supervisor know about its peers, in one shared mapping.

Made before the first fork and inherited; read without a lock, a pipe or a system call. Each field
but ``log_dropped`` has one writer: the supervisor, the registrar or the peer's worker.
"""

from enum import IntEnum
from typing import Final, final

COUNTER_NAMES: Final[tuple[str, ...]]
"""The keys of :meth:`Slot.counters`."""

class PeerState(IntEnum):
    """Where a peer is in its life; the supervisor says so."""

    STOPPED = 0
    STARTING = 1
    READY = 2
    STOPPING = 3
    BACKOFF = 4
    CRASHLOOP = 5

class RegistryState(IntEnum):
    """What the registrar has of etcd."""

    SUSPENDED = 0
    """No answer (yet); leases may live."""
    CONNECTED = 1
    LOST = 2
    """A lease has run out; its record comes back when etcd does."""

@final
class Slot:
    """One peer. Only a :class:`Scoreboard` makes it."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Raises TypeError."""

    @property
    def index(self) -> int:
        """The number of the slot, from 0."""
    pid: int
    """The worker's process, 0 when there is none. Written by the supervisor, as are the next seven."""
    successor_pid: int
    """The process that is to take over from it, 0 when there is none."""
    generation: int
    """How many workers this slot has had."""
    state: PeerState
    restarts: int
    """How many workers were started because another had died."""
    since_ns: int
    """CLOCK_MONOTONIC of the last change of state."""
    lost_in_flight: int
    """Datagrams that workers had read and not answered when they died."""
    lost_unread: int
    """Datagrams that were in the queue of a socket when it was closed."""
    lease_id: int
    """The etcd lease of the peer's record, 0 for none. Written by the registrar, as are the next two."""
    registered_until_ns: int
    """CLOCK_MONOTONIC when the record's lease runs out, as far as the registrar knows; 0 for no record."""
    holder: str
    """Who holds the peer id instead of this peer; at most 511 bytes of UTF-8."""
    @property
    def registered(self) -> bool:
        """Whether the record is in etcd now: true of no record that nobody keeps alive."""
    @property
    def heartbeat_ns(self) -> int:
        """CLOCK_MONOTONIC at the worker's last turn; at most 250 ms old in a loop that turns."""
    @property
    def unfinished(self) -> int:
        """Datagrams that were read and not answered. Exact when the worker is dead, wherever that met it;
        of a living one it is a glance."""
    def settle(self) -> int:
        """The last value of ``unfinished`` of a worker that is dead, and from here on it is 0: it is counted
        once, however many workers come and go before the next one reads. Only the supervisor does this."""
    @property
    def progress(self) -> tuple[int, int]:
        """A value that changes as long as the worker gets on: heartbeat and messages handed out."""
    @property
    def log_dropped(self) -> int:
        """Lines that workers wrote and nobody had room for."""
    def add_log_dropped(self, lines: int) -> None:
        """Atomic: a worker, its successor and the supervisor may do this at once."""
    def histograms(self) -> dict[str, list[int]]:
        """``batch_datagrams``: datagrams a turn; ``turn_us``: microseconds a turn.

        Bucket i counts the turns with 2**i to 2**(i+1) - 1 of them, bucket 0 those with 0 as well,
        the last one those above.
        """
    def counters(self) -> dict[str, int]:
        """Every counter by name. They never go back while the mapping lives.

        ``rx_datagrams`` = ``rx_messages`` + ``rx_truncated`` + ``decode_*`` + ``unknown_magic``
        between two turns; ``rx_datagrams`` - ``handled`` is what the worker has in hand.
        """

@final
class Scoreboard:
    """The mapping. Raises ValueError for fewer than 1 slots, OSError without memory."""

    def __init__(self, slots: int, capacity: int = 0) -> None:
        """``capacity``: how many slots there may be one day; 0 for no more than now."""
    @property
    def capacity(self) -> int: ...
    @property
    def slots(self) -> tuple[Slot, ...]:
        """Those that were ever in use, in every process that has the mapping."""
    def grow(self, slots: int) -> None:
        """So many are in use, if there were fewer. Only the supervisor does this. Raises ValueError above
        the capacity."""
    registry_state: RegistryState
    """Written by the registrar, and by the supervisor while there is none."""
    registrar_heartbeat_ns: int
    """CLOCK_MONOTONIC of the registrar's last round."""
