"""The state of all peers of a supervisor, in one anonymous shared mapping.

The supervisor makes the mapping before its first fork; every child inherits it. There is one slot per
peer. Every field but one has a single writer (the supervisor, the registrar or the peer's worker), the
fields of each writer have their own cache lines, and every field is one aligned 64-bit word: a reader
sees the old or the new value, never half of one. So there is no lock, and a killed writer holds none. The
mapping outlives the workers, so a counter never decreases when a worker is replaced. It has no name and
no file: it ends with the last process that has it.

A mapping cannot grow once other processes have it. So it has room for the largest number of slots, which
costs addresses and no memory (the kernel adds pages when they are first written), and its head holds the
number of slots in use. That number only grows: a slot whose peer was scaled away keeps its counters.

Rejected: a pipe per worker (a full pipe blocks the writer, a dead reader kills it), files (left behind),
POSIX shared memory (its name must be unlinked), multiprocessing.Value (a killed holder never releases its
lock).

Two fields are wider than a word. The writer of ``holder`` clears the first byte, writes the rest and
sets the first byte last, so a reader gets a whole text or none. The names of ``waiting`` are written when
a loop is made, before the count of rows.
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
    "rx_own",
    "decode_empty",
    "decode_short",
    "decode_negative_length",
    "decode_length_past_end",
    "decode_not_ascii",
    "unknown_magic",
    "rx_max_waiting",
    "handler_errors",
    "handled",
    "tx_messages",
    "tx_bytes",
    "tx_dropped_full",
    "tx_dropped_too_big",
    "tx_dropped_refused",
    "tx_dropped_congested",
    "tx_loop",
    "tx_dropped_rate",
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


# A worker may have died because its memory was corrupted: no number and no address here is trusted.

cdef uint64_t taken(SlotData *data):
    """RX_DATAGRAMS, and what an interrupted recvmmsg received beyond it."""
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
    """HANDLED, and what an interrupted sendmmsg sent beyond it."""
    cdef uint64_t i
    cdef uint64_t count = data.counters[HANDLED]
    if data.flight.sending:
        count = data.flight.handled_before
        for i in range(min(data.flight.sending, <uint64_t>TX_WINDOW)):
            if data.flight.tx[i].msg_len == UNTOUCHED:
                break
            count += data.flight.tx_datagrams[i]
    return count


cdef uint64_t reads(SlotData *data):
    """Changes with each datagram that is read and each message that is handed to a handler."""
    return data.counters[RX_DATAGRAMS] + data.counters[RX_MESSAGES]


@cython.final
cdef class Word:
    """An attribute of a Slot that is one int64 of its SlotData."""

    cdef size_t offset

    def __init__(self, size_t offset):
        self.offset = offset

    def __get__(self, Slot slot, _owner):
        return self if slot is None else (<int64_t *>(<char *>slot.data + self.offset))[0]

    def __set__(self, Slot slot not None, int64_t value):
        (<int64_t *>(<char *>slot.data + self.offset))[0] = value


@cython.final
cdef class Slot:
    def __init__(self):
        raise TypeError("a Slot belongs to a Scoreboard: use Scoreboard(n).slots")

    pid = Word(<size_t>&(<SlotData *>NULL).pid)
    successor_pid = Word(<size_t>&(<SlotData *>NULL).successor_pid)
    generation = Word(<size_t>&(<SlotData *>NULL).generation)
    restarts = Word(<size_t>&(<SlotData *>NULL).restarts)
    since_ns = Word(<size_t>&(<SlotData *>NULL).since_ns)
    lost_in_flight = Word(<size_t>&(<SlotData *>NULL).lost_in_flight)
    lost_unread = Word(<size_t>&(<SlotData *>NULL).lost_unread)
    lease_id = Word(<size_t>&(<SlotData *>NULL).lease_id)
    registered_until_ns = Word(<size_t>&(<SlotData *>NULL).registered_until_ns)
    heartbeat_ns = Word(<size_t>&(<SlotData *>NULL).heartbeat_ns)
    waiting = Word(<size_t>&(<SlotData *>NULL).waiting.count)
    not_reading_since_ns = Word(<size_t>&(<SlotData *>NULL).waiting.not_reading_since_ns)
    log_dropped = Word(<size_t>&(<SlotData *>NULL).log_dropped)

    @property
    def state(self):
        return PeerState(self.data.state)

    @state.setter
    def state(self, value):
        self.data.state = PeerState(value)

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
    def waiting_by_magic(self):
        cdef Waiting *waiting = &self.data.waiting
        cdef int i
        cdef int rows = min(waiting.rows_used, <uint64_t>MAX_WAITING_ROWS)
        counts = {
            waiting.names[i][:MAX_WAITING_NAME_BYTES].rstrip(b"\0").decode("ascii", "replace"): waiting.counts[i]
            for i in range(rows)
        }
        counts[""] = waiting.counts[MAX_WAITING_ROWS]
        return {magic: count for magic, count in counts.items() if count}

    def watch_queue(self, bint has_datagrams, int64_t now_ns):
        if not has_datagrams:
            self.data.unread_since_ns = 0
        elif not self.unread_since_ns:
            self.data.unread_reads = reads(self.data)
            self.data.unread_since_ns = now_ns

    @property
    def unread_since_ns(self):
        return self.data.unread_since_ns if reads(self.data) == self.data.unread_reads else 0

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
        memset(&self.data.waiting, 0, sizeof(Waiting))
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
