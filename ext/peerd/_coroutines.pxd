"""What the dispatcher uses of _coroutines.pyx."""

cimport cython

from peerd._envelope cimport Message

cdef object SUSPENDED


@cython.final
cdef class Coroutines:
    cdef object _new_spare
    cdef object _continue
    cdef object _spare  # entered as the current task and context, or None

    cdef object step(self, object handler, Message message)
    cdef int leave(self) except -1
    cdef int _enter_spare(self) except -1
    cdef int _discard_if_changed(self) except -1
