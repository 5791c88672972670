"""Log lines about replies that were not sent."""

from __future__ import annotations

import errno
import logging
import os
import time

from peerd.address import Address

log = logging.getLogger(__name__)

INTERVAL_S = 1.0

_CAUSES = {
    "full": "the send queue is full: clients ask faster than the network takes the replies",
    "too_big": "too large for a datagram, or for this network: make the reply smaller",
    "loop": (
        "the sender is a peer of this supervisor, which would answer the answer: reply with a Message "
        "of another magic code"
    ),
    "rate": "this source is beyond --max-reply-rate, as in a reply loop of two peers",
    "congested": (
        "no room on the way to this client: the interface's queue is full, a filter drops, or the "
        "reply is above the MTU of the link's other end"
    ),
}


class DroppedReplyLog:
    """Logs drops: one line per reason and errno in INTERVAL_S, with the number of replies.

    ``about`` begins each line.
    """

    def __init__(self, about: str) -> None:
        self._about = about
        self._last_s: dict[tuple[str, int], float] = {}
        self._left_out: dict[tuple[str, int], int] = {}

    def __call__(
        self, reason: str, address: tuple[str, int] | None, error: int, count: int
    ) -> None:
        """As DatagramLoop calls ``on_replies_dropped``."""
        kind = (reason, error)
        now_s = time.monotonic()
        if now_s - self._last_s.get(kind, -INTERVAL_S) < INTERVAL_S:
            self._left_out[kind] = self._left_out.get(kind, 0) + count
            return
        self._last_s[kind] = now_s
        count += self._left_out.pop(kind, 0)
        log.warning(
            "%sto=%s: %d %s dropped since the last such line: %s",
            self._about,
            Address(*address) if address else "?",
            count,
            "reply" if count == 1 else "replies",
            _cause(reason, error),
        )


def _cause(reason: str, error: int) -> str:
    text = _CAUSES.get(reason, "the kernel refuses to send it")
    return f"{text} ({errno.errorcode.get(error, error)}: {os.strerror(error)})" if error else text
