from __future__ import annotations

import os
import time

from peerd.supervisor.loop import Loop


def test_timers_come_in_order_and_not_when_cancelled() -> None:
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


def test_a_callback_may_end_the_watch_of_another_that_is_due() -> None:
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
