"""The apps of a chaos run: they echo, slowly enough for a backlog, and hang or die on request."""

from __future__ import annotations

import os
import time

from peerd import App, Message

HANDLER_VARIABLE = "PEERD_CHAOS_HANDLER_S"
COROUTINE_S = 0.02  # Long enough that twenty and more coroutines are under way at once
SPIN_S = 0.5
DIE_CODE = 9

app = App()
coroutines = App()
handler_s = float(os.environ.get(HANDLER_VARIABLE, "0.0002"))  # So that queues are seldom empty


@app.handler("SEQ")
def echo(message: Message) -> bytes:
    if handler_s:
        time.sleep(handler_s)
    return message.body


@coroutines.handler("SEQ")
async def echo_later(message: Message) -> bytes:
    """Many at a time, so the order of the answers may differ."""
    import asyncio  # workers of the other app never import it

    await asyncio.sleep(COROUTINE_S)
    return message.body


@app.handler("SPIN")
@coroutines.handler("SPIN")
def spin(message: Message) -> bytes:
    """Block the loop, but not until the supervisor kills the worker."""
    until_s = time.monotonic() + SPIN_S
    while time.monotonic() < until_s:
        pass
    return message.body


@app.handler("DIE")
@coroutines.handler("DIE")
def die(_message: Message) -> bytes:
    os._exit(DIE_CODE)
