"""Coroutine handlers: their first step, and mostly their only one.

An event loop drives the datagram loop for them (peerd/serving/async_server.py). A coroutine is stepped
as soon as its message is dispatched, and most end in that step. Meanwhile the current task and context
are those of a *spare*: a task that is parked in the event loop. A coroutine that waits takes the spare
with it, and the spare's task steps it from there on. So asyncio.timeout(), task groups and context
variables work as in any task, and a handler that does not wait costs neither a task nor an iteration of
the event loop.

Invariant: no message can observe, through its task or context, that another message came before it. A
spare serves the next message only if it is untouched: no new reference or weak reference to the task or
the context, no changed context variable, and no attribute of the task was read or set (SpareTask in
async_server.py records that, so cancel(), set_name(), add_done_callback() and whatever else count). Any
other spare ends with its message, as a task of its own would, and callbacks that were added run.

Rejected: one task per message. On CPython 3.11 a task that goes through the event loop costs 2,000 ns
(uvloop) to 3,400 ns (asyncio) per message; an eager task (3.12 and newer) costs 750 to 910 ns. A spare
costs 90 ns. With 120 ns for all else that is, per second of CPU time, 0.3 to 0.5, 1.0 to 1.1, and 4.8 million
messages: one task per message stays below the 1.5 million for which the simpler code would be worth it.
"""

cimport cython
from cpython.contextvars cimport PyContext_Copy, PyContext_CopyCurrent, PyContext_Enter, PyContext_Exit
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_REFCNT

from peerd._envelope cimport Message

cdef extern from "Python.h":
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT

    PySendResult PyIter_Send(object, object, PyObject **)

cdef extern from *:
    """
    /* The head of the list of weak references to an object. asyncio's own has a callback, so a new one of
       either kind becomes the head (Objects/weakrefobject.c). */
    static PyObject *peerd_first_weak_reference(PyObject *object) {
        Py_ssize_t offset = Py_TYPE(object)->tp_weaklistoffset;
        return offset ? *(PyObject **)((char *)object + offset) : NULL;
    }
    """
    PyObject *peerd_first_weak_reference(object) noexcept

cdef object SUSPENDED = object()
cdef object CancelledError = None  # asyncio is imported only where there is an event loop


@cython.final
cdef class Spare:
    """The coroutine of a spare task: it is parked, then continues as the coroutine of a handler.

    ``was_seen``: an attribute of the task was read or set. ``on_ended`` is called with (task, message,
    result) when the handler has returned or raised; the result is then the exception.
    """

    def __init__(self, new_task, event_loop, on_ended):
        self._context = PyContext_CopyCurrent()
        self._clean_context = PyContext_Copy(self._context)
        self._parked = event_loop.create_future()
        self._on_ended = on_ended
        self._task = new_task(self, self._context)
        self.record_references()
        self._weak_reference = peerd_first_weak_reference(self._task)
        self.was_seen = False

    cdef void record_references(self) noexcept:
        """From here on, any other number of references means that a handler has kept one."""
        self._task_references = Py_REFCNT(self._task)
        self._context_references = Py_REFCNT(self._context)

    cdef bint is_untouched(self):
        """Whether this spare cannot be distinguished from a new one."""
        if (
            self.was_seen
            or Py_REFCNT(self._task) != self._task_references
            or Py_REFCNT(self._context) != self._context_references
            or peerd_first_weak_reference(self._task) != self._weak_reference
        ):
            return False
        try:
            return self._context == self._clean_context
        except Exception:  # two values of a variable that cannot be compared
            return False

    cdef int take_over(self, object coroutine, object awaited, Message message) except -1:
        self._coroutine = coroutine
        self._awaited = awaited
        self._owes_awaited = True
        self._message = message
        return self._unpark()

    cdef int finish(self) except -1:
        """End the task: its message is done."""
        self._is_finished = True
        return self._unpark()

    def send(self, value):
        if self._is_finished:
            raise StopIteration
        if self._coroutine is None:
            return next(self._parked.__await__())
        if self._owes_awaited:
            return self._take_awaited()
        return self._step(self._coroutine.send, value)

    def throw(self, error, *_rest):
        if self._coroutine is None:
            self.was_seen = True
            raise error
        if self._owes_awaited:
            # The task was cancelled before it got the future that the coroutine waits for. A task cancels
            # that future first, and the coroutine gets the error from there.
            awaited = self._take_awaited()
            if awaited is not None and awaited.cancel():
                return awaited
        return self._step(self._coroutine.throw, error)

    def close(self):
        if self._coroutine is not None:
            self._coroutine.close()

    def __await__(self):
        raise TypeError("only a task steps this")

    def __getattr__(self, name):
        """Attributes that debuggers read, such as cr_frame, cr_await and __qualname__."""
        if self._coroutine is None:
            raise AttributeError(name)
        return getattr(self._coroutine, name)

    cdef int _unpark(self) except -1:
        if not self._parked.done():
            self._parked.set_result(None)
        return 0

    cdef object _take_awaited(self):
        awaited = self._awaited
        self._awaited = None
        self._owes_awaited = False
        return awaited

    cdef object _step(self, step, value):
        try:
            return step(value)
        except StopIteration as end:
            result = end.value
        except BaseException as error:
            result = error
        task = self._task
        message = self._message
        self._task = self._coroutine = self._message = None  # the task refers to this object
        self._is_finished = True
        self._on_ended(task, message, result)
        if isinstance(result, CancelledError):
            raise result  # and so the task counts as cancelled
        raise StopIteration


@cython.final
cdef class Coroutines:
    """See DatagramLoop.attach for the parameters; without them no coroutine can be stepped."""

    def __init__(self, event_loop=None, new_task=None, on_suspended=None, on_ended=None):
        global CancelledError
        if event_loop is not None:
            from asyncio import CancelledError
            from asyncio.tasks import _enter_task, _leave_task

            self._enter_task = _enter_task
            self._leave_task = _leave_task
        self._event_loop = event_loop
        self._new_task = new_task
        self._on_suspended = on_suspended
        self._on_ended = on_ended

    cdef object step(self, object handler, Message message):
        """The result of the handler, or SUSPENDED when its coroutine waits for something."""
        cdef PyObject *out = NULL
        cdef PySendResult status
        if not self.is_entered:
            self._enter()
        coroutine = handler(message)
        status = PyIter_Send(coroutine, None, &out)
        if status == PYGEN_ERROR:
            try:
                raise_pending()
            finally:  # where the error is kept aside: Python must not run with one set
                self._discard_if_touched()
        result = <object>out
        Py_DECREF(result)
        if status == PYGEN_NEXT:
            spare = self._spare
            self.leave()
            self._spare = None
            spare.take_over(coroutine, result, message)
            self._on_suspended(spare._task, message)
            return SUSPENDED
        self._discard_if_touched()
        return result

    cdef int leave(self) except -1:
        """The spare, if it was entered, is no longer the current task."""
        if self.is_entered:
            self.is_entered = False
            PyContext_Exit(self._spare._context)
            self._leave_task(self._event_loop, self._spare._task)
            self._spare.record_references()
        return 0

    cdef int discard(self) except -1:
        """End the spare, if there is one."""
        spare = self._spare
        if spare is not None:
            self.leave()
            self._spare = None
            spare.finish()
        return 0

    cdef int _enter(self) except -1:
        if self._event_loop is None:
            raise RuntimeError("coroutine handlers need an event loop: see attach()")
        self._discard_if_touched()
        if self._spare is None:
            self._spare = Spare(self._new_task, self._event_loop, self._on_ended)
        self._enter_task(self._event_loop, self._spare._task)
        PyContext_Enter(self._spare._context)
        self._spare.record_references()
        self.is_entered = True
        return 0

    cdef int _discard_if_touched(self) except -1:
        if self._spare is not None and not self._spare.is_untouched():
            self.discard()
        return 0


cdef int raise_pending() except -1:
    """For an error that C has set already."""
    return -1
