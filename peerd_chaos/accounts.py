"""The account of one client with one peer, and the report of all of them.

The numbers 0, 1, 2, ... are sent in this order and should come back in it. A stream stores the next
expected number and the set of skipped ones. A number from that set that arrives later is out of order; a
lower one that is not in the set has arrived before and is doubled. So the memory grows with the loss, not
with the run.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Count:
    """Numbers of datagrams."""

    client: int
    port: int
    sent: int = 0
    missing: int = 0
    doubled: int = 0
    out_of_order: int = 0

    @property
    def received(self) -> int:
        """Without those that are doubled."""
        return self.sent - self.missing


SUMMED = ("sent", "missing", "doubled", "out_of_order")


@dataclass(frozen=True)
class LoadReport:
    counts: tuple[Count, ...]  # One per client and port
    dropped: int
    """Answers that the clients' own buffers had no room for. Above 0, the loss does not indict the peers."""

    foreign: int  # Answers to datagrams that were never sent
    finished: bool
    """Every datagram was answered or overtaken by later answers; only then is the loss final."""

    def of(self, port: int | None = None) -> Count:
        """The sum over the clients of a port, or of all ports; ``client`` is how many counts there are."""
        counts = [count for count in self.counts if port in (None, count.port)]
        return Count(
            client=len(counts),
            port=port or 0,
            **{name: sum(getattr(count, name) for count in counts) for name in SUMMED},
        )

    @property
    def sent(self) -> int:
        return self.of().sent

    @property
    def missing(self) -> int:
        return self.of().missing

    @property
    def doubled(self) -> int:
        return self.of().doubled

    @property
    def out_of_order(self) -> int:
        return self.of().out_of_order


class Stream:
    def __init__(self, client: int, port: int) -> None:
        self.client = client
        self.port = port
        self.sent = 0
        self._expected = 0
        self._skipped: set[int] = set()
        self._doubled = 0
        self._out_of_order = 0

    @property
    def is_complete(self) -> bool:
        return self._expected == self.sent and not self._skipped

    def next_number(self) -> int:
        self.sent += 1
        return self.sent - 1

    def take(self, number: int) -> bool:
        """Count a number that has come back. False for one that was never sent."""
        if not 0 <= number < self.sent:
            return False
        if number == self._expected:
            self._expected += 1
        elif number > self._expected:
            self._skipped.update(range(self._expected, number))
            self._expected = number + 1
        elif number in self._skipped:
            self._skipped.remove(number)
            self._out_of_order += 1
        else:
            self._doubled += 1
        return True

    def count(self) -> Count:
        return Count(
            client=self.client,
            port=self.port,
            sent=self.sent,
            missing=len(self._skipped) + self.sent - self._expected,
            doubled=self._doubled,
            out_of_order=self._out_of_order,
        )
