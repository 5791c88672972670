"""The loop gives the same results however datagrams are joined and however many a turn takes.

The model takes the datagrams one by one with the reference decoder. The loop gets them through real
sockets, in runs (UDP_SEGMENT) and alone, with and without offload, many or few per turn; the messages,
the replies, their order and every counter must equal the model's.
"""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import reference_wire
from harness.loop_harness import LoopHarness
from peerd import App, Message, encode

# UDP_MAX_SEGMENTS of Linux before 6.9.
MAX_RUN = 64
# Well below the receive buffer with the default net.core.rmem_max: 212,992 bytes, in which the kernel
# counts its own overhead, too.
MAX_QUEUED_BYTES = 100_000
OVERHEAD_BYTES = 1024

HANDLED = {"E", "ECHO", "OTHER", "NONE", "RAISE", "BATCH"}

Sent = tuple[bytes, ...]
"""The datagrams of one send."""


@dataclass
class Model:
    """Takes one datagram per call, and counts by hand."""

    counters: Counter[str] = field(default_factory=Counter)
    seen: list[tuple[str, str, bytes]] = field(default_factory=list)
    batched: list[tuple[str, str, bytes]] = field(default_factory=list)
    replies: list[bytes] = field(default_factory=list)

    def take(self, datagram: bytes) -> None:
        self.counters.update(rx_datagrams=1, rx_bytes=len(datagram), handled=1)
        try:
            message = reference_wire.decode(datagram)
        except reference_wire.RefusedError as refused:
            self.counters[f"decode_{refused.reason}"] += 1
            return
        magic, version, body = message
        if magic not in HANDLED:
            self.counters["unknown_magic"] += 1
            return
        self.counters["rx_messages"] += 1
        (self.batched if magic == "BATCH" else self.seen).append(message)
        if magic == "RAISE":
            self.counters["handler_errors"] += 1
        if magic in ("E", "ECHO"):
            self._reply(datagram)
        if magic == "OTHER":
            self._reply(encode("ANSWER", version[:3], body))

    def _reply(self, datagram: bytes) -> None:
        self.counters.update(tx_messages=1, tx_bytes=len(datagram))
        self.replies.append(datagram)


class Real(LoopHarness):
    """The loop with handlers that do what the model expects."""

    def __init__(self, gro: bool, gso: bool) -> None:
        self.seen: list[Message] = []
        self.batched: list[Message] = []
        app = App()
        app.batch_handler("BATCH")(self.batched.extend)
        for magic in HANDLED - {"BATCH"}:
            app.handler(magic)(self._handle)
        super().__init__(app, gro=gro, gso=gso)

    def _handle(self, message: Message) -> bytes | Message | None:
        self.seen.append(message)
        if message.magic == "RAISE":
            raise RuntimeError
        if message.magic == "OTHER":
            return Message("ANSWER", message.version[:3], message.body)
        return None if message.magic == "NONE" else message.body


magics = st.sampled_from([*["ECHO"] * 4, *sorted(HANDLED), "", "NOPE"])
# 80 bytes make a header larger than HEADER_CACHE_BYTES of ext/peerd/_envelope.pxd: it is not cached.
versions = st.sampled_from(["1", "1", "1.0", "", "v" * 80]) | st.text(
    st.characters(max_codepoint=127), max_size=5
)
envelopes = st.builds(encode, magics, versions, st.binary(max_size=60))
large_envelopes = st.builds(
    lambda magic, size: encode(magic, "1", bytes(size)),
    magics,
    st.sampled_from([1400, 9000, 65000]),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """An envelope with a byte changed, or cut off."""
    datagram = bytearray(draw(envelopes))
    at = draw(st.integers(0, len(datagram) - 1))
    if draw(st.booleans()):
        del datagram[at:]
    else:
        datagram[at] = draw(st.integers(0, 255))
    return bytes(datagram)


datagrams = st.one_of(envelopes, envelopes, damaged(), st.binary(max_size=60), st.just(b""))


@st.composite
def runs(draw: st.DrawFn) -> Sent:
    """Any datagrams brought to one size; the last may be shorter."""
    parts = draw(st.lists(datagrams, min_size=1, max_size=8)) * draw(st.sampled_from([1, 2, 8]))
    size = max(1, len(parts[0]))
    sized = [part[:size].ljust(size, b"\0") for part in parts[:MAX_RUN]]
    last = draw(st.integers(1, size))
    return (*sized[:-1], sized[-1][:last])


sends = st.one_of(
    runs(), datagrams.map(lambda one: (one,)), large_envelopes.map(lambda one: (one,))
)
steps = st.lists(st.tuples(sends, st.booleans()), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(steps, st.booleans(), st.booleans())
def test_the_loop_agrees_with_the_model(
    steps: list[tuple[Sent, bool]], gro: bool, gso: bool
) -> None:
    model = Model()
    waiting, waiting_bytes = 0, 0
    with Real(gro, gso) as peer:
        for sent, take_now in [*steps, ((encode("ECHO", "1", b"last"),), True)]:
            peer.send(*sent)
            for datagram in sent:
                model.take(datagram)
                waiting += 1
                waiting_bytes += len(datagram) + OVERHEAD_BYTES
            if take_now or waiting_bytes > MAX_QUEUED_BYTES:
                assert sum(peer.take(waiting)) == waiting
                waiting, waiting_bytes = 0, 0
                for expected in model.replies:
                    assert peer.client.recv(1 << 16) == expected
                model.replies.clear()
        counters = peer.counters
        del counters["turns"]  # model and loop take different numbers of them
        assert counters == model.counters
        raised = [(magic, sender, type(error)) for magic, sender, error in peer.errors]
        assert raised == [("RAISE", peer.client.getsockname(), RuntimeError)] * len(raised)
        assert as_tuples(peer.seen) == model.seen
        assert as_tuples(peer.batched) == model.batched
        assert {message.sender for message in peer.seen} == {peer.client.getsockname()}
        peer.client.setblocking(False)
        with pytest.raises(BlockingIOError):
            peer.client.recv(1)


def as_tuples(messages: list[Message]) -> list[tuple[str, str, bytes]]:
    return [(message.magic, message.version, message.body) for message in messages]
