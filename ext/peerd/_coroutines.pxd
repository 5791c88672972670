"""Declarations of _coroutines.pyx for the dispatcher."""

cimport cython
from cpython.object cimport PyObject

from peerd._envelope cimport Message

cdef object SUSPENDED


@cython.final
cdef class Spare:
    cdef public bint was_seen
    cdef object _task
    cdef object _context
    cdef object _clean_context
    cdef object _parked
    cdef object _on_ended
    cdef bint _is_finished
    cdef object _coroutine  # None while this is a spare
    cdef object _awaited  # what the coroutine waits for
    cdef bint _owes_awaited  # the task has not been given it yet
    cdef Message _message
    cdef Py_ssize_t _task_references
    cdef Py_ssize_t _context_references
    cdef PyObject *_weak_reference

    cdef void record_references(self) noexcept
    cdef bint is_untouched(self)
    cdef int take_over(self, object coroutine, object awaited, Message message) except -1
    cdef int finish(self) except -1
    cdef int _unpark(self) except -1
    cdef object _take_awaited(self)
    cdef object _step(self, object step, object value)


@cython.final
cdef class Coroutines:
    cdef bint is_entered  # the spare is the current task
    cdef object _event_loop
    cdef object _new_task
    cdef object _enter_task
    cdef object _leave_task
    cdef object _on_suspended
    cdef object _on_ended
    cdef Spare _spare  # for the next coroutine, or None

    cdef object step(self, object handler, Message message)
    cdef int leave(self) except -1
    cdef int discard(self) except -1
    cdef int _enter(self) except -1
    cdef int _discard_if_touched(self) except -1
