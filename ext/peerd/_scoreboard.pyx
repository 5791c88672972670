"""What all processes of one supervisor know about its peers, in one anonymous shared mapping.

The supervisor makes the mapping before its first fork; every child inherits it. There is one slot a
peer. Every field but one has a single writer (the supervisor, the registrar or the peer's worker), groups of
one writer have cache lines of their own, and every field is one aligned 64-bit word: a reader sees
the old or the new value, never half of one, so nobody takes a lock, and a writer that is killed
leaves nothing held. The mapping outlives the workers, so a counter never goes back when one is
replaced. It has no name and no file: it is gone with the last process that has it.

A mapping cannot grow where others have it already. So it has room for as many slots as there may ever be,
which costs addresses and no memory (pages come when they are first written), and says in its head how
many are in use. That number only grows: a slot whose peer was scaled away keeps its counters for the next.

Rejected: a pipe a worker (a full pipe stops the writer, a dead reader kills it), files (left behind),
POSIX shared memory (a name that somebody must unlink), multiprocessing.Value (a lock that a killed
holder never releases).

``holder`` is the one field wider than a word. Its writer clears the first byte, writes the rest and
sets the first byte last, so a reader gets a whole text or, for a moment, none.
"""

cimport cython
from libc.errno cimport errno
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

cimport peerd.linux_udp as linux
from peerd.flight cimport RX_BATCH, RX_CONTROL_BYTES, TX_WINDOW, UNTOUCHED
from peerd.linux_udp cimport MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from peerd.receive cimport segments

import os
import time
from enum import IntEnum

COUNTER_NAMES = (
    "rx_datagrams",
    "rx_messages",
    "rx_bytes",
    "rx_truncated",
    "decode_empty",
    "decode_short",
    "decode_negative_length",
    "decode_length_past_end",
    "decode_not_ascii",
    "unknown_magic",
    "handler_errors",
    "handled",
    "tx_messages",
    "tx_bytes",
    "tx_dropped_full",
    "tx_dropped_too_big",
    "tx_dropped_refused",
    "tx_gso_refused",
    "icmp_errors",
    "lingers",
    "turns",
)
assert len(COUNTER_NAMES) == COUNTER_COUNT


class PeerState(IntEnum):
    STOPPED = 0
    STARTING = 1
    READY = 2
    STOPPING = 3
    BACKOFF = 4
    CRASHLOOP = 5


class RegistryState(IntEnum):
    SUSPENDED = 0
    CONNECTED = 1
    LOST = 2


cdef extern from *:
    uint64_t atomic_add "__atomic_fetch_add"(uint64_t *at, uint64_t value, int order) nogil
    const int RELAXED "__ATOMIC_RELAXED"


# Of a worker that died since its memory was corrupted, no number and no address here is to be trusted.

cdef uint64_t taken(SlotData *data):
    """With what a recvmmsg had done that nobody came to count."""
    cdef linux.mmsghdr header
    cdef uint64_t i
    cdef uint64_t count = data.counters[RX_DATAGRAMS]
    if data.flight.receiving:
        count = data.flight.rx_datagrams_before
        for i in range(min(data.flight.receiving, <uint64_t>RX_BATCH)):
            header = data.flight.rx[i]
            if header.msg_len == UNTOUCHED:
                break
            header.msg_hdr.msg_control = data.flight.rx_control[i]
            header.msg_hdr.msg_controllen = min(header.msg_hdr.msg_controllen, <size_t>RX_CONTROL_BYTES)
            count += segments(&header)
    return count


cdef uint64_t handled(SlotData *data):
    """With what a sendmmsg had done that nobody came to count."""
    cdef uint64_t i
    cdef uint64_t count = data.counters[HANDLED]
    if data.flight.sending:
        count = data.flight.handled_before
        for i in range(min(data.flight.sending, <uint64_t>TX_WINDOW)):
            if data.flight.tx[i].msg_len == UNTOUCHED:
                break
            count += data.flight.tx_datagrams[i]
    return count


@cython.final
cdef class Slot:
    def __init__(self):
        raise TypeError("a Slot belongs to a Scoreboard: use Scoreboard(n).slots")

    @property
    def pid(self):
        return self.data.pid

    @pid.setter
    def pid(self, int64_t value):
        self.data.pid = value

    @property
    def successor_pid(self):
        return self.data.successor_pid

    @successor_pid.setter
    def successor_pid(self, int64_t value):
        self.data.successor_pid = value

    @property
    def generation(self):
        return self.data.generation

    @generation.setter
    def generation(self, int64_t value):
        self.data.generation = value

    @property
    def state(self):
        return PeerState(self.data.state)

    @state.setter
    def state(self, value):
        self.data.state = PeerState(value)

    @property
    def restarts(self):
        return self.data.restarts

    @restarts.setter
    def restarts(self, int64_t value):
        self.data.restarts = value

    @property
    def since_ns(self):
        return self.data.since_ns

    @since_ns.setter
    def since_ns(self, int64_t value):
        self.data.since_ns = value

    @property
    def lost_in_flight(self):
        return self.data.lost_in_flight

    @lost_in_flight.setter
    def lost_in_flight(self, int64_t value):
        self.data.lost_in_flight = value

    @property
    def lost_unread(self):
        return self.data.lost_unread

    @lost_unread.setter
    def lost_unread(self, int64_t value):
        self.data.lost_unread = value

    @property
    def lease_id(self):
        return self.data.lease_id

    @lease_id.setter
    def lease_id(self, int64_t value):
        self.data.lease_id = value

    @property
    def registered_until_ns(self):
        return self.data.registered_until_ns

    @registered_until_ns.setter
    def registered_until_ns(self, int64_t value):
        self.data.registered_until_ns = value

    @property
    def registered(self):
        return self.data.registered_until_ns > time.monotonic_ns()

    @property
    def holder(self):
        # The last byte is never written, so the text always ends.
        return (<bytes><char *>self.data.holder).decode("utf-8", "ignore")

    @holder.setter
    def holder(self, str value not None):
        cdef bytes text = value.encode("utf-8", "replace")[: HOLDER_BYTES - 1]
        cdef const char *source = text
        cdef char *target = self.data.holder
        target[0] = 0
        memset(target + 1, 0, HOLDER_BYTES - 1)
        if len(text) > 1:
            memcpy(target + 1, source + 1, len(text) - 1)
        target[0] = source[0]

    @property
    def heartbeat_ns(self):
        return self.data.heartbeat_ns

    @property
    def log_dropped(self):
        return self.data.log_dropped

    def add_log_dropped(self, uint64_t lines):
        atomic_add(&self.data.log_dropped, lines, RELAXED)

    def histograms(self):
        cdef int i
        return {
            "batch_datagrams": [self.data.batch_datagrams[i] for i in range(BATCH_BUCKETS)],
            "turn_us": [self.data.turn_us[i] for i in range(TURN_BUCKETS)],
        }

    def counters(self):
        cdef int i
        return {COUNTER_NAMES[i]: self.data.counters[i] for i in range(COUNTER_COUNT)}

    @property
    def unfinished(self):
        return taken(self.data) - handled(self.data)

    def settle(self):
        lost = self.unfinished
        self.data.counters[RX_DATAGRAMS] = taken(self.data)
        self.data.counters[HANDLED] = self.data.counters[RX_DATAGRAMS]
        self.data.flight.receiving = self.data.flight.sending = 0
        return lost

    @property
    def progress(self):
        return self.data.heartbeat_ns, self.data.counters[RX_MESSAGES]


@cython.final
cdef class Scoreboard:
    def __init__(self, int slots, int capacity=0):
        if self._mapping != NULL:
            raise RuntimeError("a Scoreboard cannot be initialised twice")
        if slots < 1:
            raise ValueError(f"a scoreboard needs at least 1 slot, not {slots}")
        self.capacity = max(slots, capacity)
        self._mapping_bytes = sizeof(BoardData) + <size_t>self.capacity * sizeof(SlotData)
        self._mapping = mmap(
            NULL,
            self._mapping_bytes,
            PROT_READ | PROT_WRITE,
            MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE,
            -1,
            0,
        )
        if self._mapping == MAP_FAILED:
            self._mapping = NULL
            raise OSError(errno, f"mmap of the scoreboard: {os.strerror(errno)}")
        self._board = <BoardData *>self._mapping
        self._first = <SlotData *>(<char *>self._mapping + sizeof(BoardData))
        self._slots = ()
        self._board.slot_count = slots

    def __dealloc__(self):
        if self._mapping != NULL:
            munmap(self._mapping, self._mapping_bytes)

    @property
    def slots(self):
        cdef Slot slot
        cdef int i
        cdef int count = self._board.slot_count
        if len(self._slots) < count:
            made = []
            for i in range(len(self._slots), count):
                slot = Slot.__new__(Slot)
                slot.data = self._first + i
                slot.index = i
                slot._board = self
                made.append(slot)
            self._slots = (*self._slots, *made)
        return self._slots

    def grow(self, int slots):
        if slots > self.capacity:
            raise ValueError(f"this scoreboard has room for {self.capacity} slots, not {slots}")
        self._board.slot_count = max(self._board.slot_count, slots)

    @property
    def registrar_heartbeat_ns(self):
        return self._board.registrar_heartbeat_ns

    @registrar_heartbeat_ns.setter
    def registrar_heartbeat_ns(self, int64_t value):
        self._board.registrar_heartbeat_ns = value

    @property
    def registry_state(self):
        return RegistryState(self._board.registry_state)

    @registry_state.setter
    def registry_state(self, value):
        self._board.registry_state = RegistryState(value)
