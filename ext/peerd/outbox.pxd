"""Replies on their way to the kernel, and the count of datagrams that are finished.

HANDLED grows when a datagram needs nothing more: its reply was given to the kernel or dropped, or its
handler returned none. So a dispatched datagram is unfinished while its reply is queued, while it waits in
a batch, or while its coroutine waits.
"""

from libc.errno cimport EAGAIN, EMSGSIZE
from libc.stdint cimport uint8_t, uint64_t

cimport peerd.linux_udp as linux
from peerd._scoreboard cimport HANDLED, RX_DATAGRAMS, SlotData
from peerd.destination cimport Destination
from peerd.loop_guard cimport Guard, guard_close
from peerd.transmit cimport (
    DROP_FULL, DROP_TOO_BIG, MAX_DATAGRAM_BYTES, Transmitter, count_drops, drop_queued, transmit,
    transmit_room, transmitter_close, transmitter_open,
)

cdef struct Outbox:
    Transmitter tx
    Guard guard
    uint64_t *counters
    uint64_t processed  # datagrams that were dispatched; those counted below are among them
    uint64_t batched  # messages in the batches of this turn
    uint64_t suspended  # coroutines that wait


cdef inline bint outbox_open(Outbox *outbox, int fd, bint gso, SlotData *stats) noexcept nogil:
    """False without memory."""
    outbox.counters = stats.counters
    outbox.processed = outbox.counters[HANDLED] = outbox.counters[RX_DATAGRAMS]
    return transmitter_open(&outbox.tx, fd, gso, stats.counters, &stats.flight)


cdef inline void outbox_close(Outbox *outbox) noexcept nogil:
    transmitter_close(&outbox.tx)
    guard_close(&outbox.guard)


cdef inline void count_handled(Outbox *outbox) noexcept nogil:
    outbox.counters[HANDLED] = (
        outbox.processed - outbox.tx.queued - outbox.batched - outbox.suspended
    )


cdef inline void flush(Outbox *outbox) noexcept:
    """Send what is queued, as far as the kernel takes it."""
    if outbox.tx.queued:
        # transmit() adds to this count.
        count_handled(outbox)
        with nogil:
            transmit(&outbox.tx)
    count_handled(outbox)


cdef inline void drop_replies(Outbox *outbox) noexcept nogil:
    """Count what is queued as dropped."""
    drop_queued(&outbox.tx)
    count_handled(outbox)


cdef inline uint8_t *room(
    Outbox *outbox, size_t size, const Destination *destination, linux.socklen_t address_bytes
) noexcept:
    """Where to write a reply of ``size`` bytes; NULL when it was counted as dropped instead.

    The address is as for transmit_room.
    """
    cdef uint8_t *at
    if size > MAX_DATAGRAM_BYTES:
        count_drops(&outbox.tx, DROP_TOO_BIG, 1, EMSGSIZE, destination)
        return NULL
    at = transmit_room(&outbox.tx, size, destination, address_bytes)
    if at == NULL:
        flush(outbox)
        at = transmit_room(&outbox.tx, size, destination, address_bytes)
        if at == NULL:
            count_drops(&outbox.tx, DROP_FULL, 1, EAGAIN, destination)
    return at
