"""Taking datagrams: one recvmmsg into buffers allocated once, and the split of joined ones.

With UDP_GRO the kernel may join datagrams of one sender into one buffer, all of one size (the stride,
told in a control message) but the last, which may be shorter (udp(7)). A buffer is therefore as large
as a datagram can be: with a smaller one, joined datagrams would be cut off. A datagram of no bytes is
never joined, and is a datagram all the same.

Nothing here touches Python; tests/fuzz runs stride_of and segments on any control message.
"""

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

cimport peerd.linux_udp as linux
from peerd.flight cimport RX_BATCH, RX_CONTROL_BYTES, UNTOUCHED, Flight, store_barrier

cdef enum:
    # The largest UDP payload is 65,527 bytes (IPv6); a joined one is no larger (RFC 768).
    RX_BUFFER_BYTES = 65536
    # Buffers a power of two apart would share their few cache sets, and drive each other out.
    RX_BUFFER_DISTANCE = RX_BUFFER_BYTES + 9 * 64

cdef struct Receiver:
    int fd
    Flight *flight
    linux.mmsghdr *headers  # the flight's
    linux.iovec *vectors
    linux.sockaddr_storage *addresses
    uint8_t *buffers
    int used  # headers that the last recvmmsg wrote and the next must find reset


cdef inline bint receiver_open(Receiver *rx, int fd, Flight *flight) noexcept nogil:
    """False without memory. Pages that no datagram ever reaches cost none."""
    cdef int i
    rx.fd = fd
    rx.flight = flight
    rx.headers = flight.rx
    flight.receiving = 0
    rx.vectors = <linux.iovec *>calloc(RX_BATCH, sizeof(linux.iovec))
    rx.addresses = <linux.sockaddr_storage *>calloc(RX_BATCH, sizeof(linux.sockaddr_storage))
    rx.buffers = <uint8_t *>linux.untouched_pages(RX_BATCH * RX_BUFFER_DISTANCE)
    if rx.vectors == NULL or rx.addresses == NULL or rx.buffers == NULL:
        return False
    for i in range(RX_BATCH):
        rx.vectors[i].iov_base = rx.buffers + i * RX_BUFFER_DISTANCE
        rx.vectors[i].iov_len = RX_BUFFER_BYTES
        rx.headers[i].msg_hdr.msg_iov = &rx.vectors[i]
        rx.headers[i].msg_hdr.msg_iovlen = 1
        rx.headers[i].msg_hdr.msg_name = &rx.addresses[i]
        rx.headers[i].msg_hdr.msg_control = flight.rx_control[i]
    rx.used = RX_BATCH
    return True


cdef inline void receiver_close(Receiver *rx) noexcept nogil:
    free(rx.vectors)
    free(rx.addresses)
    linux.free_pages(rx.buffers, RX_BATCH * RX_BUFFER_DISTANCE)


cdef inline int receive(Receiver *rx, int buffers, uint64_t *rx_datagrams) noexcept nogil:
    """How many buffers were filled, without waiting; or -errno. Counts the datagrams in them."""
    cdef int i, filled
    for i in range(rx.used):
        rx.headers[i].msg_hdr.msg_namelen = sizeof(linux.sockaddr_storage)
        rx.headers[i].msg_hdr.msg_controllen = RX_CONTROL_BYTES
        rx.headers[i].msg_hdr.msg_flags = 0
        rx.headers[i].msg_len = UNTOUCHED
    rx.used = 0
    rx.flight.rx_datagrams_before = rx_datagrams[0]
    store_barrier()
    rx.flight.receiving = buffers
    filled = linux.recvmmsg(rx.fd, rx.headers, buffers, linux.MSG_DONTWAIT, NULL)
    if filled < 0:
        rx.flight.receiving = 0
        return -errno
    for i in range(filled):
        rx_datagrams[0] += segments(&rx.headers[i])
    store_barrier()
    rx.flight.receiving = 0
    rx.used = filled
    return filled


cdef inline bint is_cut_off(linux.mmsghdr *received) noexcept nogil:
    """Not whole: bytes are missing, or the control message that says where to split is."""
    return received.msg_hdr.msg_flags & (linux.MSG_TRUNC | linux.MSG_CTRUNC) != 0


cdef inline size_t stride_of(linux.mmsghdr *received) noexcept nogil:
    """The size of each datagram in a buffer but the last: the UDP_GRO control message, or all of it."""
    cdef linux.cmsghdr *control = linux.CMSG_FIRSTHDR(&received.msg_hdr)
    cdef int stride
    while control != NULL:
        if (
            control.cmsg_level == linux.SOL_UDP
            and control.cmsg_type == linux.UDP_GRO
            and control.cmsg_len >= linux.CMSG_LEN(sizeof(int))
            # Neither CMSG_FIRSTHDR nor CMSG_NXTHDR says that the part lies within the control bytes.
            and <size_t>(linux.CMSG_DATA(control) - <uint8_t *>received.msg_hdr.msg_control) + sizeof(int)
            <= received.msg_hdr.msg_controllen
        ):
            memcpy(&stride, linux.CMSG_DATA(control), sizeof(int))
            if stride > 0:
                return <size_t>stride
        control = linux.CMSG_NXTHDR(&received.msg_hdr, control)
    return received.msg_len


cdef inline size_t segments(linux.mmsghdr *received) noexcept nogil:
    """How many datagrams a buffer holds: at least one, since one of no bytes is one too."""
    cdef size_t stride
    if received.msg_len == 0 or is_cut_off(received):
        return 1
    stride = stride_of(received)
    return (received.msg_len + stride - 1) // stride
