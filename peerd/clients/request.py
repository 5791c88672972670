"""One request without its I/O: how many attempts, until when, and which datagram is the answer.

The clients do the I/O that this object asks for, in the way of h11::

    while True:
        request.begin_attempt()
        try:
            ...                                # locate the target, send request.datagram, and pass what
            answer = request.answer_in(data)   # arrives within request.remaining_s() to answer_in()
        except NoAnswerError as error:
            sleep(request.pause_after_s(error))  # raises the error when this was the last attempt
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeAlias

from peerd._envelope import Message, decode
from peerd.clients.endpoints import Endpoint
from peerd.errors import DecodeError, NoAnswerError, SettingsError

IsAnswer: TypeAlias = Callable[[Message], bool]

MAX_TIMEOUT_S = 86_400.0

RETRY_PAUSE_S = 0.1  # Between attempts at a peer that is known to be absent: it may be restarting


class Request:
    def __init__(
        self, datagram: bytes, timeout_s: float, retries: int, is_answer: IsAnswer
    ) -> None:
        """``timeout_s`` bounds each attempt; ``retries`` are the attempts after the first.

        Raises SettingsError for limits that are out of range.
        """
        if not (math.isfinite(timeout_s) and 0 <= timeout_s <= MAX_TIMEOUT_S):
            raise SettingsError(f"timeout {timeout_s!r}: from 0 to {MAX_TIMEOUT_S:g} seconds")
        if retries < 0:
            raise SettingsError(f"retries {retries!r}: 0 or more, after the first try")
        self.datagram = datagram
        self.timeout_s = timeout_s
        self._retries_left = retries
        self._is_answer = is_answer
        self._deadline_s = 0.0

    def begin_attempt(self) -> None:
        self._deadline_s = time.monotonic() + self.timeout_s

    def remaining_s(self) -> float:
        """Of this attempt. Raises TimeoutError when its time is over."""
        remaining_s = self._deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError
        return remaining_s

    def answer_in(self, datagram: bytes, sender: Endpoint) -> Message | None:
        """The answer, or None for a datagram that is no envelope or not the message asked for."""
        try:
            message = decode(datagram, sender.sockaddr[:2])
        except DecodeError:
            return None
        return message if self._is_answer(message) else None

    def pause_after_s(self, error: NoAnswerError) -> float:
        """The pause between this failed attempt and the next; none after one that timed out.

        Raises ``error`` when no attempt is left.
        """
        if not self._retries_left:
            raise error
        self._retries_left -= 1
        return max(0.0, min(RETRY_PAUSE_S, self._deadline_s - time.monotonic()))
