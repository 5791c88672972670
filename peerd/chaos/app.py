"""The apps that chaos runs: they echo, slowly enough for a backlog, and do what harms a worker."""

from __future__ import annotations

import os
import time

from peerd import App, Message

HANDLER_VARIABLE = "PEERD_CHAOS_HANDLER_S"
COROUTINE_S = 0.02
"""Longer than the other: twenty and more are then under way at once."""

SPIN_S = 0.5
DIE_CODE = 9

app = App()
coroutines = App()
handler_s = float(os.environ.get(HANDLER_VARIABLE, "0.0002"))


@app.handler("SEQ")
def echo(message: Message) -> bytes:
    if handler_s:
        time.sleep(handler_s)
    return message.body


@coroutines.handler("SEQ")
async def echo_later(message: Message) -> bytes:
    """Many at a time, so what comes first is not always answered first."""
    import asyncio  # which workers of the other app do without

    await asyncio.sleep(COROUTINE_S)
    return message.body


@app.handler("SPIN")
@coroutines.handler("SPIN")
def spin(message: Message) -> bytes:
    """Hangs, but not for so long that it would have to be killed."""
    until_s = time.monotonic() + SPIN_S
    while time.monotonic() < until_s:
        pass
    return message.body


@app.handler("DIE")
@coroutines.handler("DIE")
def die(_message: Message) -> bytes:
    os._exit(DIE_CODE)
