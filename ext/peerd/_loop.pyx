"""The datagram loop: sockets, turns, the heartbeat, ICMP errors, and the end.

A datagram passes through four parts in one direction:

    _loop -> _dispatch -> _envelope, where a route for envelopes exists
                       -> _coroutines, where the handler is one

and its reply goes into the outbox (outbox.pxd), which this loop sends. One turn takes what one
recvmmsg gives, dispatches each datagram, and sends the replies. Everything a turn needs is allocated
when the loop is made: a turn allocates the messages and nothing else. receive.pxd, transmit.pxd and
linger.pxd hold the parts that know nothing of Python, each with its theory.

Turns are bounded: in datagrams by RX_BATCH buffers, in time by fewer buffers in the turn after one
that took longer than TURN_BUDGET_NS. Within a turn the loop reads the clock every CLOCK_CHECK_INTERVAL
datagrams. Over budget, it sends the replies, writes the heartbeat and runs Python's signal handlers. So
neither a flood nor a sum of slow handlers starves anything; the supervisor deals with a single call
that never returns.

Counting. RX_DATAGRAMS grows when recvmmsg returns, HANDLED when a datagram needs nothing more
(outbox.pxd): the difference is what a SIGKILL would lose, and flight.pxd makes that exact for one that
comes within a system call. The identity

    rx_datagrams = rx_messages + rx_own + rx_truncated + decode_* + unknown_magic + rx_max_waiting

holds after each turn. The kernel's own drops are counted by the owner of the socket, who reads SO_MEMINFO
(supervisor/socket_queue.py): SO_RXQ_OVFL would cost a control message on each datagram after the first drop
(85 ns), and shows nothing while nothing arrives.

ICMP errors. With IP_RECVERR they wait in a queue of the socket, with the address that each is about,
and poll() reports POLLERR. Without it, an error would fail the next call, whatever that call is about.
They are counted, and passed to on_icmp_error if there is one.

Waking up. The loop polls the socket and a pipe. stop() writes to the pipe, and so does CPython's C
signal handler if the owner calls signal.set_wakeup_fd(loop.wakeup_fd): a signal that arrives just
before poll() wakes it. After every turn PyErr_CheckSignals runs the Python handlers.

Rejected: one malloc per datagram (the allocator is then half the cost), MSG_WAITFORONE on a blocking
socket (a stop request from another thread would wait for the next datagram), io_uring (within 1 % of
recvmmsg, and often forbidden in containers).
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EINTR, ENOBUFS, ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

cimport peerd.linux_udp as linux
from peerd._dispatch cimport Dispatcher
from peerd._envelope cimport Message
from peerd._scoreboard cimport (
    BATCH_BUCKETS, ICMP_ERRORS, LINGERS, RX_DATAGRAMS, RX_OWN, RX_TRUNCATED, TURN_BUCKETS, TURNS, Scoreboard,
    Slot, SlotData,
)
from peerd.destination cimport Destination, read_local, report_local_addresses
from peerd.flight cimport RX_BATCH
from peerd.icmp cimport may_be_icmp
from peerd.linger cimport Linger, linger_after, linger_open
from peerd.loop_guard cimport guard_open, is_from_self
from peerd.outbox cimport Outbox, drop_replies, flush, outbox_close, outbox_open
from peerd.receive cimport Receiver, is_cut_off, receive, receiver_close, receiver_open, segments, stride_of
from peerd.sockaddr cimport address_of
from peerd.transmit cimport DROP_REASONS, Drops

import os

from peerd.settings import DEFAULT_MAX_REPLY_RATE

# In the order of transmit.DropReason.
DROP_REASON_NAMES = ("full", "too_big", "refused", "congested", "loop", "rate")

cdef enum:
    # How long an idle loop sleeps before it writes its heartbeat.
    IDLE_TICK_MS = 250
    # How soon deferred replies are tried again: poll() does not report room on one way out.
    DEFERRED_TICK_MS = 1
    TURN_BUDGET_NS = 2000000
    CLOCK_CHECK_INTERVAL = 16  # datagrams
    # ICMP errors that are read from the error queue in one go.
    ICMP_BATCH = 64


@cython.final
cdef class DatagramLoop:
    """Receives on a bound UDP socket, calls handlers and sends their replies, in one thread."""

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
    cdef object _on_icmp_error
    cdef object _on_replies_dropped
    cdef Dispatcher _dispatcher
    cdef Receiver _rx
    cdef Outbox _outbox
    cdef Linger _linger
    cdef Destination _source  # of the datagrams in a buffer, as the destination of replies to them
    cdef bint _reports_local
    cdef int _rx_buffers  # how many the next turn may fill
    cdef int _until_clock_check  # datagrams
    cdef int64_t _turn_ns  # when the turn, or its part since the budget was last exceeded, began

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
        max_waiting=None,
        on_icmp_error=None,
        on_replies_dropped=None,
        bint gro=True,
        bint gso=True,
        double linger_s=0.0,
        uint64_t max_reply_rate=DEFAULT_MAX_REPLY_RATE,
    ):
        cdef int on = gro
        cdef int ends[2]
        if self._stats != NULL:
            raise RuntimeError("a DatagramLoop cannot be initialised twice")
        self._fd = fd
        self._slot = slot
        self._stats = slot.data
        self._on_icmp_error = on_icmp_error
        self._on_replies_dropped = on_replies_dropped
        self._dispatcher = Dispatcher(
            handlers, batch_handlers, coroutine_handlers or {}, max_waiting or {}, on_handler_error
        )
        self._rx_buffers = RX_BATCH
        linger_open(&self._linger, <int64_t>(linger_s * 1e9))
        if not (
            receiver_open(&self._rx, fd, &self._stats.flight)
            and outbox_open(&self._outbox, fd, gso, self._stats)
        ):
            raise MemoryError
        guard_open(
            &self._outbox.guard,
            fd,
            slot.data - slot.index,
            slot.index,
            &(<Scoreboard>slot._board)._board.slot_count,
            max_reply_rate,
            max_reply_rate != <uint64_t>DEFAULT_MAX_REPLY_RATE,
        )
        self._reports_local = self._outbox.guard.is_wildcard
        report_local_addresses(fd, self._reports_local)
        if self._reports_local:
            self._outbox.tx.family = self._outbox.guard.family
        else:
            memcpy(&self._source.local.ipi6_addr, self._outbox.guard.own.address, 16)
        self._dispatcher.open(&self._outbox, &self._stats.waiting)
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
        outbox_close(&self._outbox)
        if self._wake_read >= 0:
            linux.close(self._wake_read)
            linux.close(self.wakeup_fd)

    @property
    def gso(self):
        return self._outbox.tx.gso

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
            deadline = linux.monotonic_ns() + self._drain_ns
            while linux.monotonic_ns() < deadline:
                if self._hand_over:
                    self._flush()
                if self._hand_over or (self._turn() < 0 and self._rx.used == 0):
                    if self._outbox.tx.queued == 0:
                        break
                    self._wait()
                PyErr_CheckSignals()
            drop_replies(&self._outbox)
        finally:
            self._running = False

    def turn(self):
        cdef uint64_t before = self._stats.counters[RX_DATAGRAMS]
        self._begin()
        try:
            if self._turn() < 0 and self._rx.used == 0:
                # The error queue may be what woke the event loop.
                self._read_icmp_errors()
        finally:
            self._running = False
        return self._stats.counters[RX_DATAGRAMS] - before

    def fileno(self):
        return self._fd

    @property
    def suspended(self):
        return self._outbox.suspended

    @property
    def queued_replies(self):
        return self._outbox.tx.queued

    def attach(self, event_loop, new_task, on_suspended, on_ended):
        self._dispatcher.attach(event_loop, new_task, on_suspended, on_ended)

    def detach(self):
        self._dispatcher.detach()

    def answer(self, Message message not None, result):
        self._dispatcher.answer(message, result)

    def flush(self):
        self._flush()

    def take_dropped(self):
        return self._dispatcher.take_dropped()

    def set_reading(self, bint is_reading):
        self._stats.waiting.not_reading_since_ns = 0 if is_reading else linux.monotonic_ns()

    def beat(self):
        self._stats.heartbeat_ns = linux.monotonic_ns()

    def stop(self, double drain_s=0.0, *, bint hand_over=False):
        cdef char byte = 0
        self._drain_ns = <int64_t>(drain_s * 1e9)
        self._hand_over = hand_over
        self._stopping = True
        # A full pipe wakes the loop as well, so the result does not matter.
        linux.write(self.wakeup_fd, &byte, 1)

    cdef int _begin(self) except -1:
        if self._running:
            raise RuntimeError("this loop is running already")
        self._running = True
        return 0

    cdef int _wait(self) except -1:
        """Sleep until a datagram, room for a reply, a wake-up or the next heartbeat is due."""
        cdef linux.pollfd waits[2]
        cdef char waste[64]
        cdef int ready, error
        cdef int timeout_ms = IDLE_TICK_MS
        waits[0].fd = self._fd
        waits[0].events = 0 if self._stopping and self._hand_over else linux.POLLIN
        if self._outbox.tx.blocked == EAGAIN:
            waits[0].events |= linux.POLLOUT
        if self._outbox.tx.deferred.datagrams:
            timeout_ms = DEFERRED_TICK_MS
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

    cdef int _flush(self) except -1:
        """Send what is queued, and report drops."""
        cdef Drops *drops
        cdef uint64_t count
        cdef int reason
        flush(&self._outbox)
        if not self._outbox.tx.has_drops:
            return 0
        self._outbox.tx.has_drops = False
        for reason in range(<int>DROP_REASONS):
            drops = &self._outbox.tx.drops[reason]
            count, drops.count = drops.count, 0
            if count and self._on_replies_dropped is not None:
                self._on_replies_dropped(
                    DROP_REASON_NAMES[reason],
                    address_of(<linux.sockaddr *>&drops.address),
                    drops.error,
                    count,
                )
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
        """Receive, dispatch and answer one batch.

        Returns what to do next: 0, the next turn; more, linger for that many ns first; -1, wait.
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
        begun_ns = self._turn_ns = stats.heartbeat_ns = linux.monotonic_ns()
        if filled < 0:
            if may_be_icmp(-filled):
                self._read_icmp_errors()
            elif -filled not in (EAGAIN, EINTR, ENOMEM, ENOBUFS):
                raise OSError(-filled, f"recvmmsg: {os.strerror(-filled)}")
            if self._outbox.tx.queued:
                self._flush()
            if filled != -EAGAIN:
                return 0
            # Only to record that a linger found nothing: the result is 0 here.
            linger_after(&self._linger, 0, False, begun_ns, begun_ns)
            return -1
        taken = stats.counters[RX_DATAGRAMS] - before
        self._until_clock_check = CLOCK_CHECK_INTERVAL
        try:
            for i in range(filled):
                self._dispatch_buffer(&self._rx.headers[i])
            self._dispatcher.end_turn()
        finally:
            # Also when a handler ends the loop: replies that are queued are sent.
            self._dispatcher.leave_coroutines()
            self._flush()
        if self._outbox.tx.met_icmp_error:
            # A loop under load never polls, and the error queue takes receive buffer from datagrams.
            self._read_icmp_errors()
        stats.counters[TURNS] += 1
        now_ns = stats.heartbeat_ns = linux.monotonic_ns()
        self._record_turn(taken, filled, now_ns - begun_ns)
        # A batch that is not full has emptied the queue.
        full = filled == asked
        linger_ns = linger_after(&self._linger, taken, full, begun_ns, now_ns)
        return 0 if full else linger_ns or -1

    cdef void _record_turn(self, unsigned int taken, int filled, int64_t took_ns) noexcept nogil:
        cdef SlotData *stats = self._stats
        stats.batch_datagrams[bucket(taken, BATCH_BUCKETS)] += 1
        stats.turn_us[bucket(took_ns // 1000, TURN_BUCKETS)] += 1
        if took_ns > TURN_BUDGET_NS:
            self._rx_buffers = max(1, self._rx_buffers // 2)
        elif filled == self._rx_buffers and took_ns < TURN_BUDGET_NS // 4:
            self._rx_buffers = min(RX_BATCH, 2 * self._rx_buffers)

    cdef int _read_icmp_errors(self) except -1:
        """Count up to ICMP_BATCH errors of the socket's error queue."""
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
        self._outbox.tx.met_icmp_error = False
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

    cdef int _yield_if_over_budget(self) except -1:
        """In a turn that takes long, do what would otherwise wait for its end."""
        cdef int64_t now_ns
        self._until_clock_check = CLOCK_CHECK_INTERVAL
        now_ns = linux.monotonic_ns()
        if now_ns - self._turn_ns > TURN_BUDGET_NS:
            self._turn_ns = self._stats.heartbeat_ns = now_ns
            flush(&self._outbox)
            PyErr_CheckSignals()
        return 0

    cdef int _dispatch_buffer(self, linux.mmsghdr *received) except -1:
        cdef linux.socklen_t address_bytes
        cdef const uint8_t *data = <const uint8_t *>received.msg_hdr.msg_iov.iov_base
        cdef size_t left = received.msg_len
        cdef size_t stride, size
        if is_cut_off(received):
            self._stats.counters[RX_TRUNCATED] += 1
            self._outbox.processed += 1
            return 0
        address_bytes = min(received.msg_hdr.msg_namelen, <linux.socklen_t>sizeof(self._source.address))
        memset(&self._source.address, 0, sizeof(self._source.address))
        memcpy(&self._source.address, received.msg_hdr.msg_name, address_bytes)
        if is_from_self(&self._outbox.guard, &self._source.address):
            self._stats.counters[RX_OWN] += segments(received)
            self._outbox.processed += segments(received)
            return 0
        if self._reports_local:
            read_local(&received.msg_hdr, &self._source.local)
        stride = stride_of(received)
        while True:
            size = stride if stride < left else left
            self._dispatcher.dispatch(data, size, &self._source, address_bytes)
            self._outbox.processed += 1
            self._until_clock_check -= 1
            if self._until_clock_check == 0:
                self._yield_if_over_budget()
            data += size
            left -= size
            if left == 0:
                return 0


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
