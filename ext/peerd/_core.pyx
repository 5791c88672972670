"""The datagram path: recvmmsg -> split -> decode -> handler -> reply -> sendmmsg.

One turn of the loop takes what one recvmmsg gives, hands every message to its handler, and sends the
replies. Everything it needs is allocated when the loop is made: a turn allocates the messages and
nothing else. receive.pxd, transmit.pxd and linger.pxd hold the parts that know nothing of Python,
each with its theory.

Turns are bounded: in datagrams by RX_BATCH buffers, in time by taking fewer buffers next time when
one took longer than TURN_BUDGET_NS. Within a turn, every BREATH_DATAGRAMS datagrams the clock is
looked at, and past the budget the loop breathes: replies are sent, the heartbeat is written, and
Python's signal handlers run. So nothing is starved by a flood, nor by handlers that are slow in sum;
one call that never returns is the supervisor's business.

Counting. RX_DATAGRAMS grows when recvmmsg returns, HANDLED when a datagram's reply has been given to
the kernel: the difference is what a SIGKILL would cost, and flight.pxd makes that exact for one that
comes within these calls. The identity

    rx_datagrams = rx_messages + rx_truncated + decode_* + unknown_magic

holds after each turn. The kernel's own drops are read with SO_MEMINFO once a second: SO_RXQ_OVFL
would cost a control message on each datagram after the first drop (85 ns), and shows nothing while
nothing arrives.

ICMP errors. With IP_RECVERR they wait in a queue of the socket that poll() tells of, with the address
that they are about; without, only the next call would fail, and for no fault of its own. They are
counted, and passed to on_icmp_error if there is one.

Coroutine handlers. Their loop is turned by an event loop instead of run() (peerd/serving/async_server.py). A
coroutine is stepped at once, as asyncio's eager tasks are (Python 3.12), and most end in that step: they
cost no task and no trip through the event loop. While it is stepped, the current task and context are
those of a spare task; a coroutine that waits for something takes the spare with it, and is continued
by it. So asyncio.timeout(), task groups and context variables work as in any task.

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
from cpython.contextvars cimport PyContext_Enter, PyContext_Exit
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport Py_EQ, Py_NE, PyObject
from cpython.ref cimport Py_DECREF
from cpython.unicode cimport PyUnicode_DecodeASCII
from libc.errno cimport EAGAIN, EINTR, ENOBUFS, ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

cimport peerd.linux_udp as linux
from peerd._scoreboard cimport (
    BATCH_BUCKETS,
    DECODE_EMPTY_COUNT,
    HANDLED,
    HANDLER_ERRORS,
    ICMP_ERRORS,
    LINGERS,
    RX_BYTES,
    RX_DATAGRAMS,
    RX_KERNEL_DROPS,
    RX_MESSAGES,
    RX_TRUNCATED,
    TURN_BUCKETS,
    TURNS,
    TX_DROPPED_FULL,
    TX_DROPPED_TOO_BIG,
    UNKNOWN_MAGIC,
    Slot,
    SlotData,
)
from peerd.icmp cimport may_be_icmp
from peerd.linger cimport Linger, linger_after, linger_open
from peerd.flight cimport RX_BATCH
from peerd.receive cimport (
    Receiver,
    is_cut_off,
    receive,
    receiver_close,
    receiver_open,
    stride_of,
)
from peerd.transmit cimport (
    TX_ADDRESS_BYTES,
    Transmitter,
    drop_queued,
    transmit,
    transmit_room,
    transmitter_close,
    transmitter_open,
)
from peerd.wire cimport DECODE_EMPTY, DECODE_OK, MAX_DATAGRAM_BYTES, DecodeReason, Envelope, parse_envelope, write_text

import os
from typing import Union

from peerd.errors import DecodeError

cdef extern from "Python.h":
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT

    const char *PyUnicode_AsUTF8AndSize(object, Py_ssize_t *) except NULL
    PySendResult PyIter_Send(object, object, PyObject **)

cdef enum:
    # How long an idle loop sleeps before it writes its heartbeat.
    IDLE_TICK_MS = 250
    # How long it waits when the kernel had no memory for a reply, which poll() cannot tell.
    NO_MEMORY_TICK_MS = 1
    TURN_BUDGET_NS = 2000000
    BREATH_DATAGRAMS = 16
    MEMINFO_INTERVAL_NS = 1000000000
    # SK_MEMINFO_VARS, SK_MEMINFO_RMEM_ALLOC and SK_MEMINFO_DROPS of linux/sock_diag.h.
    MEMINFO_VARS = 9
    MEMINFO_DROPS = 8
    # ICMP errors that one look at the error queue takes.
    ICMP_BATCH = 64
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


cdef object _loads = None


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
        global _loads
        if _loads is None:
            import orjson  # when somebody wants it: with what it imports itself, it takes 4 ms

            _loads = orjson.loads
        return _loads(self.body)

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


Reply = Union[bytes, Message, None]


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
    cdef bint is_coroutine


@cython.final
cdef class DatagramLoop:
    cdef int _fd
    cdef int _wake_read
    cdef readonly int wakeup_fd
    cdef readonly bint gro
    cdef bint _running
    cdef volatile bint _stopping
    cdef volatile int64_t _drain_ns
    cdef volatile bint _hand_over
    cdef Slot _slot
    cdef SlotData *_stats
    cdef object _on_handler_error
    cdef object _on_icmp_error
    cdef dict _routes
    cdef dict _versions
    cdef list _batched
    cdef object _new_spare
    cdef object _continue
    cdef tuple _failures  # of a handler, which cost its message and nothing else
    cdef object _spare  # entered as the current task and context, or None
    cdef unsigned int _suspended  # coroutines that wait for something
    # The last header that parsed and had a handler: nearly all messages repeat it.
    cdef uint8_t _last_header[HEADER_CACHE_BYTES]
    cdef size_t _last_header_bytes  # 0 when there is none
    cdef _Route _last_route
    cdef str _last_version

    cdef Receiver _rx
    cdef Transmitter _tx
    cdef Linger _linger
    cdef int _rx_buffers  # how many the next turn may fill
    cdef uint64_t _processed  # of the datagrams in RX_DATAGRAMS, those that Python is done with
    cdef int _breath  # datagrams until the next look at the clock
    cdef int64_t _turn_ns  # when the turn, or the part since the last breath, began
    cdef int64_t _meminfo_ns

    def __cinit__(self):
        self._wake_read = -1
        self.wakeup_fd = -1

    def __init__(
        self,
        int fd,
        handlers,
        batch_handlers,
        Slot slot not None,
        on_handler_error,
        *,
        coroutine_handlers=None,
        on_icmp_error=None,
        bint gro=True,
        bint gso=True,
        double linger_s=0.0,
    ):
        cdef int on = gro
        cdef int ends[2]
        if self._stats != NULL:
            raise RuntimeError("a DatagramLoop cannot be initialised twice")
        self._fd = fd
        self._slot = slot
        self._stats = slot.data
        self._on_handler_error = on_handler_error
        self._on_icmp_error = on_icmp_error
        self._routes = {}
        self._versions = {}
        self._batched = []
        self._failures = (Exception,)
        for magic, handler in handlers.items():
            self._add_route(magic, handler, None)
        for magic, handler in batch_handlers.items():
            self._add_route(magic, handler, [])
        for magic, handler in (coroutine_handlers or {}).items():
            self._add_route(magic, handler, None, True)
        self._processed = self._stats.counters[RX_DATAGRAMS]
        self._stats.counters[HANDLED] = self._processed
        self._rx_buffers = RX_BATCH
        linger_open(&self._linger, <int64_t>(linger_s * 1e9))
        if not (
            receiver_open(&self._rx, fd, &self._stats.flight)
            and transmitter_open(&self._tx, fd, gso, self._stats.counters, &self._stats.flight)
        ):
            raise MemoryError
        if linux.pipe2(ends, linux.O_CLOEXEC | linux.O_NONBLOCK) < 0:
            raise OSError(errno, f"pipe2: {os.strerror(errno)}")
        self._wake_read = ends[0]
        self.wakeup_fd = ends[1]
        # Fails with ENOPROTOOPT before Linux 5.0; then every datagram has a buffer of its own. Set in
        # either case: the socket may have had another loop before, which left it on.
        self.gro = linux.setsockopt(fd, linux.SOL_UDP, linux.UDP_GRO, &on, sizeof(on)) == 0 and gro
        on = 1
        # Each fails on a socket of the other family, and that is fine.
        linux.setsockopt(fd, linux.IPPROTO_IP, linux.IP_RECVERR, &on, sizeof(on))
        linux.setsockopt(fd, linux.IPPROTO_IPV6, linux.IPV6_RECVERR, &on, sizeof(on))

    def __dealloc__(self):
        receiver_close(&self._rx)
        transmitter_close(&self._tx)
        if self._wake_read >= 0:
            linux.close(self._wake_read)
            linux.close(self.wakeup_fd)

    @property
    def gso(self):
        return self._tx.gso

    def run(self):
        cdef int64_t deadline
        cdef int64_t linger_ns
        self._begin()
        try:
            while not self._stopping:
                linger_ns = self._turn()
                if linger_ns > 0:
                    self._sleep(linger_ns)
                elif linger_ns < 0 and not self._stopping:
                    self._wait()
                PyErr_CheckSignals()
            deadline = monotonic_ns() + self._drain_ns
            while monotonic_ns() < deadline:
                if self._hand_over:
                    self._flush()
                if self._hand_over or (self._turn() < 0 and self._rx.used == 0):
                    if self._tx.queued == 0:
                        break
                    self._wait()
                PyErr_CheckSignals()
            drop_queued(&self._tx)
            self._count_handled()
        finally:
            self._running = False

    def turn(self):
        cdef uint64_t before = self._stats.counters[RX_DATAGRAMS]
        self._begin()
        try:
            if self._turn() < 0 and self._rx.used == 0:
                # Whoever polled the socket may have been woken by its error queue.
                self._read_icmp_errors()
        finally:
            self._running = False
        return self._stats.counters[RX_DATAGRAMS] - before

    def fileno(self):
        return self._fd

    @property
    def suspended(self):
        return self._suspended

    @property
    def queued_replies(self):
        return self._tx.queued

    def attach(self, new_spare, continue_):
        from asyncio import CancelledError  # whose loop this is attached to

        self._failures = (Exception, CancelledError)
        self._new_spare = new_spare
        self._continue = continue_

    def answer(self, Message message not None, result):
        """The reply of a coroutine that had waited, or its exception."""
        cdef linux.msghdr to
        cdef bytes header
        try:
            if isinstance(result, BaseException):
                raise result
            if result is not None:
                header = encode(message.magic, message.version)
                to.msg_name = &message._address
                to.msg_namelen = message._address_bytes
                self._reply(message.magic, result, <const uint8_t *>PyBytes_AS_STRING(header),
                            PyBytes_GET_SIZE(header), &to)
        except self._failures as error:
            self._handler_failed(message.magic, message, error)
        finally:  # after the reply is queued, or it would be counted as done in between
            self._suspended -= 1
            self._count_handled()

    def flush(self):
        self._flush()

    def beat(self):
        self._stats.heartbeat_ns = monotonic_ns()

    def stop(self, double drain_s=0.0, *, bint hand_over=False):
        cdef char byte = 0
        self._drain_ns = <int64_t>(drain_s * 1e9)
        self._hand_over = hand_over
        self._stopping = True
        # A full pipe wakes the loop as well, so the result does not matter.
        linux.write(self.wakeup_fd, &byte, 1)

    cdef int _begin(self) except -1:
        if self._running:
            raise RuntimeError("this loop runs already")
        self._running = True
        return 0

    cdef int _add_route(self, str magic, object handler, list pending, bint is_coroutine=False) except -1:
        cdef _Route route = _Route.__new__(_Route)
        route.key = magic.encode("ascii")
        route.magic = magic
        route.handler = handler
        route.pending = pending
        route.is_coroutine = is_coroutine
        if route.key in self._routes:
            raise ValueError(f"two handlers for {magic!r}")
        self._routes[route.key] = route
        if pending is not None:
            self._batched.append(route)
        return 0

    cdef int _wait(self) except -1:
        """Sleep until a datagram, room for a reply, a wake-up or the next heartbeat is due."""
        cdef linux.pollfd waits[2]
        cdef char waste[64]
        cdef int ready, error
        cdef int timeout_ms = IDLE_TICK_MS
        waits[0].fd = self._fd
        waits[0].events = 0 if self._stopping and self._hand_over else linux.POLLIN
        if self._tx.blocked == EAGAIN:
            waits[0].events |= linux.POLLOUT
        elif self._tx.blocked:
            timeout_ms = NO_MEMORY_TICK_MS
        waits[1].fd = self._wake_read
        waits[1].events = linux.POLLIN
        with nogil:
            ready = linux.poll(waits, 2, timeout_ms)
            error = errno
            if ready > 0 and waits[1].revents:
                while linux.read(self._wake_read, waste, sizeof(waste)) == sizeof(waste):
                    pass
        if ready < 0 and error != EINTR:
            raise OSError(error, f"poll: {os.strerror(error)}")
        if ready > 0 and waits[0].revents & linux.POLLERR:
            self._read_icmp_errors()
        return 0

    cdef int _sleep(self, int64_t linger_ns) noexcept:
        cdef linux.timespec time
        self._stats.counters[LINGERS] += 1
        time.tv_sec = linger_ns // 1000000000
        time.tv_nsec = linger_ns % 1000000000
        with nogil:
            linux.clock_nanosleep(linux.CLOCK_MONOTONIC, 0, &time, NULL)
        return 0

    cdef int64_t _turn(self) except -2:
        """Take, hand out and answer one batch.

        What to do then: 0, turn again at once; more, linger for so many ns first; -1, wait.
        """
        cdef SlotData *stats = self._stats
        cdef int i, filled
        cdef int asked = self._rx_buffers
        cdef bint full
        cdef int64_t begun_ns, now_ns, linger_ns
        cdef uint64_t before = stats.counters[RX_DATAGRAMS]
        cdef unsigned int taken
        with nogil:
            filled = receive(&self._rx, asked, &stats.counters[RX_DATAGRAMS])
        begun_ns = self._turn_ns = stats.heartbeat_ns = monotonic_ns()
        if filled < 0:
            self._receive_failed(-filled)
            if self._tx.queued:
                self._flush()
            self._look_at_queue(begun_ns)
            if filled != -EAGAIN:
                return 0
            # A linger that found nothing was in vain; else the answer is 0.
            linger_after(&self._linger, 0, False, begun_ns, begun_ns)
            return -1
        taken = stats.counters[RX_DATAGRAMS] - before
        self._breath = BREATH_DATAGRAMS
        try:
            for i in range(filled):
                self._hand_out_buffer(&self._rx.headers[i])
            if self._batched:
                self._call_batch_handlers()
        finally:
            # Also when a handler ends the loop: what is answered is sent.
            if self._spare is not None:
                self._leave_spare()
            self._flush()
        if self._tx.met_icmp_error:
            # A loop under load never polls, and what waits there takes room from datagrams.
            self._read_icmp_errors()
        stats.counters[TURNS] += 1
        now_ns = stats.heartbeat_ns = monotonic_ns()
        self._measure(taken, filled, now_ns - begun_ns)
        self._look_at_queue(now_ns)
        # A batch that is not full has emptied the queue.
        full = filled == asked
        linger_ns = linger_after(&self._linger, taken, full, begun_ns, now_ns)
        return 0 if full else linger_ns or -1

    cdef int _receive_failed(self, int error) except -1:
        if may_be_icmp(error):
            self._read_icmp_errors()
        elif error != EAGAIN and error != EINTR and error != ENOMEM and error != ENOBUFS:
            raise OSError(error, f"recvmmsg: {os.strerror(error)}")
        return 0

    cdef void _measure(self, unsigned int taken, int filled, int64_t took_ns) noexcept nogil:
        cdef SlotData *stats = self._stats
        stats.batch_datagrams[bucket(taken, BATCH_BUCKETS)] += 1
        stats.turn_us[bucket(took_ns // 1000, TURN_BUCKETS)] += 1
        if took_ns > TURN_BUDGET_NS:
            self._rx_buffers = max(1, self._rx_buffers // 2)
        elif filled == self._rx_buffers and took_ns < TURN_BUDGET_NS // 4:
            self._rx_buffers = min(RX_BATCH, 2 * self._rx_buffers)

    cdef void _look_at_queue(self, int64_t now_ns) noexcept nogil:
        """The kernel's drops, once a second."""
        cdef uint32_t memory[MEMINFO_VARS]
        cdef linux.socklen_t size = sizeof(memory)
        cdef SlotData *stats = self._stats
        if now_ns - self._meminfo_ns < MEMINFO_INTERVAL_NS:
            return
        self._meminfo_ns = now_ns
        if linux.getsockopt(self._fd, linux.SOL_SOCKET, linux.SO_MEMINFO, memory, &size) == 0:
            stats.counters[RX_KERNEL_DROPS] += <uint32_t>(
                memory[MEMINFO_DROPS] - <uint32_t>stats.kernel_drops_raw
            )
            stats.kernel_drops_raw = memory[MEMINFO_DROPS]

    cdef int _read_icmp_errors(self) except -1:
        """Empty the socket's error queue, or a part of it."""
        cdef linux.msghdr header
        cdef linux.sockaddr_storage about
        cdef linux.iovec vector
        cdef uint8_t data[8]
        cdef uint8_t control[512]
        cdef linux.cmsghdr *part
        cdef linux.sock_extended_err *error
        cdef int i
        vector.iov_base = data
        vector.iov_len = sizeof(data)
        self._tx.met_icmp_error = False
        for i in range(ICMP_BATCH):
            memset(&header, 0, sizeof(header))
            header.msg_name = &about
            header.msg_namelen = sizeof(about)
            header.msg_iov = &vector
            header.msg_iovlen = 1
            header.msg_control = control
            header.msg_controllen = sizeof(control)
            if linux.recvmsg(self._fd, &header, linux.MSG_ERRQUEUE | linux.MSG_DONTWAIT) < 0:
                return 0
            part = linux.CMSG_FIRSTHDR(&header)
            while part != NULL:
                if is_extended_error(part):
                    error = <linux.sock_extended_err *>linux.CMSG_DATA(part)
                    if error.ee_origin in (linux.SO_EE_ORIGIN_ICMP, linux.SO_EE_ORIGIN_ICMP6):
                        self._stats.counters[ICMP_ERRORS] += 1
                        if self._on_icmp_error is not None:
                            self._on_icmp_error(
                                address_of(<linux.sockaddr *>&about), <int>error.ee_errno
                            )
                part = linux.CMSG_NXTHDR(&header, part)
        return 0

    cdef int _breathe(self) except -1:
        """Within a turn that takes long: what would otherwise wait for its end."""
        cdef int64_t now_ns
        self._breath = BREATH_DATAGRAMS
        now_ns = monotonic_ns()
        if now_ns - self._turn_ns > TURN_BUDGET_NS:
            self._turn_ns = self._stats.heartbeat_ns = now_ns
            self._flush()
            PyErr_CheckSignals()
        return 0

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
            self._breath -= 1
            if self._breath == 0:
                self._breathe()
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
            if route.is_coroutine:
                self._step(route, message, data, header_bytes, header)
                return 0
            result = route.handler(message)
            if result is not None:
                self._reply(route.magic, result, data, header_bytes, header)
        except self._failures as error:
            self._handler_failed(route.magic, message, error)
        return 0

    cdef int _step(
        self, _Route route, Message message, const uint8_t *data, size_t header_bytes, linux.msghdr *header
    ) except -1:
        """The first step of a coroutine, and mostly the only one."""
        cdef PyObject *out = NULL
        cdef PySendResult status
        if self._spare is None:
            self._enter_spare()
        coroutine = route.handler(message)
        status = PyIter_Send(coroutine, None, &out)
        if status == PYGEN_ERROR:
            try:
                raise_pending()
            finally:  # where the error is kept aside: Python must not run with one set
                self._check_context()
        result = <object>out
        Py_DECREF(result)
        if status == PYGEN_NEXT:
            self._suspended += 1
            spare = self._spare
            self._leave_spare()
            self._continue(spare, coroutine, result, message)
            return 0
        self._check_context()
        if result is not None:
            self._reply(route.magic, result, data, header_bytes, header)
        return 0

    cdef int _enter_spare(self) except -1:
        if self._new_spare is None:
            raise RuntimeError("coroutine handlers need an event loop: see attach()")
        spare = self._new_spare()
        spare.enter()
        PyContext_Enter(spare.context)
        self._spare = spare
        return 0

    cdef int _leave_spare(self) except -1:
        spare = self._spare
        self._spare = None
        PyContext_Exit(spare.context)
        spare.leave()
        return 0

    cdef int _check_context(self) except -1:
        """The next message must not see the context variables that this one has set."""
        if self._spare.context != self._spare.clean_context:
            spare = self._spare
            self._leave_spare()
            spare.discard()
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
                self._handler_failed(route.magic, batch[0], error)
        return 0

    cdef int _handler_failed(self, str magic, Message message, object error) except -1:
        self._stats.counters[HANDLER_ERRORS] += 1
        self._on_handler_error(magic, message.sender, error)
        return 0

    cdef int _reply(
        self, str asked, object result, const uint8_t *request, size_t header_bytes, linux.msghdr *to
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
                f"the handler of {asked!r} returned {type(result).__name__}; "
                "it must return bytes, a Message or None"
            )
        return 0

    cdef uint8_t *_queue(self, size_t size, linux.msghdr *to) noexcept:
        """Room for a reply of ``size`` bytes, or NULL when it is counted as dropped instead."""
        cdef uint8_t address[TX_ADDRESS_BYTES]
        cdef linux.socklen_t address_bytes = min(to.msg_namelen, <linux.socklen_t>TX_ADDRESS_BYTES)
        cdef uint8_t *at
        if size > MAX_DATAGRAM_BYTES:
            self._stats.counters[TX_DROPPED_TOO_BIG] += 1
            return NULL
        memset(address, 0, TX_ADDRESS_BYTES)
        memcpy(address, to.msg_name, address_bytes)
        at = transmit_room(&self._tx, size, address, address_bytes)
        if at == NULL:
            self._flush()
            at = transmit_room(&self._tx, size, address, address_bytes)
            if at == NULL:
                self._stats.counters[TX_DROPPED_FULL] += 1
        return at

    cdef int _flush(self) noexcept:
        if self._tx.queued:
            # From here on transmit() counts on.
            self._count_handled()
            with nogil:
                transmit(&self._tx)
        self._count_handled()
        return 0

    cdef void _count_handled(self) noexcept:
        cdef Py_ssize_t unfinished = self._tx.queued + self._suspended
        for route in self._batched:
            unfinished += len((<_Route>route).pending)
        self._stats.counters[HANDLED] = self._processed - unfinished


cdef int raise_pending() except -1:
    """For an error that C has set already."""
    return -1


cdef inline int64_t monotonic_ns() noexcept nogil:
    cdef linux.timespec now
    linux.clock_gettime(linux.CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef inline int bucket(uint64_t value, int buckets) noexcept nogil:
    """The power of two at or below the value, 0 for 0, and the last bucket for all that is above."""
    cdef int i = 0
    while value > 1 and i < buckets - 1:
        value >>= 1
        i += 1
    return i


cdef inline bint is_extended_error(linux.cmsghdr *part) noexcept nogil:
    return part.cmsg_len >= linux.CMSG_LEN(sizeof(linux.sock_extended_err)) and (
        (part.cmsg_level == linux.IPPROTO_IP and part.cmsg_type == linux.IP_RECVERR)
        or (part.cmsg_level == linux.IPPROTO_IPV6 and part.cmsg_type == linux.IPV6_RECVERR)
    )


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
