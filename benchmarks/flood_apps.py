"""The apps of flood.py: they answer PING, count BNCH, and keep a timer of 20 ms.

The timer is one of the app's own, such as a user might have: with plain handlers a signal
(setitimer), whose Python handler runs between the turns of the loop; with coroutine handlers a task.
It starts with the first PING. What matters is how late it is, so each gap is compared with 20 ms.
"""

from __future__ import annotations

import asyncio
import signal
import time

from datagrams import MAGIC
from peerd import App, Message

TIMER_S = 0.02

plain = App()
coroutines = App()


class _Seen:
    """What a worker's process has seen; a worker runs one of the apps."""

    pings = 0
    messages = 0
    fires = 0
    latest_ns = 0
    """By how much the latest fire of the timer was late."""

    last_fire_ns = 0
    ticker: asyncio.Task[None] | None = None


seen = _Seen()


def result() -> dict[str, object]:
    return {
        "pings": seen.pings,
        "messages": seen.messages,
        "fires": seen.fires,
        "latest_ns": seen.latest_ns,
    }


@plain.handler("PING")
def ping(message: Message) -> Message:
    if seen.pings == 0:
        seen.last_fire_ns = time.monotonic_ns()
        signal.signal(signal.SIGALRM, lambda *_: _fired())
        signal.setitimer(signal.ITIMER_REAL, TIMER_S, TIMER_S)
    seen.pings += 1
    return Message("PONG", message.version, message.body)


@plain.handler(MAGIC)
def count(message: Message) -> None:
    seen.messages += 1


@coroutines.handler("PING")
async def ping_async(message: Message) -> Message:
    if seen.pings == 0:
        seen.last_fire_ns = time.monotonic_ns()
        seen.ticker = asyncio.create_task(_tick())
    seen.pings += 1
    return Message("PONG", message.version, message.body)


@coroutines.handler(MAGIC)
async def count_async(message: Message) -> None:
    seen.messages += 1


async def _tick() -> None:
    while True:
        await asyncio.sleep(TIMER_S)
        _fired()


def _fired() -> None:
    now_ns = time.monotonic_ns()
    seen.fires += 1
    seen.latest_ns = max(seen.latest_ns, now_ns - seen.last_fire_ns - int(TIMER_S * 1e9))
    seen.last_fire_ns = now_ns
