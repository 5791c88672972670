"""The apps of the peerd workers: each has one handler, which counts.

A worker loads one as ``regimes.apps:counting``. A handler counts in a variable of its closure, which
costs less than a global variable.
"""

from __future__ import annotations

from collections.abc import Callable

from peerd import App, Message
from udp.envelope import MAGIC

_counts: list[Callable[[], int]] = []


def messages() -> int:
    """How many messages the handlers of this process have received."""
    return sum(count() for count in _counts)


def _counting() -> App:
    app = App()
    count = 0

    @app.handler(MAGIC)
    def handle(message: Message) -> None:
        nonlocal count
        count += 1

    _counts.append(lambda: count)
    return app


def _counting_batch() -> App:
    app = App()
    count = 0

    @app.batch_handler(MAGIC)
    def handle(messages: list[Message]) -> None:
        nonlocal count
        count += len(messages)

    _counts.append(lambda: count)
    return app


def _counting_async() -> App:
    app = App()
    count = 0

    @app.handler(MAGIC)
    async def handle(message: Message) -> None:
        nonlocal count
        count += 1

    _counts.append(lambda: count)
    return app


def _echo() -> App:
    app = App()
    count = 0

    @app.handler(MAGIC)
    def handle(message: Message) -> bytes:
        nonlocal count
        count += 1
        return message.body

    _counts.append(lambda: count)
    return app


def _echo_async() -> App:
    app = App()
    count = 0

    @app.handler(MAGIC)
    async def handle(message: Message) -> bytes:
        nonlocal count
        count += 1
        return message.body

    _counts.append(lambda: count)
    return app


counting = _counting()
counting_batch = _counting_batch()
counting_async = _counting_async()
echo = _echo()
echo_async = _echo_async()
