"""Coroutine handlers: their first step, and mostly their only one.

An event loop drives the datagram loop then, instead of run() (peerd/serving/async_server.py). A
coroutine is stepped as soon as its message is dispatched, as asyncio's eager tasks are (Python 3.12),
and most end in that step: they cost no task and no iteration of the event loop. While it is stepped,
the current task and context are those of a spare task; a coroutine that waits for something takes the
spare with it, and the spare steps it from there on. So asyncio.timeout(), task groups and context
variables work as in any task.
"""

cimport cython
from cpython.contextvars cimport PyContext_Enter, PyContext_Exit
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF

from peerd._envelope cimport Message

cdef extern from "Python.h":
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT

    PySendResult PyIter_Send(object, object, PyObject **)

cdef object SUSPENDED = object()


@cython.final
cdef class Coroutines:
    """``new_spare`` and ``continue_`` are as for DatagramLoop.attach; None before that."""

    def __init__(self, new_spare=None, continue_=None):
        self._new_spare = new_spare
        self._continue = continue_

    cdef object step(self, object handler, Message message):
        """What the handler returned, or SUSPENDED when its coroutine waits for something."""
        cdef PyObject *out = NULL
        cdef PySendResult status
        if self._spare is None:
            self._enter_spare()
        coroutine = handler(message)
        status = PyIter_Send(coroutine, None, &out)
        if status == PYGEN_ERROR:
            try:
                raise_pending()
            finally:  # where the error is kept aside: Python must not run with one set
                self._discard_if_changed()
        result = <object>out
        Py_DECREF(result)
        if status == PYGEN_NEXT:
            spare = self._spare
            self.leave()
            self._continue(spare, coroutine, result, message)
            return SUSPENDED
        self._discard_if_changed()
        return result

    cdef int leave(self) except -1:
        """The spare, if it was entered, is no longer the current task."""
        spare = self._spare
        if spare is not None:
            self._spare = None
            PyContext_Exit(spare.context)
            spare.leave()
        return 0

    cdef int _enter_spare(self) except -1:
        if self._new_spare is None:
            raise RuntimeError("coroutine handlers need an event loop: see attach()")
        spare = self._new_spare()
        spare.enter()
        PyContext_Enter(spare.context)
        self._spare = spare
        return 0

    cdef int _discard_if_changed(self) except -1:
        """The next message must not see the context variables that this one has set."""
        if self._spare.context != self._spare.clean_context:
            spare = self._spare
            self.leave()
            spare.discard()
        return 0


cdef int raise_pending() except -1:
    """For an error that C has set already."""
    return -1
