"""Turns a DatagramLoop from an event loop, for apps with coroutine handlers.

The event loop says when the socket can be read; one turn takes a bounded batch, and what is left is
told again at the next iteration, so the app's own timers and tasks run between turns.

The core steps each coroutine at once, and most end in that step. Meanwhile a spare task is the current
one, and its context is what the coroutine runs in. A coroutine that waits for something takes the
spare with it: the spare hands what is awaited to its event loop, as if the coroutine had been its own
from the beginning, and steps it from there on. The next coroutine gets a new spare. (Python 3.12's
eager tasks do the same with a task for each; here a handler that does not wait costs none.)

Coroutines that wait are bounded: above MAX_SUSPENDED the socket is not read, and datagrams wait in the
kernel's buffer, until half of them have ended. That holds in a drain, too.

The end of a worker waits for jobs in the event loop's executor, even for those that nobody awaits.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import signal
import time
from asyncio.tasks import _enter_task, _leave_task
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any

from peerd._envelope import Message, Reply
from peerd._loop import DatagramLoop
from peerd.signals import HAND_OVER

if TYPE_CHECKING:
    from peerd._loop import _Spare

MAX_SUSPENDED = 10_000

HEARTBEAT_S = 0.25
"""How often an idle loop is turned, so that its heartbeat goes on."""

FLUSH_S = 0.5
"""What the last replies have beyond the end of a drain."""

BLOCKED_RETRY_S = 0.001
"""How soon a reply that the kernel did not take is tried again."""


def run(core: DatagramLoop, on_serving: Callable[[], None], drain_timeout_s: float) -> None:
    """Serve in an event loop of this thread until SIGTERM; then drain, for ``drain_timeout_s``.

    HAND_OVER ends it as well, and leaves the queue to a successor.

    uvloop's event loop when it is installed, else asyncio's. Raises what ends the core: OSError, or
    what a handler raises beside Exception.
    """
    with asyncio.Runner(loop_factory=_new_event_loop) as runner:
        runner.run(AsyncServer(core).serve(on_serving, drain_timeout_s))


class AsyncServer:
    """See the head of this file."""

    def __init__(self, core: DatagramLoop) -> None:
        self._core = core
        self._events: asyncio.AbstractEventLoop
        self._end: asyncio.Future[None]
        self._heartbeat: asyncio.TimerHandle
        self._spare: _SpareTask | None = None
        self._continued: set[asyncio.Task[None]] = set()
        self._reading = False
        self._flushing = False
        self._leaves_queue = False
        self._is_over = False
        self._room = asyncio.Event()
        """There are no more coroutines than may wait."""

        self._room.set()

    async def serve(self, on_serving: Callable[[], None], drain_timeout_s: float) -> None:
        """See :func:`run`. ``on_serving`` is called when the loop has turned once."""
        self._events = asyncio.get_running_loop()
        self._end = self._events.create_future()
        self._core.attach(self._take_spare, self._continue)
        self._events.add_signal_handler(signal.SIGTERM, self._stop)
        self._events.add_signal_handler(HAND_OVER, self._hand_over)
        self._heartbeat = self._events.call_later(HEARTBEAT_S, self._keep_heartbeat)
        try:
            await self._turn_in_callback()
            self._read()
            on_serving()
            await self._end
            await self._drain(time.monotonic() + drain_timeout_s)
        finally:
            self._do_not_read()
            self._heartbeat.cancel()
            self._is_over = True
            tasks = list(self._continued)
            if self._spare is not None:
                tasks.append(self._spare.task)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._core.flush()

    def _stop(self) -> None:
        if not self._end.done():
            self._end.set_result(None)

    def _hand_over(self) -> None:
        self._leaves_queue = True
        self._do_not_read()
        self._room.set()  # a drain that waits for it has nothing more to read
        self._stop()

    async def _drain(self, until_s: float) -> None:
        """Serve what the queue holds, then wait for the handlers under way and their replies.

        Where a successor reads on, the queue is left to it, and handlers have all the time that the
        supervisor gives a loop that does not turn (its stuck clock).
        """
        self._do_not_read()
        while not self._leaves_queue and (left_s := until_s - time.monotonic()) > 0:
            if not self._room.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._room.wait(), left_s)
            elif not await self._turn_in_callback():
                break
        if self._continued:
            left_s = max(0.0, until_s - time.monotonic())
            await asyncio.wait(self._continued, timeout=None if self._leaves_queue else left_s)
            until_s = max(until_s, time.monotonic() + FLUSH_S)
        while self._core.queued_replies and time.monotonic() < until_s:
            self._core.flush()
            await asyncio.sleep(BLOCKED_RETRY_S)

    def _keep_heartbeat(self) -> None:
        self._heartbeat = self._events.call_later(HEARTBEAT_S, self._keep_heartbeat)
        if not self._end.done():
            self._turn()

    async def _turn_in_callback(self) -> int:
        """Turn once. Not in this task: a handler is stepped in one of its own, and they do not nest."""
        turned = self._events.create_future()

        def turn() -> None:
            try:
                turned.set_result(self._core.turn())
            except BaseException as error:
                turned.set_exception(error)
            self._note_room()

        self._events.call_soon(turn)
        taken: int = await turned
        return taken

    def _turn(self) -> None:
        if self._leaves_queue:
            return
        if not self._room.is_set():
            self._core.beat()
            return
        try:
            self._core.turn()
        except BaseException as error:
            # An event loop logs what its callbacks raise and goes on, here for ever.
            self._do_not_read()
            if not self._end.done():
                self._end.set_exception(error)
        self._note_room()
        self._flush_later()

    def _note_room(self) -> None:
        if self._core.suspended >= MAX_SUSPENDED and self._room.is_set():
            self._room.clear()
            self._core.set_reading(False)
            self._do_not_read()

    def _read(self) -> None:
        if not self._reading:
            self._events.add_reader(self._core.fileno(), self._turn)
            self._reading = True

    def _do_not_read(self) -> None:
        if self._reading:
            self._events.remove_reader(self._core.fileno())
            self._reading = False

    def _flush_later(self) -> None:
        """One flush for all replies that are given within an iteration of the event loop."""
        if self._core.queued_replies and not self._flushing:
            self._flushing = True
            self._events.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        self._core.flush()
        if self._core.queued_replies:
            self._flushing = True
            self._events.call_later(BLOCKED_RETRY_S, self._flush)

    def _take_spare(self) -> _SpareTask:
        if self._spare is None:
            self._spare = _SpareTask(self._events, self._forget_spare, self._answer)
        return self._spare

    def _forget_spare(self) -> None:
        self._spare = None

    def _answer(self, message: Message, result: Reply | BaseException) -> None:
        """At the end, those that are cancelled stay unfinished: they are lost, and counted so."""
        if not (self._is_over and isinstance(result, asyncio.CancelledError)):
            self._core.answer(message, result)

    def _continue(
        self, spare: _Spare, coroutine: Coroutine[Any, Any, Reply], awaited: Any, message: Message
    ) -> None:
        assert isinstance(spare, _SpareTask)
        self._spare = None
        self._continued.add(spare.task)
        spare.task.add_done_callback(self._ended)
        spare.take_over(coroutine, awaited, message)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._continued.discard(task)
        self._flush_later()
        if self._core.suspended < MAX_SUSPENDED // 2 and not self._room.is_set():
            self._room.set()
            self._core.set_reading(True)
            if not self._end.done():
                self._read()


class _SpareTask(Coroutine[Any, Any, None]):
    """A task, and what it steps: nothing at first, then the rest of a handler's coroutine.

    Written as a Coroutine by hand: an ``async def`` that is cancelled before its first step never
    gets to see it, and the handler would be lost.
    """

    def __init__(
        self,
        events: asyncio.AbstractEventLoop,
        forget: Callable[[], None],
        answer: Callable[[Message, Reply | BaseException], None],
    ) -> None:
        self.context = contextvars.copy_context()
        self.clean_context = self.context.copy()
        self._events = events
        self._forget = forget
        self._answer = answer
        self._parked: asyncio.Future[None] = events.create_future()
        self._coroutine: Coroutine[Any, Any, Reply] | None = None
        self._awaited: Any = None
        self._message: Message | None = None
        self.task: asyncio.Task[None] = asyncio.Task(self, loop=events, context=self.context)

    def enter(self) -> None:
        _enter_task(self._events, self.task)

    def leave(self) -> None:
        _leave_task(self._events, self.task)

    def discard(self) -> None:
        self._forget()
        self.task.cancel()

    def take_over(
        self, coroutine: Coroutine[Any, Any, Reply], awaited: Any, message: Message
    ) -> None:
        self._coroutine, self._awaited, self._message = coroutine, awaited, message
        if not self._parked.done():
            self._parked.set_result(None)

    # The protocol of a coroutine, as the task speaks it.

    def send(self, value: Any) -> Any:
        if self._coroutine is None:
            # What Future.__await__ does before it yields itself (asyncio/futures.py).
            self._parked._asyncio_future_blocking = True
            return self._parked
        if self._awaited is not _NOTHING:
            awaited, self._awaited = self._awaited, _NOTHING
            return awaited
        return self._step(self._coroutine.send, value)

    def throw(self, error: Any, *_rest: Any) -> Any:
        if self._coroutine is None:
            raise error
        self._awaited = _NOTHING
        return self._step(self._coroutine.throw, error)

    def close(self) -> None:
        if self._coroutine is not None:
            self._coroutine.close()

    def __await__(self) -> Generator[Any, None, None]:
        raise TypeError("only a task steps this")

    def _step(self, step: Callable[[Any], Any], value: Any) -> Any:
        assert self._message is not None
        try:
            return step(value)
        except StopIteration as end:
            self._answer(self._message, end.value)
        except asyncio.CancelledError as error:
            self._answer(self._message, error)
            raise
        except Exception as error:
            self._answer(self._message, error)
        raise StopIteration


_NOTHING = object()


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
