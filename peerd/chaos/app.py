"""The app that chaos runs: echoes, slowly enough for a backlog, and does what harms a worker."""

from __future__ import annotations

import os
import time

from peerd import App, Message

HANDLER_VARIABLE = "PEERD_CHAOS_HANDLER_S"
SPIN_S = 1.0
DIE_CODE = 9

app = App()
handler_s = float(os.environ.get(HANDLER_VARIABLE, "0.0002"))


@app.handler("SEQ")
def echo(message: Message) -> bytes:
    if handler_s:
        time.sleep(handler_s)
    return message.body


@app.handler("SPIN")
def spin(message: Message) -> bytes:
    """Hangs, but not for so long that it would have to be killed."""
    until_s = time.monotonic() + SPIN_S
    while time.monotonic() < until_s:
        pass
    return message.body


@app.handler("DIE")
def die(_message: Message) -> bytes:
    os._exit(DIE_CODE)
