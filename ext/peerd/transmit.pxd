"""Sending replies: an arena, runs of equal size, one sendmmsg.

A reply is copied into the arena, and its address beside it, so nothing else need live until it is
sent. Neighbours to one address of one size (the last may be shorter) make a run, which leaves as one
UDP_SEGMENT send (udp(7)): the kernel's path is then walked once for up to 64 datagrams.

What the kernel does not take now (EAGAIN, ENOBUFS, ENOMEM) stays in the arena, which is the bounded
queue: when it is full, further replies are dropped and counted. A run that the kernel refuses (EIO: a
device without checksum offload; EINVAL, since Linux 6.14 EMSGSIZE: larger than the path's MTU) is sent in pieces, and its address
gets no runs any more. An ICMP error that was pending on the socket is reported by the send that comes
next and says nothing about it, so that send is tried again.

Nothing here touches Python.
"""

from libc.errno cimport (
    EAGAIN,
    EINTR,
    EINVAL,
    EIO,
    EMSGSIZE,
    ENOBUFS,
    ENOMEM,
    errno,
)
from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.string cimport memcmp, memcpy

cimport peerd.linux_udp as linux
from peerd._scoreboard cimport (
    HANDLED,
    TX_BYTES,
    TX_DROPPED_FULL,
    TX_DROPPED_REFUSED,
    TX_DROPPED_TOO_BIG,
    TX_GSO_REFUSED,
    TX_MESSAGES,
)
from peerd.flight cimport TX_WINDOW, UNTOUCHED, Flight, store_barrier
from peerd.icmp cimport may_be_icmp
from peerd.pages cimport free_pages, untouched_pages

cdef enum:
    # 65,535 less the IPv4 (20) and UDP (8) headers: RFC 768, RFC 791.
    MAX_DATAGRAM_BYTES = 65507
    TX_RUNS = 1024
    TX_ARENA_BYTES = 1 << 18
    # UDP_MAX_SEGMENTS of kernels before 6.9; newer ones allow 128.
    TX_SEGMENTS = 64
    # Addresses that refuse runs, before runs are given up altogether.
    TX_REFUSING = 64
    TX_ADDRESS_BYTES = sizeof(linux.sockaddr_in6)
    # CMSG_SPACE(sizeof(uint16_t)), which C does not call a constant.
    TX_CONTROL_BYTES = 24
    TX_RETRIES = 3

cdef struct Run:
    uint16_t count
    uint16_t segment_bytes
    bint is_open  # takes more datagrams of the same size

cdef struct Transmitter:
    int fd
    bint gso
    uint64_t *counters
    Flight *flight
    uint8_t *arena
    size_t arena_used
    size_t pages_bytes  # of the mapping that begins with the arena
    linux.mmsghdr *headers
    linux.iovec *vectors
    uint8_t *addresses
    uint8_t *control
    Run *runs
    unsigned int prepared  # headers that point where they should; the others are untouched memory
    unsigned int first  # of the runs not sent yet
    unsigned int end
    unsigned int queued  # datagrams in them
    bint met_icmp_error  # one may wait in the socket's error queue; who reads it says so here
    int blocked  # the errno that stopped the last flush, 0 when it did not stop
    uint8_t refusing[TX_REFUSING][TX_ADDRESS_BYTES]
    unsigned int refusing_count
    linux.mmsghdr pieces[TX_SEGMENTS]
    linux.iovec piece_vectors[TX_SEGMENTS]


cdef inline bint transmitter_open(
    Transmitter *tx, int fd, bint gso, uint64_t *counters, Flight *flight
) noexcept nogil:
    """False without memory. Pages that no reply ever reaches cost none."""
    cdef int i
    tx.fd = fd
    tx.gso = gso
    tx.counters = counters
    tx.flight = flight
    flight.sending = 0
    tx.prepared = 0
    # The arena, then what each run has, from the strictest alignment to none.
    tx.pages_bytes = TX_ARENA_BYTES + TX_RUNS * (
        sizeof(linux.mmsghdr) + sizeof(linux.iovec) + sizeof(Run) + TX_CONTROL_BYTES + TX_ADDRESS_BYTES
    )
    tx.arena = <uint8_t *>untouched_pages(tx.pages_bytes)
    if tx.arena == NULL:
        return False
    tx.headers = <linux.mmsghdr *>(tx.arena + TX_ARENA_BYTES)
    tx.vectors = <linux.iovec *>(tx.headers + TX_RUNS)
    tx.runs = <Run *>(tx.vectors + TX_RUNS)
    tx.control = <uint8_t *>(tx.runs + TX_RUNS)
    tx.addresses = tx.control + TX_RUNS * TX_CONTROL_BYTES
    for i in range(TX_SEGMENTS):
        tx.pieces[i].msg_hdr.msg_iov = &tx.piece_vectors[i]
        tx.pieces[i].msg_hdr.msg_iovlen = 1
    return True


cdef inline void transmitter_close(Transmitter *tx) noexcept nogil:
    free_pages(tx.arena, tx.pages_bytes)


cdef inline void prepare_header(Transmitter *tx, unsigned int i) noexcept nogil:
    cdef linux.cmsghdr *control = <linux.cmsghdr *>(tx.control + i * TX_CONTROL_BYTES)
    tx.headers[i].msg_hdr.msg_iov = &tx.vectors[i]
    tx.headers[i].msg_hdr.msg_iovlen = 1
    tx.headers[i].msg_hdr.msg_name = tx.addresses + i * TX_ADDRESS_BYTES
    control.cmsg_level = linux.SOL_UDP
    control.cmsg_type = linux.UDP_SEGMENT
    control.cmsg_len = linux.CMSG_LEN(sizeof(uint16_t))


cdef inline bint refuses_runs(Transmitter *tx, const void *address) noexcept nogil:
    cdef unsigned int i
    for i in range(tx.refusing_count):
        if memcmp(tx.refusing[i], address, TX_ADDRESS_BYTES) == 0:
            return True
    return False


cdef inline uint8_t *extend_run(Transmitter *tx, size_t size, const void *address) noexcept nogil:
    """Room behind the last run if the datagram fits it, else NULL."""
    cdef unsigned int last = tx.end - 1
    cdef Run *run = &tx.runs[last]
    cdef linux.iovec *vector = &tx.vectors[last]
    cdef uint8_t *at
    if (
        not run.is_open
        or size > run.segment_bytes
        or run.count == TX_SEGMENTS
        or vector.iov_len + size > MAX_DATAGRAM_BYTES
        or tx.arena_used + size > TX_ARENA_BYTES
        or memcmp(tx.addresses + last * TX_ADDRESS_BYTES, address, TX_ADDRESS_BYTES) != 0
    ):
        return NULL
    at = tx.arena + tx.arena_used
    run.count += 1
    run.is_open = size == run.segment_bytes
    vector.iov_len += size
    tx.arena_used += size
    tx.queued += 1
    return at


cdef inline uint8_t *transmit_room(
    Transmitter *tx, size_t size, const void *address, linux.socklen_t address_bytes
) noexcept nogil:
    """Where to write a datagram of 1 to MAX_DATAGRAM_BYTES bytes; NULL when it must be flushed first.

    ``address`` has TX_ADDRESS_BYTES bytes, zero behind ``address_bytes``.
    """
    cdef uint8_t *at
    cdef unsigned int i = tx.end
    if tx.gso and i > tx.first:
        at = extend_run(tx, size, address)
        if at != NULL:
            return at
    if i == TX_RUNS or tx.arena_used + size > TX_ARENA_BYTES:
        return NULL
    if i == tx.prepared:
        prepare_header(tx, i)
        tx.prepared += 1
    at = tx.arena + tx.arena_used
    memcpy(tx.addresses + i * TX_ADDRESS_BYTES, address, TX_ADDRESS_BYTES)
    tx.headers[i].msg_hdr.msg_namelen = address_bytes
    tx.vectors[i].iov_base = at
    tx.vectors[i].iov_len = size
    tx.runs[i].count = 1
    tx.runs[i].segment_bytes = <uint16_t>size
    tx.runs[i].is_open = tx.gso and not refuses_runs(tx, address)
    tx.arena_used += size
    tx.end = i + 1
    tx.queued += 1
    return at


cdef inline void close_runs(Transmitter *tx) noexcept nogil:
    """Write the control message of each unsent run that is one; none of them grows any more."""
    cdef unsigned int i
    cdef linux.msghdr *header
    for i in range(tx.first, tx.end):
        header = &tx.headers[i].msg_hdr
        tx.runs[i].is_open = False
        if tx.runs[i].count > 1:
            header.msg_control = tx.control + i * TX_CONTROL_BYTES
            header.msg_controllen = TX_CONTROL_BYTES
            memcpy(
                linux.CMSG_DATA(<linux.cmsghdr *>header.msg_control),
                &tx.runs[i].segment_bytes,
                sizeof(uint16_t),
            )
        else:
            header.msg_control = NULL
            header.msg_controllen = 0


cdef inline void count_sent(Transmitter *tx, unsigned int messages, size_t sent_bytes) noexcept nogil:
    tx.counters[TX_MESSAGES] += messages
    tx.counters[TX_BYTES] += sent_bytes
    tx.counters[HANDLED] += messages
    tx.queued -= messages


cdef inline bint is_not_now(int error) noexcept nogil:
    return error == EAGAIN or error == ENOBUFS or error == ENOMEM


cdef inline void drop_one(Transmitter *tx, int error) noexcept nogil:
    """This datagram cannot be sent (port 0, no route, too big); the next may."""
    tx.counters[TX_DROPPED_TOO_BIG if error == EMSGSIZE else TX_DROPPED_REFUSED] += 1
    tx.counters[HANDLED] += 1
    tx.queued -= 1


cdef inline void drop_queued(Transmitter *tx) noexcept nogil:
    tx.counters[TX_DROPPED_FULL] += tx.queued
    tx.queued = tx.first = tx.end = 0
    tx.arena_used = 0


cdef inline int send_window(
    Transmitter *tx, linux.mmsghdr *headers, unsigned int count, const Run *runs
) noexcept nogil:
    """sendmmsg of at most TX_WINDOW messages, from the scoreboard; ``runs``: NULL for single datagrams.

    Who counts what was sent ends the flight then: see flight_ended.
    """
    cdef Flight *flight = tx.flight
    cdef unsigned int i
    memcpy(flight.tx, headers, count * sizeof(linux.mmsghdr))
    for i in range(count):
        flight.tx[i].msg_len = UNTOUCHED
        flight.tx_datagrams[i] = runs[i].count if runs != NULL else 1
    flight.handled_before = tx.counters[HANDLED]
    store_barrier()
    flight.sending = count
    return linux.sendmmsg(tx.fd, flight.tx, count, linux.MSG_DONTWAIT)


cdef inline void flight_ended(Transmitter *tx) noexcept nogil:
    store_barrier()
    tx.flight.sending = 0


cdef inline bint send_in_pieces(Transmitter *tx, unsigned int index) noexcept nogil:
    """Send the rest of a run one datagram at a time. False when it has to wait; then the run is what is left."""
    cdef Run *run = &tx.runs[index]
    cdef linux.iovec *vector = &tx.vectors[index]
    cdef uint8_t *at = <uint8_t *>vector.iov_base
    cdef size_t left = vector.iov_len
    cdef size_t size
    cdef int i, sent, error
    cdef int done = 0
    cdef int count = run.count
    cdef int retries = 0
    for i in range(count):
        size = run.segment_bytes if run.segment_bytes < left else left
        tx.piece_vectors[i].iov_base = at
        tx.piece_vectors[i].iov_len = size
        tx.pieces[i].msg_hdr.msg_name = tx.headers[index].msg_hdr.msg_name
        tx.pieces[i].msg_hdr.msg_namelen = tx.headers[index].msg_hdr.msg_namelen
        at += size
        left -= size
    while done < count:
        # A run has no more pieces than a window has room for.
        sent = send_window(tx, &tx.pieces[done], count - done, NULL)
        error = errno
        if sent > 0:
            tx.met_icmp_error |= sent < count - done
            for i in range(done, done + sent):
                count_sent(tx, 1, tx.piece_vectors[i].iov_len)
            done += sent
            retries = 0
        flight_ended(tx)
        if sent > 0:
            continue
        elif error == EINTR:
            continue
        elif is_not_now(error):
            tx.blocked = error
            run.count = <uint16_t>(count - done)
            vector.iov_len = <size_t>(<uint8_t *>vector.iov_base + vector.iov_len
                                      - <uint8_t *>tx.piece_vectors[done].iov_base)
            vector.iov_base = tx.piece_vectors[done].iov_base
            return False
        elif may_be_icmp(error) and retries < TX_RETRIES:
            retries += 1
            tx.met_icmp_error = True
        else:
            drop_one(tx, error)
            done += 1
            retries = 0
    return True


cdef inline void refuse_runs(Transmitter *tx, const void *address) noexcept nogil:
    tx.counters[TX_GSO_REFUSED] += 1
    if refuses_runs(tx, address):
        return
    if tx.refusing_count == TX_REFUSING:
        tx.gso = False
        return
    memcpy(tx.refusing[tx.refusing_count], address, TX_ADDRESS_BYTES)
    tx.refusing_count += 1


cdef inline void transmit(Transmitter *tx) noexcept nogil:
    """Give every queued datagram to the kernel, or count why not; ``blocked`` says what stopped it."""
    cdef int sent, error
    cdef int i
    cdef int retries = 0
    cdef unsigned int asked
    cdef uint64_t sent_before
    cdef bint done
    cdef Run *run
    close_runs(tx)
    tx.blocked = 0
    while tx.first < tx.end:
        run = &tx.runs[tx.first]
        if run.count > 1 and tx.refusing_count and refuses_runs(
            tx, tx.addresses + tx.first * TX_ADDRESS_BYTES
        ):
            if not send_in_pieces(tx, tx.first):
                return
            tx.first += 1
            retries = 0
            continue
        asked = min(tx.end - tx.first, <unsigned int>TX_WINDOW)
        sent = send_window(tx, &tx.headers[tx.first], asked, run)
        error = errno
        if sent > 0:
            # A short count hides the error that made it short (sendmmsg(2), BUGS).
            tx.met_icmp_error |= <unsigned int>sent < asked
            for i in range(sent):
                count_sent(tx, tx.runs[tx.first].count, tx.vectors[tx.first].iov_len)
                tx.first += 1
            retries = 0
        flight_ended(tx)
        if sent > 0:
            continue
        elif error == EINTR:
            continue
        elif is_not_now(error):
            tx.blocked = error
            return
        elif may_be_icmp(error) and retries < TX_RETRIES:
            retries += 1
            tx.met_icmp_error = True
        elif run.count > 1:
            # EIO, EINVAL and EMSGSIZE, as said above, if pieces are taken: an address that takes nothing
            # (port 0, which a request may come from) must not use up the table.
            sent_before = tx.counters[TX_MESSAGES]
            done = send_in_pieces(tx, tx.first)
            if tx.counters[TX_MESSAGES] > sent_before and (
                error == EIO or error == EINVAL or error == EMSGSIZE
            ):
                refuse_runs(tx, tx.addresses + tx.first * TX_ADDRESS_BYTES)
            if not done:
                return
            tx.first += 1
            retries = 0
        else:
            drop_one(tx, error)
            tx.first += 1
            retries = 0
    tx.first = tx.end = 0
    tx.arena_used = 0
