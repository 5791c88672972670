import os
import time
from dataclasses import FrozenInstanceError

import pytest

from peerd.supervisor.events import Event, PeersChanged, Scaled, Stopping
from peerd.supervisor.journal import Journal
from peerd.supervisor.loop import Loop, Promise


def test_timers_run_in_order_and_not_when_cancelled() -> None:
    loop, called = Loop(), list[str]()
    now_s = time.monotonic()
    loop.call_at(now_s + 0.02, lambda: called.append("second"))
    loop.call_at(now_s + 0.01, lambda: called.append("first"))
    cancelled = loop.call_at(now_s + 0.015, lambda: called.append("never"))
    cancelled.cancel()
    cancelled.cancel()
    while len(called) < 2:
        loop.run_once()
    assert called == ["first", "second"]
    assert time.monotonic() >= now_s + 0.02
    loop.close()


def test_a_callback_may_unwatch_another_one_that_is_due() -> None:
    loop, called = Loop(), list[int]()
    pipes = [os.pipe(), os.pipe()]
    for number, (reader, writer) in enumerate(pipes):
        other = pipes[1 - number][0]

        def callback(number: int = number, other: int = other) -> None:
            called.append(number)
            loop.unwatch(other)

        loop.watch(reader, callback)
        os.write(writer, b"x")
    loop.run_once()
    assert len(called) == 1
    loop.close()
    for pipe in pipes:
        for fd in pipe:
            os.close(fd)


def test_events_arrive_after_the_current_callback_in_order_and_by_type() -> None:
    loop, seen = Loop(), list[str]()
    journal = Journal(loop)

    def on_stopping(_event: Stopping) -> None:
        journal.publish(PeersChanged())
        seen.append("stopping")

    journal.subscribe(Stopping, on_stopping)
    journal.subscribe(Event, lambda event: seen.append(type(event).__name__))

    def callback() -> None:
        journal.publish(Stopping(exit_code=0))
        journal.publish(Scaled(before=1, peers=2))
        seen.append("callback")

    loop.call_later(0, callback)
    loop.call_later(0, lambda: seen.append("next callback"))
    while "next callback" not in seen:
        loop.run_once()
    order = ["callback", "stopping", "Stopping", "Scaled", "PeersChanged", "next callback"]
    assert seen == order
    loop.close()


def test_events_are_frozen() -> None:
    event = Scaled(before=1, peers=2)
    with pytest.raises(FrozenInstanceError):
        event.peers = 3  # type: ignore[misc]


@pytest.mark.parametrize("is_resolved", [True, False])
def test_a_promise_calls_back_once_after_the_current_callback(is_resolved: bool) -> None:
    loop, seen = Loop(), list[object]()
    promise = Promise[int](loop)
    promise.then(seen.append, seen.append)
    if is_resolved:
        promise.resolve(1)
    else:
        promise.reject("no")
    assert promise.is_settled
    assert not seen
    loop.run_once()
    promise.then(seen.append, seen.append)
    assert len(seen) == 1
    loop.run_once()
    assert seen == [1 if is_resolved else "no"] * 2
    loop.close()
