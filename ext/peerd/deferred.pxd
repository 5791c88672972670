"""Replies that found no room on their way out, kept for a few milliseconds beside the queue.

ENOBUFS concerns one way out of the host: the queue of an interface was full, a qdisc or a filter dropped
the datagram, or the link's other end refused its size. If the reply waited at the head of the queue,
every other client would wait for it. So it moves here, and later replies to the same address follow it,
which keeps their order.

An address is tried again every RETRY_INTERVAL_NS. From the attempt number MAX_ATTEMPTS on, a failure drops
the datagram, and the next one is tried at once, because a smaller one may pass. Without a free entry, or
room in it, a reply is dropped without another attempt, as the kernel does by default.

Rejected: skipping such replies within the queue, because they would hold its memory, and a full queue
drops the replies to other addresses.

Nothing here touches Python or the socket.
"""

from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memcmp, memcpy

cimport peerd.linux_udp as linux
from peerd.destination cimport Destination

cdef enum:
    MAX_DEFERRED_ADDRESSES = 32
    MAX_DEFERRED_DATAGRAMS = 256  # per address
    DEFERRED_BYTES = 65536  # per address: the largest run fits
    MAX_ATTEMPTS = 5
    RETRY_INTERVAL_NS = 1000000

cdef struct Entry:
    Destination destination
    linux.socklen_t address_bytes
    unsigned int first  # of the datagrams that are left
    unsigned int end  # 0: the entry is free
    size_t used_bytes
    int attempts
    int64_t retry_at_ns
    linux.iovec datagrams[MAX_DEFERRED_DATAGRAMS]
    uint8_t bytes[DEFERRED_BYTES]

cdef struct Deferred:
    Entry *entries
    unsigned int datagrams


cdef inline bint deferred_open(Deferred *deferred) noexcept nogil:
    """False without memory."""
    deferred.entries = <Entry *>linux.untouched_pages(MAX_DEFERRED_ADDRESSES * sizeof(Entry))
    deferred.datagrams = 0
    return deferred.entries != NULL


cdef inline void deferred_close(Deferred *deferred) noexcept nogil:
    linux.free_pages(deferred.entries, MAX_DEFERRED_ADDRESSES * sizeof(Entry))


cdef inline void deferred_clear(Deferred *deferred) noexcept nogil:
    cdef int i
    deferred.datagrams = 0
    for i in range(MAX_DEFERRED_ADDRESSES):
        deferred.entries[i].end = 0


cdef inline Entry *entry_of(Deferred *deferred, const Destination *destination) noexcept nogil:
    """The entry of a destination, NULL when none of its replies is here."""
    cdef int i
    if deferred.datagrams == 0:
        return NULL
    for i in range(MAX_DEFERRED_ADDRESSES):
        if deferred.entries[i].end and (
            memcmp(&deferred.entries[i].destination, destination, sizeof(Destination)) == 0
        ):
            return &deferred.entries[i]
    return NULL


cdef inline Entry *new_entry(
    Deferred *deferred, const Destination *destination, linux.socklen_t address_bytes, int64_t now_ns
) noexcept nogil:
    """An entry after its first failed attempt; NULL when all are in use. A datagram has to follow."""
    cdef Entry *entry
    cdef int i
    for i in range(MAX_DEFERRED_ADDRESSES):
        entry = &deferred.entries[i]
        if entry.end == 0:
            entry.destination = destination[0]
            entry.address_bytes = address_bytes
            entry.first = 0
            entry.used_bytes = 0
            entry.attempts = 1
            entry.retry_at_ns = now_ns + RETRY_INTERVAL_NS
            return entry
    return NULL


cdef inline bint defer(Deferred *deferred, Entry *entry, const linux.iovec *datagram) noexcept nogil:
    """Copy a datagram into the entry. False without room."""
    cdef uint8_t *at
    if entry.end == MAX_DEFERRED_DATAGRAMS or entry.used_bytes + datagram.iov_len > DEFERRED_BYTES:
        return False
    at = entry.bytes + entry.used_bytes
    memcpy(at, datagram.iov_base, datagram.iov_len)
    entry.datagrams[entry.end].iov_base = at
    entry.datagrams[entry.end].iov_len = datagram.iov_len
    entry.used_bytes += datagram.iov_len
    entry.end += 1
    deferred.datagrams += 1
    return True


cdef inline void datagrams_done(Deferred *deferred, Entry *entry, unsigned int count) noexcept nogil:
    """The first ``count`` were sent or dropped; an empty entry is free."""
    deferred.datagrams -= count
    entry.first += count
    if entry.first == entry.end:
        entry.end = 0
