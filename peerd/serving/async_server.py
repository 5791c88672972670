"""Drives a DatagramLoop from an event loop, for apps with coroutine handlers.

The event loop calls when the socket can be read; one turn takes a bounded batch, and the event loop calls
again in its next iteration if datagrams are left. So the app's own timers and tasks run between turns.
ext/peerd/_coroutines.pyx steps the coroutines; this module has the tasks of those that wait.

Waiting coroutines are bounded: from MAX_WAITING on the socket is not read, and datagrams wait in the
kernel's buffer, until half of the coroutines have ended. That holds during a drain, too.

The event loop is given an epoll descriptor that holds the socket, not the socket: libuv (uvloop) stops
polling a descriptor that reports POLLERR, and with IP_RECVERR every ICMP error does that. The epoll
descriptor is readable then, and the turn reads the error queue.

When a worker stops, it waits for the jobs in the event loop's executor, even for those that no coroutine
awaits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from peerd._envelope import Message, Reply
from peerd._loop import DatagramLoop
from peerd.signals import HAND_OVER

log = logging.getLogger(__name__)

MAX_WAITING = 10_000

HEARTBEAT_INTERVAL_S = 0.25
"""An idle loop makes a turn this often, so that its heartbeat is written."""

FLUSH_TIMEOUT_S = 0.5  # the time that the last replies have beyond the end of a drain
BLOCKED_RETRY_INTERVAL_S = 0.001
"""The time until a reply that the kernel did not take is tried again."""

DROPPED_LOG_INTERVAL_S = 1.0
FULL_LOG_INTERVAL_S = 60.0


def run(
    core: DatagramLoop,
    on_serving: Callable[[], None],
    drain_timeout_s: float,
    timeouts_s: Mapping[str, float],
) -> None:
    """Serve in an event loop of this thread until SIGTERM; then drain, for ``drain_timeout_s``.

    HAND_OVER ends it as well, and leaves the queue to a successor. ``timeouts_s``: by magic code, how
    long a handler may wait before it is cancelled.

    The event loop is uvloop's if that is installed, else asyncio's. Raises what ends the core: OSError,
    or an exception of a handler that is no Exception.
    """
    with asyncio.Runner(loop_factory=_new_event_loop) as runner:
        runner.run(AsyncServer(core, timeouts_s).serve(on_serving, drain_timeout_s))


class SpareTask(asyncio.Task[None]):
    """Records that one of its attributes was read or set; ext/peerd/_coroutines.pyx says why."""

    def __getattribute__(self, name: str) -> Any:
        read = super().__getattribute__
        read("get_coro")().was_seen = True
        return read(name)

    def __setattr__(self, name: str, value: object) -> None:
        self.get_coro()
        super().__setattr__(name, value)


@dataclass(slots=True)
class _Waiting:
    """A coroutine handler that waits."""

    magic: str
    timeout: asyncio.TimerHandle | None = None
    has_timed_out: bool = False


class AsyncServer:
    """See the head of this file."""

    def __init__(self, core: DatagramLoop, timeouts_s: Mapping[str, float]) -> None:
        self._core = core
        self._timeouts_s = timeouts_s
        self._events: asyncio.AbstractEventLoop
        self._end: asyncio.Future[None]
        self._heartbeat: asyncio.TimerHandle
        self._waiting: dict[asyncio.Task[None], _Waiting] = {}
        self._poll = select.epoll()
        self._is_reading = False
        self._is_flush_due = False
        self._leaves_queue = False
        self._is_over = False
        self._room = asyncio.Event()  # set while more coroutines may wait
        self._room.set()
        self._full_since_s = 0.0
        self._next_full_log_s = 0.0
        self._next_dropped_log_s = 0.0

    async def serve(self, on_serving: Callable[[], None], drain_timeout_s: float) -> None:
        """See :func:`run`. ``on_serving`` is called after the first turn."""
        self._events = asyncio.get_running_loop()
        self._end = self._events.create_future()
        self._core.attach(self._events, self._new_task, self._on_suspended, self._on_ended)
        self._events.add_signal_handler(signal.SIGTERM, self._stop)
        self._events.add_signal_handler(HAND_OVER, self._hand_over)
        self._heartbeat = self._events.call_later(HEARTBEAT_INTERVAL_S, self._on_heartbeat)
        self._poll.register(self._core.fileno(), select.EPOLLIN)
        try:
            await self._turn_in_callback()
            self._start_reading()
            on_serving()
            await self._end
            await self._drain(time.monotonic() + drain_timeout_s)
        finally:
            self._stop_reading()
            self._poll.close()
            self._heartbeat.cancel()
            self._is_over = True
            tasks = list(self._waiting)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._core.detach()
            self._core.flush()

    def _stop(self) -> None:
        if not self._end.done():
            self._end.set_result(None)

    def _fail(self, error: BaseException) -> None:
        self._stop_reading()
        if not self._end.done():
            self._end.set_exception(error)

    def _hand_over(self) -> None:
        self._leaves_queue = True
        self._stop_reading()
        self._room.set()  # a drain that waits for it has nothing more to read
        self._stop()

    async def _drain(self, until_s: float) -> None:
        """Serve what the queue holds, then wait for the handlers under way and their replies.

        After a hand-over the queue is left to the successor, and handlers may take as long as the
        supervisor lets a loop be blocked (its stuck timeout).
        """
        self._stop_reading()
        while not self._leaves_queue and (left_s := until_s - time.monotonic()) > 0:
            if not self._room.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._room.wait(), left_s)
            elif not await self._turn_in_callback():
                break
        if self._waiting:
            left_s = max(0.0, until_s - time.monotonic())
            await asyncio.wait(self._waiting, timeout=None if self._leaves_queue else left_s)
            until_s = max(until_s, time.monotonic() + FLUSH_TIMEOUT_S)
        while self._core.queued_replies and time.monotonic() < until_s:
            self._core.flush()
            await asyncio.sleep(BLOCKED_RETRY_INTERVAL_S)

    def _on_heartbeat(self) -> None:
        self._heartbeat = self._events.call_later(HEARTBEAT_INTERVAL_S, self._on_heartbeat)
        if not self._end.done():
            self._turn()
        now_s = time.monotonic()
        if not self._room.is_set():
            self._log_full(now_s)
        if now_s >= self._next_dropped_log_s and (dropped := self._core.take_dropped()):
            self._next_dropped_log_s = now_s + DROPPED_LOG_INTERVAL_S
            for magic, (count, limit) in dropped.items():
                log.warning(
                    "dropped %d messages for %r: %d of its handlers wait, its max_waiting",
                    count,
                    magic,
                    limit,
                )

    async def _turn_in_callback(self) -> int:
        """Make a turn. Not in this task: handlers are stepped in their own, and tasks do not nest."""
        turned = self._events.create_future()

        def turn() -> None:
            try:
                turned.set_result(self._core.turn())
            except BaseException as error:
                turned.set_exception(error)
            self._check_room()

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
            # An event loop would log what its callback raises, and call it again.
            self._fail(error)
        self._check_room()
        self._flush_soon()

    def _start_reading(self) -> None:
        if not self._is_reading:
            self._events.add_reader(self._poll.fileno(), self._turn)
            self._is_reading = True

    def _stop_reading(self) -> None:
        if self._is_reading:
            self._events.remove_reader(self._poll.fileno())
            self._is_reading = False

    def _check_room(self) -> None:
        if self._core.suspended >= MAX_WAITING and self._room.is_set():
            self._room.clear()
            self._stop_reading()
            self._core.set_reading(False)
            self._full_since_s = time.monotonic()
            self._log_full(self._full_since_s)
        elif self._core.suspended < MAX_WAITING // 2 and not self._room.is_set():
            self._room.set()
            self._core.set_reading(True)
            if not self._end.done():
                self._start_reading()

    def _log_full(self, now_s: float) -> None:
        if now_s < self._next_full_log_s:
            return
        self._next_full_log_s = now_s + FULL_LOG_INTERVAL_S
        counts = Counter(each.magic for each in self._waiting.values()).most_common(8)
        full_s = now_s - self._full_since_s
        log.warning(
            "%s: %d handlers wait (of %s), and reading continues below %d; "
            "a timeout= or max_waiting= in @app.handler bounds them",
            f"not reading for {full_s:.0f} s" if full_s else "stopped reading",
            self._core.suspended,
            ", ".join(f"{magic!r}: {count}" for magic, count in counts),
            MAX_WAITING // 2,
        )

    def _flush_soon(self) -> None:
        """One flush for all replies of an iteration of the event loop."""
        if self._core.queued_replies and not self._is_flush_due:
            self._is_flush_due = True
            self._events.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        self._core.flush()
        if self._core.queued_replies:
            self._is_flush_due = True
            self._events.call_later(BLOCKED_RETRY_INTERVAL_S, self._flush)

    def _new_task(self, coroutine: Any, context: Context) -> asyncio.Task[None]:
        return SpareTask(coroutine, loop=self._events, context=context)

    def _on_suspended(self, task: asyncio.Task[None], message: Message) -> None:
        waiting = _Waiting(message.magic)
        timeout_s = self._timeouts_s.get(message.magic)
        if timeout_s is not None:
            waiting.timeout = self._events.call_later(timeout_s, self._on_timeout, task)
        self._waiting[task] = waiting

    def _on_timeout(self, task: asyncio.Task[None]) -> None:
        self._waiting[task].has_timed_out = True
        task.cancel()

    def _on_ended(
        self, task: asyncio.Task[None], message: Message, result: Reply | BaseException
    ) -> None:
        waiting = self._waiting.pop(task)
        if waiting.timeout is not None:
            waiting.timeout.cancel()
        if isinstance(result, asyncio.CancelledError):
            if self._is_over:
                return  # the server cancels what it cannot wait for: the message counts as lost
            if waiting.has_timed_out:
                timeout_s = self._timeouts_s[message.magic]
                error = TimeoutError(f"it waited for longer than {timeout_s:g} s")
                error.__cause__ = result
                result = error
        try:
            self._core.answer(message, result)
        except BaseException as failure:
            self._fail(failure)
        self._check_room()
        self._flush_soon()


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
