"""Invariant: whatever the kernel answers, each reply is sent once, whole and to its address, in order among
the replies to this address, or is counted as dropped.

sendmmsg is defined here, so transmit.pxd runs against a kernel that follows the input: it takes all, takes
some, or fails with any errno that Linux has for this call. An input is the byte GSO_MODE (how runs are
refused), then steps, from which the kernel takes its answers when it is called; when the input is used up,
the kernel takes everything. A reply carries its number and its size. A flush takes a millisecond.

A refusal does not concern the datagram at hand when it stems from an ICMP error of an earlier one (udp(7),
IP_RECVERR), or from its being sent in a run. So replies may be dropped as refused only as often as the
kernel refused single ones for good. And runs are given up only for an address that takes single datagrams:
otherwise anyone could turn them off for all, by requests from addresses that take none. Without an EAGAIN,
nothing waits for an address that has no room but the replies to this address.
"""

from libc cimport errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport abort
from libc.string cimport memcpy, memset

cimport peerd.linux_udp as linux
from peerd._scoreboard cimport (
    COUNTER_COUNT, TX_BYTES, TX_DROPPED_CONGESTED, TX_DROPPED_FULL, TX_DROPPED_REFUSED, TX_DROPPED_TOO_BIG,
    TX_MESSAGES,
)
from peerd.destination cimport Destination
from peerd.deferred cimport RETRY_INTERVAL_NS, deferred_clear
from peerd.flight cimport Flight
from peerd.transmit cimport (
    MAX_DATAGRAM_BYTES, TX_RETRIES, TX_SEGMENTS, Transmitter, drop_queued, transmit, transmit_room,
    transmitter_open,
)

# In C, since Cython fills its arrays when a module is imported, and no target ever is.
cdef extern from *:
    """
    static const size_t SIZES[8] = {8, 9, 40, 64, 1200, 9000, 30000, 65507};
    static const int REPEATS[4] = {1, 2, 10, 65};
    static const int ERRORS[16] = {
        EAGAIN, ENOBUFS, ENOMEM, EINTR, ECONNREFUSED, EHOSTUNREACH, ENETUNREACH, EHOSTDOWN,
        ENONET, ENOPROTOOPT, EOPNOTSUPP, EPROTO, EMSGSIZE, EIO, EINVAL, EPERM
    };
    """
    const size_t SIZES[8]
    const int REPEATS[4]
    const int ERRORS[16]

cdef enum:
    # Longer ones only take longer.
    MAX_INPUT_BYTES = 256
    # More than there can be runs.
    MAX_REPLIES = 1500
    # Bits of GSO_MODE.
    REFUSE_ALL_RUNS = 1
    REFUSE_RUNS_TO_ODD_CLIENTS = 2
    REFUSE_ALL_TO_HIGH_CLIENTS = 4
    DROP_AT_THE_END = 128
    HAS_LOCAL = 64

cdef struct Kernel:
    const uint8_t *at
    const uint8_t *end
    uint8_t gso_mode
    uint32_t next_number[256]  # by client: no lower one may come
    uint64_t messages
    uint64_t message_bytes
    uint64_t refused_for_good
    uint64_t refused_runs  # to clients that take single datagrams
    int others_errors  # since a datagram was last taken
    uint64_t no_room
    bint was_full  # EAGAIN in this flush

cdef Kernel kernel
cdef Transmitter tx
cdef Flight flight
cdef int64_t now_ns
cdef bint opened = False
cdef uint64_t counters[COUNTER_COUNT]
cdef uint8_t clients[MAX_REPLIES]
cdef uint32_t offered


cdef inline void check(bint holds) noexcept nogil:
    if not holds:
        abort()


cdef inline uint8_t next_byte() noexcept nogil:
    cdef uint8_t value = 0
    if kernel.at != kernel.end:
        value = kernel.at[0]
        kernel.at += 1
    return value


cdef inline void destination_of(uint8_t client, Destination *destination) noexcept nogil:
    """Clients with the bit HAS_LOCAL have asked at an address of their own."""
    memset(destination, 0, sizeof(Destination))
    (<uint8_t *>destination)[0] = linux.AF_INET
    (<uint8_t *>destination)[3] = client
    if client & HAS_LOCAL:
        destination.local.ipi6_addr.s6_addr[15] = client
        destination.local.ipi6_ifindex = 3


cdef inline uint8_t client_of(linux.mmsghdr *message) noexcept nogil:
    return (<uint8_t *>message.msg_hdr.msg_name)[3]


cdef inline bint refuses_all(uint8_t client) noexcept nogil:
    """As the kernel does for port 0, which a request may come from."""
    return client >= 128 and kernel.gso_mode & REFUSE_ALL_TO_HIGH_CLIENTS


cdef int64_t clock_ns() noexcept nogil:
    return now_ns


cdef inline bint has_no_room(int error) noexcept nogil:
    return error == errno.ENOBUFS or error == errno.ENOMEM


cdef inline bint is_the_datagrams_own(int error) noexcept nogil:
    """Not one that an ICMP message can cause."""
    return error == errno.EIO or error == errno.EINVAL or error == errno.EPERM


cdef int refuse(linux.mmsghdr *first, int error) noexcept nogil:
    if has_no_room(error):
        kernel.no_room += 1
    elif error == errno.EAGAIN:
        kernel.was_full = True
    elif error != errno.EINTR:
        if not is_the_datagrams_own(error):
            kernel.others_errors += 1
        if is_the_datagrams_own(error) or kernel.others_errors > TX_RETRIES:
            if stride_of_run(first) == 0:
                kernel.refused_for_good += 1
            elif not refuses_all(client_of(first)):
                kernel.refused_runs += 1
    errno.errno = error
    return -1


cdef void take_one(const uint8_t *data, size_t size, linux.msghdr *header) noexcept nogil:
    cdef uint32_t number, written_size
    cdef Destination destination
    cdef uint8_t difference = 0
    cdef size_t i
    memcpy(&number, data, 4)
    memcpy(&written_size, data + 4, 4)
    check(number < offered)
    check(written_size == size)
    check(size == 8 or data[size - 1] == <uint8_t>number)
    check(number >= kernel.next_number[clients[number]])
    destination_of(clients[number], &destination)
    check(header.msg_namelen == sizeof(linux.sockaddr_in))
    for i in range(sizeof(linux.sockaddr_in)):
        difference |= (<uint8_t *>header.msg_name)[i] ^ (<uint8_t *>&destination)[i]
    check(difference == 0)
    kernel.next_number[clients[number]] = number + 1
    kernel.messages += 1
    kernel.message_bytes += size


cdef uint16_t stride_of_run(linux.mmsghdr *message) noexcept nogil:
    """0 for a single datagram. Checks that all control messages are whole, and the local address."""
    cdef linux.msghdr *header = &message.msg_hdr
    cdef linux.cmsghdr *control = NULL
    cdef linux.in_pktinfo local
    cdef uint16_t stride = 0
    cdef bint has_local = False
    if header.msg_controllen:
        control = linux.CMSG_FIRSTHDR(header)
    while control != NULL:
        if control.cmsg_level == linux.SOL_UDP and control.cmsg_type == linux.UDP_SEGMENT:
            check(control.cmsg_len == linux.CMSG_LEN(sizeof(uint16_t)))
            memcpy(&stride, linux.CMSG_DATA(control), sizeof(stride))
        else:
            check(control.cmsg_level == linux.IPPROTO_IP and control.cmsg_type == linux.IP_PKTINFO)
            check(control.cmsg_len == linux.CMSG_LEN(sizeof(local)))
            memcpy(&local, linux.CMSG_DATA(control), sizeof(local))
            check((<uint8_t *>&local.ipi_spec_dst)[3] == client_of(message) and local.ipi_ifindex == 3)
            has_local = True
        control = linux.CMSG_NXTHDR(header, control)
    check(has_local == (client_of(message) & HAS_LOCAL != 0))
    return stride


cdef void take(linux.mmsghdr *message) noexcept nogil:
    """One send; with UDP_SEGMENT it is what the kernel would make of it."""
    cdef linux.msghdr *header = &message.msg_hdr
    cdef const uint8_t *data = <const uint8_t *>header.msg_iov.iov_base
    cdef size_t left = header.msg_iov.iov_len
    cdef uint16_t stride = stride_of_run(message)
    check(header.msg_iovlen == 1)
    check(left > 0 and left <= MAX_DATAGRAM_BYTES)
    if stride == 0:
        take_one(data, left, header)
        return
    check(stride < left)
    check((left + stride - 1) // stride <= TX_SEGMENTS)
    while left > stride:
        take_one(data, stride, header)
        data += stride
        left -= stride
    take_one(data, left, header)


cdef public int sendmmsg(int fd, linux.mmsghdr *messages, unsigned int count, int flags) noexcept nogil:
    cdef uint8_t answer = next_byte()
    cdef unsigned int takes = count
    cdef unsigned int i
    cdef uint8_t client
    check(fd == 7 and count > 0 and flags == linux.MSG_DONTWAIT)
    if answer & 3 == 3:
        return refuse(messages, ERRORS[(answer >> 2) & 15])
    if answer & 3 == 1:
        takes = min(count, 1 + (answer >> 2))
    for i in range(takes):
        client = client_of(&messages[i])
        # As in the kernel, an error behind messages that were sent is not reported.
        if refuses_all(client):
            return i if i > 0 else refuse(messages, errno.EINVAL)
        if stride_of_run(&messages[i]) and (
            kernel.gso_mode & REFUSE_ALL_RUNS
            or (client & 1 and kernel.gso_mode & REFUSE_RUNS_TO_ODD_CLIENTS)
        ):
            return i if i > 0 else refuse(messages, errno.EIO)
        take(&messages[i])
        kernel.others_errors = 0
    return takes


cdef void flush() noexcept nogil:
    global now_ns
    now_ns += RETRY_INTERVAL_NS
    kernel.was_full = False
    transmit(&tx)
    if not kernel.was_full:
        check(tx.first == tx.end and tx.queued == tx.deferred.datagrams)
    check((tx.blocked != 0) == (tx.queued != 0))


cdef void offer(uint8_t client, size_t size) noexcept nogil:
    """As DatagramLoop._queue does."""
    global offered
    cdef Destination destination
    cdef uint32_t written_size = <uint32_t>size
    cdef uint8_t *at
    if offered == MAX_REPLIES:
        return
    destination_of(client, &destination)
    clients[offered] = client
    at = transmit_room(&tx, size, &destination, sizeof(linux.sockaddr_in))
    if at == NULL:
        flush()
        at = transmit_room(&tx, size, &destination, sizeof(linux.sockaddr_in))
    if at == NULL:
        counters[TX_DROPPED_FULL] += 1
    else:
        at[size - 1] = <uint8_t>offered
        memcpy(at, &offered, 4)
        memcpy(at + 4, &written_size, 4)
    offered += 1


cdef inline uint64_t refused() noexcept nogil:
    return counters[TX_DROPPED_REFUSED] + counters[TX_DROPPED_TOO_BIG]


cdef inline void check_counters() noexcept nogil:
    check(kernel.messages == counters[TX_MESSAGES])
    check(kernel.message_bytes == counters[TX_BYTES])
    check(refused() <= kernel.refused_for_good)
    check(tx.refusing_count <= kernel.refused_runs)
    check(counters[TX_DROPPED_CONGESTED] == 0 or kernel.no_room > 0)
    check(
        offered
        == tx.queued
        + counters[TX_MESSAGES]
        + counters[TX_DROPPED_FULL]
        + counters[TX_DROPPED_CONGESTED]
        + refused()
    )


cdef public int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) noexcept nogil:
    global offered, opened, now_ns
    cdef uint8_t step, client
    cdef int repeat
    if size == 0 or size > MAX_INPUT_BYTES:
        return -1  # not for the corpus
    if not opened:
        check(transmitter_open(&tx, 7, True, counters, &flight))
        tx.clock_ns = clock_ns
        tx.family = linux.AF_INET
        opened = True
    memset(counters, 0, sizeof(counters))
    memset(&kernel, 0, sizeof(kernel))
    kernel.at = data
    kernel.end = data + size
    kernel.gso_mode = next_byte()
    offered = 0
    # As transmitter_open leaves them; the arena is not mapped again, for speed.
    tx.first = tx.end = tx.queued = tx.refusing_count = 0
    tx.arena_used = 0
    deferred_clear(&tx.deferred)
    tx.gso = True
    while kernel.at != kernel.end:
        step = next_byte()
        if step & 7 == 7:
            flush()
        else:
            client = next_byte()
            repeat = REPEATS[step >> 6]
            while repeat > 0:
                offer(client, SIZES[(step >> 3) & 7])
                repeat -= 1
        check_counters()
    if kernel.gso_mode & DROP_AT_THE_END:
        drop_queued(&tx)
    # A kernel that takes everything but runs.
    flush()
    check(tx.queued == 0)
    check_counters()
    return 0
