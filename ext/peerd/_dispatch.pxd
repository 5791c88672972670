"""What the loop uses of _dispatch.pyx."""

cimport cython
from libc.stdint cimport uint8_t, uint64_t

cimport peerd.linux_udp as linux
from peerd._coroutines cimport Coroutines
from peerd._envelope cimport Codec, Message
from peerd._scoreboard cimport Waiting
from peerd.outbox cimport Outbox


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
    cdef int attach(self, object new_spare, object continue_) except -1
    cdef int dispatch(self, const uint8_t *data, size_t size, linux.msghdr *header) except -1
    cdef int end_turn(self) except -1
    cdef int leave_coroutines(self) except -1
    cdef int answer(self, Message message, object result) except -1
    cdef int _handler_failed(self, Message message, object error) except -1
