"""Sending replies: an arena, runs of equal size, one sendmmsg.

A reply is copied into the arena, and its address beside it, so no object has to live until it is sent.
Neighbours of one size to one address (the last may be shorter) make a run, which leaves as one
UDP_SEGMENT send (udp(7)): the kernel walks its path once for up to 64 datagrams.

An error of sendmmsg concerns one of these:

- The socket: EAGAIN, its send buffer is full. All replies wait in the arena, which is the bounded queue;
  when the arena is full, further replies are dropped and counted.
- One way out of the host: ENOBUFS and ENOMEM. The reply is tried again for a few milliseconds while the
  replies to other addresses are sent (deferred.pxd). An interface's full queue is reported as ENOBUFS
  because the socket has IP_RECVERR; without it the kernel drops the datagram and reports success.
- A run: EIO from a device without checksum offload; EINVAL, since Linux 6.14 EMSGSIZE, for a segment above
  the path's MTU. The run is sent in pieces, and its address gets no more runs.
- An earlier datagram: an ICMP error that was pending on the socket (icmp.pxd). The send is tried again.
- This datagram: everything else, such as port 0, no route, a firewall's rule. It is dropped.

Drops are counted by reason. Of each reason, the address and errno of one drop are kept for the log.

Nothing here touches Python.
"""

from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, EMSGSIZE, ENOBUFS, ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint64_t
from libc.string cimport memcmp, memcpy

cimport peerd.linux_udp as linux
from peerd._scoreboard cimport HANDLED, TX_BYTES, TX_DROPPED_FULL, TX_GSO_REFUSED, TX_MESSAGES
from peerd.deferred cimport (
    MAX_ATTEMPTS, MAX_DEFERRED_ADDRESSES, RETRY_INTERVAL_NS, Deferred, Entry, datagrams_done, defer,
    deferred_clear, deferred_close, deferred_open, entry_of, new_entry,
)
from peerd.destination cimport LOCAL_CONTROL_BYTES, Destination, has_local, write_local
from peerd.flight cimport TX_WINDOW, UNTOUCHED, Flight, store_barrier
from peerd.icmp cimport may_be_icmp

cdef enum:
    # 65,535 less the IPv4 (20) and UDP (8) headers: RFC 768, RFC 791.
    MAX_DATAGRAM_BYTES = 65507
    TX_RUNS = 1024
    TX_ARENA_BYTES = 1 << 18
    # UDP_MAX_SEGMENTS of kernels before 6.9; newer ones allow 128.
    TX_SEGMENTS = 64
    # Addresses that refuse runs, before runs are given up altogether.
    TX_REFUSING = 64
    # CMSG_SPACE(sizeof(uint16_t)), which C does not call a constant.
    SEGMENT_CONTROL_BYTES = 24
    TX_CONTROL_BYTES = SEGMENT_CONTROL_BYTES + LOCAL_CONTROL_BYTES
    TX_RETRIES = 3

# In the order of the scoreboard's counters.
cdef enum DropReason:
    DROP_FULL
    DROP_TOO_BIG
    DROP_REFUSED
    DROP_CONGESTED
    DROP_LOOP
    DROP_RATE
    DROP_REASONS

# The drops that were not reported yet: how many, and the errno (0: none) and address of the first.
cdef struct Drops:
    uint64_t count
    int error
    linux.sockaddr_in6 address

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
    Destination *destinations
    int family  # of a socket whose replies name their local address; else 0
    uint64_t pieces_control[5]  # LOCAL_CONTROL_BYTES, aligned for a cmsghdr
    uint8_t *control
    Run *runs
    unsigned int prepared  # headers that point where they should; the others are untouched memory
    unsigned int first  # of the runs not sent yet
    unsigned int end
    unsigned int queued  # datagrams in them, and the deferred ones
    Deferred deferred
    int64_t (*clock_ns)() noexcept nogil
    bint met_icmp_error  # one may wait in the socket's error queue; its reader clears this
    int blocked  # why the last flush left something: EAGAIN, or ENOBUFS for deferred replies; else 0
    bint has_drops
    Drops drops[DROP_REASONS]
    Destination refusing[TX_REFUSING]
    unsigned int refusing_count
    linux.mmsghdr pieces[TX_WINDOW]
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
    tx.clock_ns = linux.monotonic_ns
    tx.family = 0
    # The arena, then what each run has, from the strictest alignment to none.
    tx.pages_bytes = TX_ARENA_BYTES + TX_RUNS * (
        sizeof(linux.mmsghdr) + sizeof(linux.iovec) + sizeof(Run) + TX_CONTROL_BYTES + sizeof(Destination)
    )
    tx.arena = <uint8_t *>linux.untouched_pages(tx.pages_bytes)
    if tx.arena == NULL or not deferred_open(&tx.deferred):
        return False
    tx.headers = <linux.mmsghdr *>(tx.arena + TX_ARENA_BYTES)
    tx.vectors = <linux.iovec *>(tx.headers + TX_RUNS)
    tx.runs = <Run *>(tx.vectors + TX_RUNS)
    tx.control = <uint8_t *>(tx.runs + TX_RUNS)
    tx.destinations = <Destination *>(tx.control + TX_RUNS * TX_CONTROL_BYTES)
    for i in range(TX_WINDOW):
        tx.pieces[i].msg_hdr.msg_iovlen = 1
    return True


cdef inline void transmitter_close(Transmitter *tx) noexcept nogil:
    linux.free_pages(tx.arena, tx.pages_bytes)
    deferred_close(&tx.deferred)


cdef inline void prepare_header(Transmitter *tx, unsigned int i) noexcept nogil:
    cdef linux.cmsghdr *control = <linux.cmsghdr *>(tx.control + i * TX_CONTROL_BYTES)
    tx.headers[i].msg_hdr.msg_iov = &tx.vectors[i]
    tx.headers[i].msg_hdr.msg_iovlen = 1
    tx.headers[i].msg_hdr.msg_name = &tx.destinations[i]
    control.cmsg_level = linux.SOL_UDP
    control.cmsg_type = linux.UDP_SEGMENT
    control.cmsg_len = linux.CMSG_LEN(sizeof(uint16_t))


cdef inline bint refuses_runs(Transmitter *tx, const Destination *destination) noexcept nogil:
    cdef unsigned int i
    for i in range(tx.refusing_count):
        if memcmp(&tx.refusing[i], destination, sizeof(Destination)) == 0:
            return True
    return False


cdef inline uint8_t *extend_run(Transmitter *tx, size_t size, const Destination *destination) noexcept nogil:
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
        or memcmp(&tx.destinations[last], destination, sizeof(Destination)) != 0
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
    Transmitter *tx, size_t size, const Destination *destination, linux.socklen_t address_bytes
) noexcept nogil:
    """Where to write a datagram of 1 to MAX_DATAGRAM_BYTES bytes; NULL when it must be flushed first.

    ``address_bytes``: those of the destination's address that are one.
    """
    cdef uint8_t *at
    cdef unsigned int i = tx.end
    if tx.gso and i > tx.first:
        at = extend_run(tx, size, destination)
        if at != NULL:
            return at
    if i == TX_RUNS or tx.arena_used + size > TX_ARENA_BYTES:
        return NULL
    if i == tx.prepared:
        prepare_header(tx, i)
        tx.prepared += 1
    at = tx.arena + tx.arena_used
    tx.destinations[i] = destination[0]
    tx.headers[i].msg_hdr.msg_namelen = address_bytes
    tx.vectors[i].iov_base = at
    tx.vectors[i].iov_len = size
    tx.runs[i].count = 1
    tx.runs[i].segment_bytes = <uint16_t>size
    tx.runs[i].is_open = tx.gso and not refuses_runs(tx, destination)
    tx.arena_used += size
    tx.end = i + 1
    tx.queued += 1
    return at


cdef inline void close_runs(Transmitter *tx) noexcept nogil:
    """Write the control messages of the unsent runs; none of them grows any more."""
    cdef unsigned int i
    cdef linux.msghdr *header
    cdef uint8_t *control
    for i in range(tx.first, tx.end):
        header = &tx.headers[i].msg_hdr
        control = tx.control + i * TX_CONTROL_BYTES
        tx.runs[i].is_open = False
        header.msg_control = NULL
        header.msg_controllen = 0
        if tx.runs[i].count > 1:
            header.msg_control = control
            header.msg_controllen = SEGMENT_CONTROL_BYTES
            memcpy(
                linux.CMSG_DATA(<linux.cmsghdr *>control), &tx.runs[i].segment_bytes, sizeof(uint16_t)
            )
        if tx.family and has_local(&tx.destinations[i]):
            control += SEGMENT_CONTROL_BYTES
            if header.msg_control == NULL:
                header.msg_control = control
            header.msg_controllen += write_local(tx.family, &tx.destinations[i].local, control)


cdef inline void count_sent(Transmitter *tx, unsigned int messages, size_t sent_bytes) noexcept nogil:
    tx.counters[TX_MESSAGES] += messages
    tx.counters[TX_BYTES] += sent_bytes
    tx.counters[HANDLED] += messages
    tx.queued -= messages


cdef inline bint has_no_room(int error) noexcept nogil:
    return error == ENOBUFS or error == ENOMEM


cdef inline void count_drops(
    Transmitter *tx, DropReason reason, unsigned int datagrams, int error, const Destination *destination
) noexcept nogil:
    """Of replies that are not queued."""
    cdef Drops *drops = &tx.drops[<int>reason]
    tx.counters[TX_DROPPED_FULL + <int>reason] += datagrams
    if drops.count == 0:
        drops.error = error
        drops.address = destination.address
    drops.count += datagrams
    tx.has_drops = True


cdef inline void drop(Transmitter *tx, int error, const Destination *destination) noexcept nogil:
    """A queued datagram that cannot be sent."""
    cdef DropReason reason = DROP_REFUSED
    if has_no_room(error):
        reason = DROP_CONGESTED
    elif error == EMSGSIZE:
        reason = DROP_TOO_BIG
    count_drops(tx, reason, 1, error, destination)
    tx.counters[HANDLED] += 1
    tx.queued -= 1


cdef inline void drop_queued(Transmitter *tx) noexcept nogil:
    tx.counters[TX_DROPPED_FULL + <int>DROP_CONGESTED] += tx.deferred.datagrams
    tx.counters[TX_DROPPED_FULL] += tx.queued - tx.deferred.datagrams
    tx.queued = tx.first = tx.end = 0
    tx.arena_used = 0
    if tx.deferred.datagrams:
        deferred_clear(&tx.deferred)


cdef inline int send_window(
    Transmitter *tx, linux.mmsghdr *headers, unsigned int count, const Run *runs
) noexcept nogil:
    """sendmmsg of at most TX_WINDOW messages, from the scoreboard; ``runs``: NULL for single datagrams.

    The caller ends the flight when it has counted what was sent: see flight_ended.
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


cdef inline int send_in_pieces(
    Transmitter *tx,
    linux.iovec *pieces,
    unsigned int count,
    Destination *destination,
    linux.socklen_t address_bytes,
    unsigned int *done,
) noexcept nogil:
    """Send datagrams to one address, one by one; ``done``: how many were sent or dropped.

    0 when all are; else EAGAIN, ENOBUFS or ENOMEM, which the next one has met.
    """
    cdef int sent, error
    cdef unsigned int i, asked
    cdef int retries = 0
    cdef size_t control_bytes = 0
    if tx.family and has_local(destination):
        control_bytes = write_local(tx.family, &destination.local, tx.pieces_control)
    for i in range(<unsigned int>TX_WINDOW if count > TX_WINDOW else count):
        tx.pieces[i].msg_hdr.msg_name = &destination.address
        tx.pieces[i].msg_hdr.msg_namelen = address_bytes
        tx.pieces[i].msg_hdr.msg_control = tx.pieces_control if control_bytes else NULL
        tx.pieces[i].msg_hdr.msg_controllen = control_bytes
    done[0] = 0
    while done[0] < count:
        asked = min(count - done[0], <unsigned int>TX_WINDOW)
        for i in range(asked):
            tx.pieces[i].msg_hdr.msg_iov = &pieces[done[0] + i]
        sent = send_window(tx, tx.pieces, asked, NULL)
        error = errno
        if sent > 0:
            tx.met_icmp_error |= <unsigned int>sent < asked
            for i in range(<unsigned int>sent):
                count_sent(tx, 1, pieces[done[0] + i].iov_len)
            done[0] += sent
            retries = 0
        flight_ended(tx)
        if sent > 0 or error == EINTR:
            continue
        elif error == EAGAIN or has_no_room(error):
            return error
        elif may_be_icmp(error) and retries < TX_RETRIES:
            retries += 1
            tx.met_icmp_error = True
        else:
            drop(tx, error, destination)
            done[0] += 1
            retries = 0
    return 0


cdef inline void cut_first_run(Transmitter *tx) noexcept nogil:
    """Write its datagrams to ``piece_vectors``."""
    cdef Run *run = &tx.runs[tx.first]
    cdef uint8_t *at = <uint8_t *>tx.vectors[tx.first].iov_base
    cdef size_t left = tx.vectors[tx.first].iov_len
    cdef size_t size
    cdef int i
    for i in range(run.count):
        size = run.segment_bytes if run.segment_bytes < left else left
        tx.piece_vectors[i].iov_base = at
        tx.piece_vectors[i].iov_len = size
        at += size
        left -= size


cdef inline int send_first_run_in_pieces(Transmitter *tx) noexcept nogil:
    """Returns as send_in_pieces does; then the first run is what is left of it."""
    cdef Run *run = &tx.runs[tx.first]
    cdef linux.iovec *vector = &tx.vectors[tx.first]
    cdef linux.msghdr *header = &tx.headers[tx.first].msg_hdr
    cdef unsigned int done
    cdef int error
    cut_first_run(tx)
    error = send_in_pieces(
        tx, tx.piece_vectors, run.count, &tx.destinations[tx.first], header.msg_namelen, &done
    )
    if error:
        vector.iov_len -= <uint8_t *>tx.piece_vectors[done].iov_base - <uint8_t *>vector.iov_base
        vector.iov_base = tx.piece_vectors[done].iov_base
        run.count -= <uint16_t>done
    return error


cdef inline void refuse_runs(Transmitter *tx, const Destination *destination) noexcept nogil:
    tx.counters[TX_GSO_REFUSED] += 1
    if refuses_runs(tx, destination):
        return
    if tx.refusing_count == TX_REFUSING:
        tx.gso = False
        return
    tx.refusing[tx.refusing_count] = destination[0]
    tx.refusing_count += 1


cdef inline int fall_back_to_pieces(Transmitter *tx, int error) noexcept nogil:
    """Send the first run in pieces after ``error``. Returns as send_in_pieces does."""
    cdef uint64_t sent_before = tx.counters[TX_MESSAGES]
    cdef int rest_error = send_first_run_in_pieces(tx)
    # Only where pieces are taken: an address that takes nothing (port 0, which a request may come from)
    # must not use up the table.
    if tx.counters[TX_MESSAGES] > sent_before and (
        error == EIO or error == EINVAL or error == EMSGSIZE
    ):
        refuse_runs(tx, &tx.destinations[tx.first])
    return rest_error


cdef inline int send_runs(Transmitter *tx) noexcept nogil:
    """Send the first runs, as many as one sendmmsg takes. 0, or what the first of them has met."""
    cdef int sent, error
    cdef unsigned int i
    cdef int retries = 0
    cdef unsigned int asked = min(tx.end - tx.first, <unsigned int>TX_WINDOW)
    if tx.deferred.datagrams:
        for i in range(1, asked):
            if entry_of(&tx.deferred, &tx.destinations[tx.first + i]) != NULL:
                asked = i
                break
    while True:
        sent = send_window(tx, &tx.headers[tx.first], asked, &tx.runs[tx.first])
        error = errno
        if sent > 0:
            # A short count hides the error that made it short (sendmmsg(2), BUGS).
            tx.met_icmp_error |= <unsigned int>sent < asked
            for i in range(<unsigned int>sent):
                count_sent(tx, tx.runs[tx.first].count, tx.vectors[tx.first].iov_len)
                tx.first += 1
        flight_ended(tx)
        if sent > 0:
            return 0
        elif error == EINTR:
            continue
        elif may_be_icmp(error) and retries < TX_RETRIES:
            retries += 1
            tx.met_icmp_error = True
        else:
            return error


cdef inline void defer_first_run(Transmitter *tx, Entry *entry, int error) noexcept nogil:
    """Move its datagrams to the entry of their address (NULL: a new one), or drop them."""
    cdef linux.msghdr *header = &tx.headers[tx.first].msg_hdr
    cdef unsigned int i
    if entry == NULL:
        entry = new_entry(
            &tx.deferred, &tx.destinations[tx.first], header.msg_namelen, tx.clock_ns()
        )
    cut_first_run(tx)
    for i in range(tx.runs[tx.first].count):
        if entry == NULL or not defer(&tx.deferred, entry, &tx.piece_vectors[i]):
            drop(tx, error, &tx.destinations[tx.first])


cdef inline void retry_entry(Transmitter *tx, Entry *entry, int64_t now_ns) noexcept nogil:
    cdef unsigned int done
    cdef int error
    entry.attempts += 1
    entry.retry_at_ns = now_ns + RETRY_INTERVAL_NS
    while entry.end:
        error = send_in_pieces(
            tx,
            &entry.datagrams[entry.first],
            entry.end - entry.first,
            &entry.destination,
            entry.address_bytes,
            &done,
        )
        if error == EAGAIN:
            tx.blocked = EAGAIN
        elif error and entry.attempts >= MAX_ATTEMPTS:
            drop(tx, error, &entry.destination)
            done += 1
            error = 0
        datagrams_done(&tx.deferred, entry, done)
        if error:
            return


cdef inline void retry_deferred(Transmitter *tx) noexcept nogil:
    cdef int64_t now_ns = tx.clock_ns()
    cdef int i
    for i in range(MAX_DEFERRED_ADDRESSES):
        if tx.deferred.entries[i].end and tx.deferred.entries[i].retry_at_ns <= now_ns:
            retry_entry(tx, &tx.deferred.entries[i], now_ns)
            if tx.blocked:
                return


cdef inline void transmit(Transmitter *tx) noexcept nogil:
    """Give every queued datagram to the kernel, or count why not; ``blocked`` says what is left."""
    cdef int error
    cdef Entry *entry
    cdef Destination *destination
    close_runs(tx)
    tx.blocked = 0
    if tx.deferred.datagrams:
        retry_deferred(tx)
    while tx.first < tx.end and tx.blocked == 0:
        destination = &tx.destinations[tx.first]
        entry = entry_of(&tx.deferred, destination)
        if entry != NULL:
            error = ENOBUFS
        elif tx.runs[tx.first].count > 1 and tx.refusing_count and refuses_runs(tx, destination):
            error = send_first_run_in_pieces(tx)
        else:
            error = send_runs(tx)
            if error == 0:
                continue
            if tx.runs[tx.first].count > 1 and error != EAGAIN:
                error = fall_back_to_pieces(tx, error)
        if error == EAGAIN:
            tx.blocked = EAGAIN
            return
        if has_no_room(error):
            defer_first_run(tx, entry, error)
        elif error:
            drop(tx, error, destination)
        tx.first += 1
    if tx.blocked == 0:
        tx.first = tx.end = 0
        tx.arena_used = 0
        if tx.deferred.datagrams:
            tx.blocked = ENOBUFS
