"""The apps that peerd's workers run in the benchmark: each has one handler, which counts.

Named to the worker as ``apps:counting`` and so on, as a user names an app. A handler counts in a
variable of its own closure, which costs less than a global one.
"""

from __future__ import annotations

from collections.abc import Callable

from datagrams import MAGIC
from peerd import App, Message

_counts: list[Callable[[], int]] = []


def messages() -> int:
    """How many have reached a handler of this process. A worker runs one of the apps."""
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
