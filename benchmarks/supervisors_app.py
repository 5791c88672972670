"""The same for peerd. The body is the end of a datagram, so the answer is the datagram and the pid."""

import os

from peerd import App, Message

app = App()


@app.handler("ECHO")
def echo(message: Message) -> bytes:
    return message.body + b"%d" % os.getpid()
