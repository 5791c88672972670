"""The datagram path: recvmmsg -> split -> decode -> handler -> reply -> sendmmsg.

One turn of the loop takes what one recvmmsg gives, hands every message to its handler, and sends
the replies with one sendmmsg. Everything it needs is allocated when the loop is made: a turn
allocates the messages and nothing else.

Receiving. With UDP_GRO the kernel may join datagrams of one sender into one buffer, all of one size
(the stride, told in a control message) but the last, which may be shorter (udp(7)). A buffer is
therefore as large as a datagram can be: with a smaller one, joined datagrams would be cut off. A
datagram of no bytes is never joined and is a datagram all the same. Buffers are calloc'ed, so pages
that no datagram ever reached cost no memory.

Replying. A reply is copied into an arena behind its header, and its address is that of the datagram
it answers, in the receive array, which stays as it is until the next turn. The arena is flushed when
it is full and at the end of the turn. Magic and version of a plain ``bytes`` reply are the
request's: its header is copied from the request unread.

Counting. RX_DATAGRAMS grows when recvmmsg returns, HANDLED when a datagram's reply has been given to
the kernel: at any moment, the difference is what a SIGKILL would cost. The identity

    rx_datagrams = rx_messages + rx_truncated + decode_* + unknown_magic

holds after each turn.

Waking up. The loop polls the socket and a pipe. stop() writes the pipe, and so does the C signal
handler of CPython if the owner calls signal.set_wakeup_fd(loop.wakeup_fd): so a signal that arrives
just before poll() is not slept over. After every turn PyErr_CheckSignals runs the Python handlers.

Rejected: one malloc a datagram (the allocator is half the cost then), MSG_WAITFORONE on a blocking
socket (a stop request from another thread would wait for the next datagram), io_uring (within 1 % of
recvmmsg, and often forbidden in containers).
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport Py_EQ, Py_NE
from cpython.unicode cimport PyUnicode_DecodeASCII
from libc.errno cimport EAGAIN, ECONNREFUSED, EHOSTUNREACH, EINTR, EMSGSIZE, ENETUNREACH, ENOBUFS, ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

cimport peerd.linux_udp as linux
from peerd._scoreboard cimport (
    DECODE_EMPTY_COUNT,
    HANDLED,
    HANDLER_ERRORS,
    ICMP_ERRORS,
    RX_BYTES,
    RX_DATAGRAMS,
    RX_MESSAGES,
    RX_TRUNCATED,
    TURNS,
    TX_BYTES,
    TX_DROPPED_FULL,
    TX_DROPPED_REFUSED,
    TX_DROPPED_TOO_BIG,
    TX_MESSAGES,
    UNKNOWN_MAGIC,
    Slot,
    SlotData,
)
from peerd.wire cimport DECODE_EMPTY, DECODE_OK, MAX_DATAGRAM_BYTES, DecodeReason, Envelope, parse_envelope, write_text

import os

import orjson

from peerd.errors import DecodeError

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object, Py_ssize_t *) except NULL

cdef enum:
    # recvmmsg is flat above 16 on Linux 6.18 (2.15 against 2.28 million datagrams/s at 256).
    RX_BATCH = 16
    # The largest UDP payload is 65,527 bytes (IPv6); a joined one is no larger (RFC 768).
    RX_BUFFER_BYTES = 65536
    # Room for what the socket's owner may have switched on besides UDP_GRO: time stamps, marks.
    RX_CONTROL_BYTES = 256
    TX_BATCH = 1024
    TX_ARENA_BYTES = 1 << 18
    # How long an idle loop sleeps before it writes its heartbeat.
    IDLE_TICK_MS = 250
    # How long a flush waits for room in the send buffer before it drops.
    TX_WAIT_MS = 5
    HEADER_CACHE_BYTES = 64
    VERSIONS_KEPT = 64

DECODE_REASONS = ("ok", "empty", "short", "negative_length", "length_past_end", "not_ascii")
cdef dict _DECODE_TEXTS = {
    "empty": "the datagram has no bytes",
    "short": "the datagram ends inside a length field",
    "negative_length": "a length field is negative",
    "length_past_end": "a length field points past the end of the datagram",
    "not_ascii": "the magic code or the version is not ASCII",
}


@cython.final
@cython.no_gc
@cython.freelist(1024)
cdef class Message:
    cdef readonly str magic
    cdef readonly str version
    cdef readonly bytes body
    cdef tuple _sender
    cdef unsigned int _address_bytes
    cdef linux.sockaddr_in6 _address  # large enough for an IPv4 one

    def __init__(self, str magic not None, str version not None, bytes body not None, sender=None):
        if not (magic.isascii() and version.isascii()):
            raise ValueError(f"magic code and version must be ASCII, not {magic!r} and {version!r}")
        self.magic = magic
        self.version = version
        self.body = body
        self._sender = checked_sender(sender)

    @property
    def sender(self):
        if self._sender is None and self._address_bytes:
            self._sender = address_of(<linux.sockaddr *>&self._address)
        return self._sender

    def json(self):
        return orjson.loads(self.body)

    def __richcmp__(self, other, int op):
        if op not in (Py_EQ, Py_NE) or not isinstance(other, Message):
            return NotImplemented
        cdef Message that = other
        equal = (
            self.magic == that.magic
            and self.version == that.version
            and self.body == that.body
            and self.sender == that.sender
        )
        return equal if op == Py_EQ else not equal

    def __hash__(self):
        return hash((self.magic, self.version, self.body, self.sender))

    def __repr__(self):
        body = repr(self.body) if len(self.body) <= 64 else f"<{len(self.body)} bytes>"
        return f"Message({self.magic!r}, {self.version!r}, {body}, sender={self.sender!r})"

    def __reduce__(self):
        return Message, (self.magic, self.version, self.body, self.sender)


def encode(str magic not None, str version not None, bytes body not None=b""):
    cdef Py_ssize_t magic_size, version_size
    cdef const char *magic_text = ascii_text(magic, &magic_size)
    cdef const char *version_text = ascii_text(version, &version_size)
    cdef Py_ssize_t body_size = PyBytes_GET_SIZE(body)
    cdef Py_ssize_t total = 8 + magic_size + version_size + body_size
    cdef bytes datagram = PyBytes_FromStringAndSize(NULL, total)
    cdef uint8_t *at = <uint8_t *>PyBytes_AS_STRING(datagram)
    at = write_text(at, magic_text, magic_size)
    at = write_text(at, version_text, version_size)
    memcpy(at, PyBytes_AS_STRING(body), body_size)
    return datagram


def decode(datagram, sender=None):
    cdef Py_buffer view
    cdef Envelope envelope
    cdef DecodeReason reason
    cdef Message message
    cdef tuple address = checked_sender(sender)
    PyObject_GetBuffer(datagram, &view, PyBUF_SIMPLE)
    try:
        reason = parse_envelope(<const uint8_t *>view.buf, view.len, &envelope)
        if reason != DECODE_OK:
            name = DECODE_REASONS[<int>reason]
            raise DecodeError(name, f"not an envelope: {_DECODE_TEXTS[name]} ({view.len} bytes)")
        message = Message.__new__(Message)
        message.magic = PyUnicode_DecodeASCII(<const char *>envelope.magic, envelope.magic_size, NULL)
        message.version = PyUnicode_DecodeASCII(<const char *>envelope.version, envelope.version_size, NULL)
        message.body = PyBytes_FromStringAndSize(<const char *>envelope.body, envelope.body_size)
        message._sender = address
        return message
    finally:
        PyBuffer_Release(&view)


@cython.final
cdef class _Route:
    """Where the messages of one magic code go."""

    cdef bytes key
    cdef str magic
    cdef object handler
    cdef list pending  # the batch of this turn; None when each message gets its own call


@cython.final
cdef class DatagramLoop:
    cdef int _fd
    cdef int _wake_read
    cdef readonly int wakeup_fd
    cdef readonly bint gro
    cdef bint _running
    cdef volatile bint _stopping
    cdef volatile int64_t _drain_ns
    cdef Slot _slot
    cdef SlotData *_stats
    cdef object _on_handler_error
    cdef dict _routes
    cdef dict _versions
    cdef list _batched
    # The last header that parsed and had a handler: nearly all messages repeat it.
    cdef uint8_t _last_header[HEADER_CACHE_BYTES]
    cdef size_t _last_header_bytes  # 0 when there is none
    cdef _Route _last_route
    cdef str _last_version
    cdef uint64_t _processed  # of the datagrams in RX_DATAGRAMS, those that Python is done with

    cdef uint8_t *_rx_buffers
    cdef uint8_t *_rx_control
    cdef linux.mmsghdr *_rx
    cdef linux.iovec *_rx_iov
    cdef linux.sockaddr_storage *_rx_address
    cdef int _rx_used  # headers that the last recvmmsg wrote and the next must find reset

    cdef uint8_t *_tx_arena
    cdef size_t _tx_used
    cdef linux.mmsghdr *_tx
    cdef linux.iovec *_tx_iov
    cdef unsigned int _tx_count

    def __cinit__(self):
        self._wake_read = -1
        self.wakeup_fd = -1

    def __init__(self, int fd, handlers, batch_handlers, Slot slot not None, on_handler_error, *, bint gro=True):
        cdef int on = gro
        if self._stats != NULL:
            raise RuntimeError("a DatagramLoop cannot be initialised twice")
        self._fd = fd
        self._slot = slot
        self._stats = slot.data
        self._on_handler_error = on_handler_error
        self._routes = {}
        self._versions = {}
        self._batched = []
        for magic, handler in handlers.items():
            self._add_route(magic, handler, None)
        for magic, handler in batch_handlers.items():
            self._add_route(magic, handler, [])
        self._processed = self._stats.counters[RX_DATAGRAMS]
        self._stats.counters[HANDLED] = self._processed
        self._allocate()
        # Fails with ENOPROTOOPT before Linux 5.0; then every datagram has a buffer of its own.
        # Set in either case: the socket may have had another loop before, which left it on.
        self.gro = linux.setsockopt(fd, linux.SOL_UDP, linux.UDP_GRO, &on, sizeof(on)) == 0 and gro

    def __dealloc__(self):
        free(self._rx_buffers)
        free(self._rx_control)
        free(self._rx)
        free(self._rx_iov)
        free(self._rx_address)
        free(self._tx_arena)
        free(self._tx)
        free(self._tx_iov)
        if self._wake_read >= 0:
            linux.close(self._wake_read)
            linux.close(self.wakeup_fd)

    def run(self):
        """Turn until stop(), then drain as stop() asked."""
        cdef int64_t deadline
        if self._running:
            raise RuntimeError("this loop runs already")
        self._running = True
        try:
            while not self._stopping:
                # A batch that is not full has emptied the queue.
                if self._turn() < RX_BATCH and not self._stopping:
                    self._wait()
                PyErr_CheckSignals()
            deadline = monotonic_ns() + self._drain_ns
            while monotonic_ns() < deadline and self._turn() > 0:
                PyErr_CheckSignals()
        finally:
            self._running = False

    def turn(self):
        """One turn, without waiting; returns how many datagrams it took."""
        cdef uint64_t before = self._stats.counters[RX_DATAGRAMS]
        if self._running:
            raise RuntimeError("this loop runs already")
        self._running = True
        try:
            self._turn()
        finally:
            self._running = False
        return self._stats.counters[RX_DATAGRAMS] - before

    def stop(self, double drain_s=0.0):
        cdef char byte = 0
        self._drain_ns = <int64_t>(drain_s * 1e9)
        self._stopping = True
        # A full pipe wakes the loop as well, so the result does not matter.
        linux.write(self.wakeup_fd, &byte, 1)

    cdef int _add_route(self, str magic, object handler, list pending) except -1:
        cdef _Route route = _Route.__new__(_Route)
        route.key = magic.encode("ascii")
        route.magic = magic
        route.handler = handler
        route.pending = pending
        if route.key in self._routes:
            raise ValueError(f"two handlers for {magic!r}")
        self._routes[route.key] = route
        if pending is not None:
            self._batched.append(route)
        return 0

    cdef int _allocate(self) except -1:
        cdef int ends[2]
        cdef int i
        self._rx_buffers = <uint8_t *>calloc(RX_BATCH, RX_BUFFER_BYTES)
        self._rx_control = <uint8_t *>calloc(RX_BATCH, RX_CONTROL_BYTES)
        self._rx = <linux.mmsghdr *>calloc(RX_BATCH, sizeof(linux.mmsghdr))
        self._rx_iov = <linux.iovec *>calloc(RX_BATCH, sizeof(linux.iovec))
        self._rx_address = <linux.sockaddr_storage *>calloc(RX_BATCH, sizeof(linux.sockaddr_storage))
        self._tx_arena = <uint8_t *>calloc(TX_ARENA_BYTES, 1)
        self._tx = <linux.mmsghdr *>calloc(TX_BATCH, sizeof(linux.mmsghdr))
        self._tx_iov = <linux.iovec *>calloc(TX_BATCH, sizeof(linux.iovec))
        if (
            self._rx_buffers == NULL or self._rx_control == NULL or self._rx == NULL or self._rx_iov == NULL
            or self._rx_address == NULL or self._tx_arena == NULL or self._tx == NULL or self._tx_iov == NULL
        ):
            raise MemoryError
        for i in range(RX_BATCH):
            self._rx_iov[i].iov_base = self._rx_buffers + i * RX_BUFFER_BYTES
            self._rx_iov[i].iov_len = RX_BUFFER_BYTES
            self._rx[i].msg_hdr.msg_iov = &self._rx_iov[i]
            self._rx[i].msg_hdr.msg_iovlen = 1
            self._rx[i].msg_hdr.msg_name = &self._rx_address[i]
            self._rx[i].msg_hdr.msg_control = self._rx_control + i * RX_CONTROL_BYTES
        self._rx_used = RX_BATCH
        for i in range(TX_BATCH):
            self._tx[i].msg_hdr.msg_iov = &self._tx_iov[i]
            self._tx[i].msg_hdr.msg_iovlen = 1
        if linux.pipe2(ends, linux.O_CLOEXEC | linux.O_NONBLOCK) < 0:
            raise OSError(errno, f"pipe2: {os.strerror(errno)}")
        self._wake_read = ends[0]
        self.wakeup_fd = ends[1]
        return 0

    cdef int _wait(self) except -1:
        """Sleep until a datagram, a wake-up or the next heartbeat is due."""
        cdef linux.pollfd waits[2]
        cdef char waste[64]
        cdef int ready, error
        waits[0].fd = self._fd
        waits[0].events = linux.POLLIN
        waits[1].fd = self._wake_read
        waits[1].events = linux.POLLIN
        with nogil:
            ready = linux.poll(waits, 2, IDLE_TICK_MS)
            error = errno
            if ready > 0 and waits[1].revents:
                while linux.read(self._wake_read, waste, sizeof(waste)) == sizeof(waste):
                    pass
        if ready < 0 and error != EINTR:
            raise OSError(error, f"poll: {os.strerror(error)}")
        return 0

    cdef int _turn(self) except -1:
        """Take, hand out and answer one batch; returns how many buffers it filled."""
        cdef SlotData *stats = self._stats
        cdef int i, filled, error
        for i in range(self._rx_used):
            self._rx[i].msg_hdr.msg_namelen = sizeof(linux.sockaddr_storage)
            self._rx[i].msg_hdr.msg_controllen = RX_CONTROL_BYTES
            self._rx[i].msg_hdr.msg_flags = 0
        self._rx_used = 0
        with nogil:
            filled = linux.recvmmsg(self._fd, self._rx, RX_BATCH, linux.MSG_DONTWAIT, NULL)
            error = errno
        stats.heartbeat_ns = monotonic_ns()
        if filled < 0:
            return self._receive_failed(error)
        self._rx_used = filled
        for i in range(filled):
            stats.counters[RX_DATAGRAMS] += segments(&self._rx[i])
        try:
            for i in range(filled):
                self._hand_out_buffer(&self._rx[i])
            if self._batched:
                self._call_batch_handlers()
        finally:
            # Also when a handler ends the loop: the queued replies' addresses are in the receive
            # array, and the next turn would write others there.
            self._flush()
        stats.counters[TURNS] += 1
        stats.heartbeat_ns = monotonic_ns()
        return filled

    cdef int _receive_failed(self, int error) except -1:
        if error == EAGAIN:
            return 0
        # From here on nothing is known of the queue, so what drains it must go on.
        if error == EINTR or error == ENOMEM or error == ENOBUFS:
            return 1
        if error == ECONNREFUSED or error == EHOSTUNREACH or error == ENETUNREACH:
            # An ICMP error for a reply sent before: one client is gone, the others are not.
            self._stats.counters[ICMP_ERRORS] += 1
            return 1
        raise OSError(error, f"recvmmsg: {os.strerror(error)}")

    cdef int _hand_out_buffer(self, linux.mmsghdr *received) except -1:
        cdef const uint8_t *data = <const uint8_t *>received.msg_hdr.msg_iov.iov_base
        cdef size_t left = received.msg_len
        cdef size_t stride, size
        if is_cut_off(received):
            self._stats.counters[RX_TRUNCATED] += 1
            self._processed += 1
            return 0
        stride = stride_of(received)
        while True:
            size = stride if stride < left else left
            self._hand_out(data, size, &received.msg_hdr)
            self._processed += 1
            data += size
            left -= size
            if left == 0:
                return 0

    cdef int _hand_out(self, const uint8_t *data, size_t size, linux.msghdr *header) except -1:
        cdef uint64_t *counters = self._stats.counters
        cdef Py_ssize_t header_bytes = self._last_header_bytes
        cdef _Route route
        cdef Message message
        counters[RX_BYTES] += size
        if (
            header_bytes == 0
            or size < <size_t>header_bytes
            or memcmp(data, self._last_header, header_bytes) != 0
        ):
            header_bytes = self._read_header(data, size)
            if header_bytes == 0:
                return 0
        route = self._last_route
        message = Message.__new__(Message)
        message.magic = route.magic
        message.version = self._last_version
        message.body = PyBytes_FromStringAndSize(<const char *>data + header_bytes, size - header_bytes)
        message._address_bytes = min(header.msg_namelen, <linux.socklen_t>sizeof(message._address))
        memcpy(&message._address, header.msg_name, message._address_bytes)
        counters[RX_MESSAGES] += 1
        if route.pending is not None:
            route.pending.append(message)
            return 0
        try:
            result = route.handler(message)
            if result is not None:
                self._reply(route, result, data, header_bytes, header)
        except Exception as error:
            self._handler_failed(route, message, error)
        return 0

    cdef Py_ssize_t _read_header(self, const uint8_t *data, size_t size) except -1:
        """Parse and route a header other than the last one; its size, or 0 when it is counted instead.

        What parse_envelope says of a datagram depends on the bytes of the header alone, so the next
        datagram that begins with the same ones needs no parsing.
        """
        cdef uint64_t *counters = self._stats.counters
        cdef Envelope envelope
        cdef DecodeReason reason = parse_envelope(data, size, &envelope)
        cdef size_t header_bytes
        if reason != DECODE_OK:
            counters[DECODE_EMPTY_COUNT + <int>reason - DECODE_EMPTY] += 1
            return 0
        route = self._routes.get(PyBytes_FromStringAndSize(<const char *>envelope.magic, envelope.magic_size))
        if route is None:
            counters[UNKNOWN_MAGIC] += 1
            return 0
        self._last_header_bytes = 0
        self._last_route = route
        self._last_version = self._version_of(&envelope)
        header_bytes = envelope.body - data
        if header_bytes <= HEADER_CACHE_BYTES:
            memcpy(self._last_header, data, header_bytes)
            self._last_header_bytes = header_bytes
        return header_bytes

    cdef str _version_of(self, Envelope *envelope):
        """The version's text, shared by all messages that have it."""
        key = PyBytes_FromStringAndSize(<const char *>envelope.version, envelope.version_size)
        version = self._versions.get(key)
        if version is None:
            version = key.decode("ascii")
            # Senders choose versions, so what is kept of them is bounded, in number and in size.
            if len(key) <= HEADER_CACHE_BYTES and len(self._versions) < VERSIONS_KEPT:
                self._versions[key] = version
        return version

    cdef int _call_batch_handlers(self) except -1:
        cdef _Route route
        for route in self._batched:
            if not route.pending:
                continue
            batch = route.pending
            route.pending = []
            try:
                result = route.handler(batch)
                if result is not None:
                    raise TypeError(
                        f"the batch handler of {route.magic!r} returned {type(result).__name__}; "
                        "it must return None"
                    )
            except Exception as error:
                self._handler_failed(route, batch[0], error)
        return 0

    cdef int _handler_failed(self, _Route route, Message message, object error) except -1:
        self._stats.counters[HANDLER_ERRORS] += 1
        self._on_handler_error(route.magic, message.sender, error)
        return 0

    cdef int _reply(
        self, _Route route, object result, const uint8_t *request, size_t header_bytes, linux.msghdr *to
    ) except -1:
        cdef Message reply
        cdef const char *magic
        cdef const char *version
        cdef Py_ssize_t magic_size, version_size
        cdef bytes body
        cdef size_t body_bytes
        cdef uint8_t *at
        if type(result) is bytes:
            body = <bytes>result
            body_bytes = PyBytes_GET_SIZE(body)
            at = self._queue(header_bytes + body_bytes, to)
            if at != NULL:
                memcpy(at, request, header_bytes)
                memcpy(at + header_bytes, PyBytes_AS_STRING(body), body_bytes)
        elif type(result) is Message:
            reply = <Message>result
            magic = ascii_text(reply.magic, &magic_size)
            version = ascii_text(reply.version, &version_size)
            body_bytes = PyBytes_GET_SIZE(reply.body)
            at = self._queue(8 + magic_size + version_size + body_bytes, to)
            if at != NULL:
                at = write_text(at, magic, magic_size)
                at = write_text(at, version, version_size)
                memcpy(at, PyBytes_AS_STRING(reply.body), body_bytes)
        else:
            raise TypeError(
                f"the handler of {route.magic!r} returned {type(result).__name__}; "
                "it must return bytes, a Message or None"
            )
        return 0

    cdef uint8_t *_queue(self, size_t size, linux.msghdr *to) noexcept:
        """Room for a reply of size bytes in the arena, or NULL when it is too big for a datagram."""
        cdef linux.msghdr *header
        cdef uint8_t *at
        if size > MAX_DATAGRAM_BYTES:
            self._stats.counters[TX_DROPPED_TOO_BIG] += 1
            return NULL
        if self._tx_count == TX_BATCH or self._tx_used + size > TX_ARENA_BYTES:
            self._flush()
        at = self._tx_arena + self._tx_used
        header = &self._tx[self._tx_count].msg_hdr
        header.msg_name = to.msg_name
        header.msg_namelen = to.msg_namelen
        header.msg_iov.iov_base = at
        header.msg_iov.iov_len = size
        self._tx_used += size
        self._tx_count += 1
        return at

    cdef void _flush(self) noexcept:
        """Give every queued reply to the kernel, or count why not."""
        cdef uint64_t *counters = self._stats.counters
        cdef unsigned int done = 0
        cdef unsigned int i
        cdef int sent, error, pending
        cdef bint waited = False
        cdef linux.pollfd wait
        if self._tx_count:
            with nogil:
                while done < self._tx_count:
                    sent = linux.sendmmsg(self._fd, &self._tx[done], self._tx_count - done, linux.MSG_DONTWAIT)
                    error = errno
                    if sent > 0:
                        for i in range(done, done + sent):
                            counters[TX_BYTES] += self._tx_iov[i].iov_len
                        counters[TX_MESSAGES] += sent
                        done += sent
                    elif error == EINTR:
                        continue
                    elif error == EAGAIN or error == ENOBUFS or error == ENOMEM:
                        if waited:
                            counters[TX_DROPPED_FULL] += self._tx_count - done
                            break
                        wait.fd = self._fd
                        wait.events = linux.POLLOUT
                        linux.poll(&wait, 1, TX_WAIT_MS)
                        waited = True
                    else:
                        # This one cannot be sent (port 0, no route, too big): the next may.
                        counters[TX_DROPPED_TOO_BIG if error == EMSGSIZE else TX_DROPPED_REFUSED] += 1
                        done += 1
            self._tx_count = 0
            self._tx_used = 0
        pending = 0
        for route in self._batched:
            pending += len((<_Route>route).pending)
        counters[HANDLED] = self._processed - pending


cdef inline int64_t monotonic_ns() noexcept nogil:
    cdef linux.timespec now
    linux.clock_gettime(linux.CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


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


cdef const char *ascii_text(str text, Py_ssize_t *size) except NULL:
    if not text.isascii():
        raise ValueError(f"magic code and version must be ASCII, not {text!r}")
    return PyUnicode_AsUTF8AndSize(text, size)


cdef tuple checked_sender(object sender):
    if sender is None:
        return None
    host, port = sender
    if not isinstance(host, str) or not isinstance(port, int):
        raise TypeError(f"a sender is (host, port), not {sender!r}")
    return (host, port)


cdef tuple address_of(linux.sockaddr *address):
    cdef char text[64]
    cdef linux.sockaddr_in *v4
    cdef linux.sockaddr_in6 *v6
    cdef const void *raw
    cdef int family = address.sa_family
    cdef uint16_t port
    if family == linux.AF_INET:
        v4 = <linux.sockaddr_in *>address
        raw = &v4.sin_addr
        port = v4.sin_port
    elif family == linux.AF_INET6:
        v6 = <linux.sockaddr_in6 *>address
        raw = &v6.sin6_addr
        port = v6.sin6_port
        if linux.IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr):
            family = linux.AF_INET
            raw = &v6.sin6_addr.s6_addr[12]
    else:
        return None
    if linux.inet_ntop(family, raw, text, sizeof(text)) == NULL:
        return None
    return ((<bytes>text).decode("ascii"), <int>linux.ntohs(port))
