"""Declarations of _dispatch.pyx for the loop."""

cimport cython
from libc.stdint cimport uint8_t, uint64_t

cimport peerd.linux_udp as linux
from peerd._coroutines cimport Coroutines
from peerd._envelope cimport Codec, Message
from peerd._scoreboard cimport Waiting
from peerd.destination cimport Destination
from peerd.outbox cimport Outbox


@cython.final
cdef class Route:
    """Where the messages of one magic code go."""

    cdef object handler
    cdef list pending  # the batch of this turn; None when each message has its own call
    cdef bint is_coroutine
    cdef uint64_t waiting  # coroutines
    cdef uint64_t max_waiting
    cdef uint64_t dropped  # since take_dropped()
    cdef unsigned int waiting_row  # of the scoreboard


@cython.final
cdef class Dispatcher:
    cdef Outbox *_outbox
    cdef uint64_t *_counters
    cdef Waiting *_waiting
    cdef Codec _codec
    cdef Coroutines _coroutines
    cdef object _on_handler_error
    cdef dict _routes
    cdef list _batched
    cdef tuple _failures  # exceptions that cost their message and nothing else

    cdef int open(self, Outbox *outbox, Waiting *waiting) except -1
    cdef int attach(self, object event_loop, object new_task, object on_suspended, object on_ended) except -1
    cdef int detach(self) except -1
    cdef int dispatch(self, const uint8_t *data, size_t size, const Destination *destination,
                      linux.socklen_t address_bytes) except -1
    cdef int end_turn(self) except -1
    cdef int leave_coroutines(self) except -1
    cdef int answer(self, Message message, object result) except -1
    cdef dict take_dropped(self)
    cdef void _count_waiting(self, Route route, int change) noexcept
    cdef int _handler_failed(self, Message message, object error) except -1
