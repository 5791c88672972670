"""The apps of flood.py: they answer PING, count BNCH, and keep a timer of 20 ms.

A user's app could have such a timer. With plain handlers it is a signal (setitimer), whose Python handler
runs between two iterations of the loop; with coroutine handlers it is a task. It starts with the first
PING. Each gap is compared with 20 ms, because the delay is what matters.
"""

from __future__ import annotations

import asyncio
import signal
import time

from peerd import App, Message
from udp.envelope import MAGIC

TIMER_S = 0.02

plain = App()
coroutines = App()


class _Seen:
    """The counts of this process, which runs one of the apps."""

    pings = messages = fires = longest_delay_ns = last_fire_ns = 0
    ticker: asyncio.Task[None] | None = None


seen = _Seen()


def result() -> dict[str, int]:
    names = ("pings", "messages", "fires", "longest_delay_ns")
    return {name: getattr(seen, name) for name in names}


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
    seen.longest_delay_ns = max(
        seen.longest_delay_ns, now_ns - seen.last_fire_ns - int(TIMER_S * 1e9)
    )
    seen.last_fire_ns = now_ns
