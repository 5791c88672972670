"""plain_peer.py as a peerd app. The body ends the datagram, so the reply is the datagram plus the pid."""

import os

from peerd import App, Message

app = App()


@app.handler("ECHO")
def echo(message: Message) -> bytes:
    return message.body + b"%d" % os.getpid()
