"""The state of all peers of a supervisor, in one shared mapping.

It is made before the first fork and inherited, and read without a lock, a pipe or a system call. Each
field but ``log_dropped`` has one writer: the supervisor, the registrar or the peer's worker.
"""

from enum import IntEnum
from typing import Final, final

COUNTER_NAMES: Final[tuple[str, ...]]
"""The keys of :meth:`Slot.counters`."""

class PeerState(IntEnum):
    """The state of a peer's life cycle, set by the supervisor."""

    STOPPED = 0
    STARTING = 1
    READY = 2
    STOPPING = 3
    BACKOFF = 4
    CRASHLOOP = 5

class RegistryState(IntEnum):
    """The state of the registrar's connection to etcd."""

    SUSPENDED = 0
    """No answer (yet); leases may be alive."""
    CONNECTED = 1
    LOST = 2
    """A lease has expired; the record returns when etcd does."""

@final
class Slot:
    """One peer. :attr:`Scoreboard.slots` has all of them."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Raises TypeError."""

    @property
    def index(self) -> int:
        """The number of the slot, from 0."""
    pid: int
    """The process id of the worker, else 0. The supervisor writes this and the next seven."""
    successor_pid: int
    """The process id of the worker's successor during a replacement, else 0."""
    generation: int
    """The number of workers this slot has had."""
    state: PeerState
    restarts: int
    """The number of workers started because their predecessor died."""
    since_ns: int
    """CLOCK_MONOTONIC of the last change of state."""
    lost_in_flight: int
    """Datagrams that workers had read and not finished when they died."""
    lost_unread: int
    """Datagrams in the queue of a socket when it was closed."""
    lease_id: int
    """The etcd lease of the peer's record, 0 for none. The registrar writes this and the next two."""
    registered_until_ns: int
    """CLOCK_MONOTONIC when the record's lease expires, as far as the registrar knows; 0 without a record."""
    holder: str
    """The process that holds the peer id instead of this peer; at most 511 bytes of UTF-8."""
    @property
    def registered(self) -> bool:
        """Whether the record is in etcd now: False once its lease has expired."""
    heartbeat_ns: int
    """CLOCK_MONOTONIC at the worker's last turn; at most 250 ms old unless the loop is blocked."""
    @property
    def unfinished(self) -> int:
        """Datagrams that were read and not finished. Exact once the worker is dead, wherever it died;
        approximate while it lives."""
    waiting: int
    """The number of coroutine handlers that wait for something."""
    @property
    def waiting_by_magic(self) -> dict[str, int]:
        """The same per magic code, without zeros. The key ``""`` has the sum of the codes without a row of
        their own: those longer than 32 characters, and those behind the app's first 16 async handlers."""
    not_reading_since_ns: int
    """CLOCK_MONOTONIC when the worker stopped reading because too many handlers wait; else 0."""
    def settle(self) -> int:
        """Return ``unfinished`` of a dead worker and reset it, so that each loss is counted once. Reset what
        the worker has published about waiting handlers. Only the supervisor calls this."""
    @property
    def progress(self) -> tuple[int, int]:
        """A value that changes while the worker makes progress: heartbeat and messages dispatched."""
    def watch_queue(self, has_datagrams: bool, now_ns: int) -> None:
        """Record whether the socket's queue holds datagrams now. Only the supervisor does this, regularly."""
    @property
    def unread_since_ns(self) -> int:
        """CLOCK_MONOTONIC since when the queue has held datagrams without the worker reading one, as far as
        watch_queue() has seen; 0 when it has read one since, or the queue was empty."""
    log_dropped: int
    """Lines of the workers' output that were dropped because a buffer was full."""
    def add_log_dropped(self, lines: int) -> None:
        """Atomic: a worker, its successor and the supervisor may call this concurrently."""
    def histograms(self) -> dict[str, list[int]]:
        """``batch_datagrams``: datagrams per turn; ``turn_us``: microseconds per turn.

        Bucket i counts the turns with 2**i to 2**(i+1) - 1 of them; bucket 0 counts those with 0 as
        well, the last bucket all above.
        """
    def counters(self) -> dict[str, int]:
        """Every counter by name. None decreases while the mapping lives.

        ``rx_datagrams`` = ``rx_messages`` + ``rx_own`` + ``rx_truncated`` + ``decode_*``
        + ``unknown_magic`` + ``rx_max_waiting`` between two turns; ``rx_datagrams`` - ``handled`` are
        unfinished.
        """

@final
class Scoreboard:
    """The mapping. Raises ValueError for fewer than 1 slots, OSError without memory."""

    def __init__(self, slots: int, capacity: int = 0) -> None:
        """``capacity``: the number of slots it can grow to; 0 for no more than now."""
    @property
    def capacity(self) -> int: ...
    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots that are or were in use, in every process that has the mapping."""
    def grow(self, slots: int) -> None:
        """Use at least this many slots. Only the supervisor calls this. Raises ValueError above the
        capacity."""
    registry_state: RegistryState
    """Written by the registrar, and by the supervisor while no registrar runs."""
    registrar_heartbeat_ns: int
    """CLOCK_MONOTONIC of the registrar's last round."""
