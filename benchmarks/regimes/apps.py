"""The apps of the peerd workers: each has one handler, which counts.

A worker loads one as ``regimes.apps:counting``. The handlers count in a variable of a closure, which costs
less than a global variable.
"""

from __future__ import annotations

from collections.abc import Callable

from peerd import App, Message
from udp.envelope import MAGIC

counting, counting_batch, counting_async, echo, echo_async = (App() for _ in range(5))


def _count_messages() -> Callable[[], int]:
    count = 0

    @counting.handler(MAGIC)
    def handle(message: Message) -> None:
        nonlocal count
        count += 1

    @counting_batch.batch_handler(MAGIC)
    def handle_batch(messages: list[Message]) -> None:
        nonlocal count
        count += len(messages)

    @counting_async.handler(MAGIC)
    async def handle_async(message: Message) -> None:
        nonlocal count
        count += 1

    @echo.handler(MAGIC)
    def answer(message: Message) -> bytes:
        nonlocal count
        count += 1
        return message.body

    @echo_async.handler(MAGIC)
    async def answer_async(message: Message) -> bytes:
        nonlocal count
        count += 1
        return message.body

    return lambda: count


messages = _count_messages()
"""How many messages the handlers of this process have received. A worker runs one of the apps."""
