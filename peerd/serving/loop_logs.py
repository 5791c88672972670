"""Log lines for the callbacks of a DatagramLoop; ``about`` begins each of them."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import Counter
from collections.abc import Hashable

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


class _Limit:
    """One line per kind of event in INTERVAL_S."""

    def __init__(self) -> None:
        self._last_s: dict[Hashable, float] = {}
        self._left_out = Counter[Hashable]()

    def admit(self, kind: Hashable, count: int = 1) -> int:
        """The events of this kind since its last line, with these; 0 when they get no line now."""
        now_s = time.monotonic()
        self._left_out[kind] += count
        if now_s - self._last_s.get(kind, -INTERVAL_S) < INTERVAL_S:
            return 0
        self._last_s[kind] = now_s
        return self._left_out.pop(kind)


class DroppedReplyLog:
    """Logs drops: one line per reason and errno in INTERVAL_S, with the number of replies."""

    def __init__(self, about: str) -> None:
        self._about = about
        self._limit = _Limit()

    def __call__(
        self, reason: str, address: tuple[str, int] | None, error: int, count: int
    ) -> None:
        """As DatagramLoop calls ``on_replies_dropped``."""
        if not (count := self._limit.admit((reason, error), count)):
            return
        cause = _CAUSES.get(reason, "the kernel refuses to send it")
        if error:
            cause += f" ({errno.errorcode.get(error, error)}: {os.strerror(error)})"
        log.warning(
            "%sto=%s: %d %s dropped since the last such line: %s",
            self._about,
            Address(*address) if address else "?",
            count,
            "reply" if count == 1 else "replies",
            cause,
        )


class IcmpErrorLog:
    """Logs the clients that cannot be reached."""

    def __init__(self, about: str) -> None:
        self._about = about

    def __call__(self, address: tuple[str, int] | None, error: int) -> None:
        to = Address(*address) if address else "?"
        log.debug("%sto=%s: %s", self._about, to, os.strerror(error))


class HandlerErrorLog:
    """Logs what handlers raise: one line per magic code in INTERVAL_S, with the number left out."""

    def __init__(self, about: str) -> None:
        self._about = about
        self._limit = _Limit()

    def __call__(self, magic: str, sender: tuple[str, int] | None, error: BaseException) -> None:
        if not (count := self._limit.admit(magic)):
            return
        also = f" ({count - 1} more since the last such line)" if count > 1 else ""
        log.error(
            "%sfrom=%s: the handler of %r raised %s%s",
            self._about,
            Address(*sender) if sender else "?",
            magic,
            type(error).__name__,
            also,
            exc_info=error,
        )
