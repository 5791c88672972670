"""Routes: finds the handler of a datagram, calls it, and deals with its result or exception.

The codec is asked about every datagram of an app with envelope handlers; no other part parses one.
"""

cimport cython
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy, memset

cimport peerd.linux_udp as linux
from peerd._coroutines cimport SUSPENDED, Coroutines
from peerd._envelope cimport Codec, Message
from peerd.destination cimport Destination
from peerd._scoreboard cimport (
    HANDLER_ERRORS, MAX_WAITING_NAME_BYTES, MAX_WAITING_ROWS, RX_BYTES, RX_MAX_WAITING, RX_MESSAGES, Waiting,
)
from peerd.outbox cimport Outbox, count_handled


@cython.final
cdef class Route:
    def __init__(self, handler, bint is_batched, bint is_coroutine):
        self.handler = handler
        self.pending = [] if is_batched else None
        self.is_coroutine = is_coroutine
        self.max_waiting = <uint64_t>-1  # no limit


@cython.final
cdef class Dispatcher:
    """Handlers by magic code. The parameters are those of DatagramLoop."""

    def __init__(self, handlers, batch_handlers, coroutine_handlers, max_waiting, on_handler_error):
        self._routes = routes = {}
        self._batched = []
        for table in (handlers, batch_handlers, coroutine_handlers):
            for magic, handler in table.items():
                if magic in routes:
                    raise ValueError(f"two handlers for {magic!r}")
                routes[magic] = Route(handler, table is batch_handlers, table is coroutine_handlers)
                if table is batch_handlers:
                    self._batched.append(routes[magic])
        for magic, limit in max_waiting.items():
            (<Route>routes[magic]).max_waiting = limit
        self._codec = Codec(routes)
        self._coroutines = Coroutines()
        self._on_handler_error = on_handler_error
        self._failures = (Exception,)

    cdef int open(self, Outbox *outbox, Waiting *waiting) except -1:
        """Both must live for as long as this object."""
        cdef Route route
        self._outbox = outbox
        self._waiting = waiting
        self._counters = self._codec._counters = outbox.counters
        self._codec.local_port = linux.htons(outbox.guard.own.port)
        memset(waiting, 0, sizeof(Waiting))
        for magic, route in self._routes.items():
            route.waiting_row = MAX_WAITING_ROWS
            name = magic.encode("ascii")
            if route.is_coroutine and len(name) <= MAX_WAITING_NAME_BYTES and waiting.rows_used < MAX_WAITING_ROWS:
                memcpy(waiting.names[waiting.rows_used], <const char *>name, len(name))
                route.waiting_row = waiting.rows_used
                waiting.rows_used += 1
        return 0

    cdef int attach(self, object event_loop, object new_task, object on_suspended, object on_ended) except -1:
        """See DatagramLoop.attach."""
        from asyncio import CancelledError  # only a process with an event loop imports asyncio

        self._failures = (Exception, CancelledError)
        self._coroutines = Coroutines(event_loop, new_task, on_suspended, on_ended)
        return 0

    cdef int detach(self) except -1:
        self._coroutines.discard()
        self._coroutines = Coroutines()
        return 0

    cdef int dispatch(self, const uint8_t *data, size_t size, const Destination *destination,
                      linux.socklen_t address_bytes) except -1:
        """Call the handler of one datagram, and queue its reply."""
        cdef Route route
        cdef Message message
        self._counters[RX_BYTES] += size
        message = self._codec.read(data, size, destination, address_bytes)
        if message is None:
            self._codec.count_unread()
            return 0
        route = <Route>self._codec.route
        if route.is_coroutine and route.waiting >= route.max_waiting:
            route.dropped += 1
            self._counters[RX_MAX_WAITING] += 1
            return 0
        self._counters[RX_MESSAGES] += 1
        if route.pending is not None:
            route.pending.append(message)
            self._outbox.batched += 1
            return 0
        try:
            if route.is_coroutine:
                result = self._coroutines.step(route.handler, message)
                if result is SUSPENDED:
                    self._outbox.suspended += 1
                    self._count_waiting(route, 1)
                    return 0
            else:
                if self._coroutines.is_entered:
                    self._coroutines.leave()  # a plain handler has no task
                result = route.handler(message)
            if result is not None:
                self._codec.reply(self._outbox, message, result, data, self._codec.header_bytes)
        except self._failures as error:
            self._handler_failed(message, error)
        return 0

    cdef int end_turn(self) except -1:
        """Call each batch handler that has messages from this turn."""
        cdef Route route
        self._coroutines.leave()
        for route in self._batched:
            if not route.pending:
                continue
            batch = route.pending
            route.pending = []
            self._outbox.batched -= len(batch)
            try:
                result = route.handler(batch)
                if result is not None:
                    raise TypeError(
                        f"the batch handler of {(<Message>batch[0]).magic!r} returned "
                        f"{type(result).__name__}; it must return None"
                    )
            except Exception as error:
                self._handler_failed(batch[0], error)
        return 0

    cdef int leave_coroutines(self) except -1:
        return self._coroutines.leave()

    cdef int answer(self, Message message, object result) except -1:
        """Queue the reply of a coroutine that had waited, or report its exception."""
        try:
            if isinstance(result, BaseException):
                raise result
            self._codec.reply_later(self._outbox, message, result)
        except self._failures as error:
            self._handler_failed(message, error)
        finally:  # after the reply is queued, or the message would count as handled in between
            self._outbox.suspended -= 1
            self._count_waiting(self._routes[message.magic], -1)
            count_handled(self._outbox)
        return 0

    cdef dict take_dropped(self):
        """Magic code to (messages dropped since the last call, its max_waiting)."""
        cdef Route route
        dropped = {}
        for magic, route in self._routes.items():
            if route.dropped:
                dropped[magic] = (route.dropped, route.max_waiting)
                route.dropped = 0
        return dropped

    cdef void _count_waiting(self, Route route, int change) noexcept:
        route.waiting += change
        self._waiting.count += change
        self._waiting.counts[route.waiting_row] += change

    cdef int _handler_failed(self, Message message, object error) except -1:
        self._counters[HANDLER_ERRORS] += 1
        self._on_handler_error(message.magic, message.sender, error)
        return 0
