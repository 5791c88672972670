"""Every family, with and without offload, in batches of 1, 8 and 64: the same bytes, order, count and sender.

In the manner of quinn-udp's tests/tests.rs: one helper, real sockets on the loopback device, and the
helper asserts everything. A send of the client is one UDP_SEGMENT send, so with UDP_GRO the kernel
hands it over joined; and the client asks for UDP_GRO itself, so it sees whether replies left joined.
"""

import socket
import struct
import time
from dataclasses import dataclass

import pytest

from harness.loop_harness import LoopHarness, bound
from peerd import App, Message, decode, encode
from peerd.linux import SOL_UDP, UDP_GRO

# 65,535 less the IPv4 and UDP headers (RFC 791, RFC 768).
MAX_DATAGRAM_BYTES = 65507
# RX_BATCH of ext/peerd/receive.pxd.
RX_BATCH = 16
# Of ext/peerd/_loop.pyx.
TURN_BUDGET_NS = 2_000_000


@dataclass(frozen=True)
class Family:
    bound_to: str
    client: socket.AddressFamily


FAMILIES = {
    "v4": Family("127.0.0.1", socket.AF_INET),
    "v6": Family("::1", socket.AF_INET6),
    "dual-v4": Family("::", socket.AF_INET),
    "dual-v6": Family("::", socket.AF_INET6),
}


class Exchange(LoopHarness):
    """A peer that echoes, and a client of it that asks for UDP_GRO."""

    def __init__(self, family: Family, gro: bool = True, gso: bool = True) -> None:
        self.seen: list[Message] = []
        app = App()
        app.handler("M")(self._echo)
        super().__init__(app, family.client, sock=bound(family.bound_to), gro=gro, gso=gso)
        assert (self.loop.gro, self.loop.gso) == (gro, gso)
        self.client.setsockopt(SOL_UDP, UDP_GRO, 1)
        self.was_held_up = False
        """Whether another process had the CPU during a turn: the loop then sends its replies in between,
        and takes less in the next turn.
        """

    def _echo(self, message: Message) -> bytes:
        self.seen.append(message)
        return message.body

    def turn(self) -> int:
        begun_ns = time.monotonic_ns()
        taken = super().turn()
        self.was_held_up |= time.monotonic_ns() - begun_ns > TURN_BUDGET_NS
        return taken

    def receive_all(self, count: int) -> tuple[list[bytes], int]:
        """All replies there are, and how many of them came joined to another."""
        replies: list[bytes] = []
        joined = 0
        while len(replies) < count:
            data, control, flags, _ = self.client.recvmsg(1 << 16, 256)
            assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
            stride = len(data) or 1
            for level, kind, value in control:
                assert (level, kind) == (SOL_UDP, UDP_GRO)
                (stride,) = struct.unpack("=i", value)
            parts = [data[at : at + stride] for at in range(0, len(data), stride)]
            replies += parts
            joined += len(parts) if len(parts) > 1 else 0
        self.client.setblocking(False)
        with pytest.raises(BlockingIOError):
            self.client.recv(1)
        return replies, joined

    def check(self, sent: list[bytes]) -> int:
        """That all ``sent`` was seen and answered, and nothing else; how many replies came joined."""
        sender = self.client.getsockname()[:2]
        assert self.seen == [
            Message(message.magic, message.version, message.body, sender)
            for message in map(decode, sent)
        ]
        replies, joined = self.receive_all(len(sent))
        assert replies == sent
        size = sum(map(len, sent))
        counters = {name: value for name, value in self.slot.counters().items() if value}
        assert counters.pop("turns") == sum(self.slot.histograms()["batch_datagrams"])
        assert counters == {
            **dict.fromkeys(("rx_datagrams", "rx_messages", "tx_messages", "handled"), len(sent)),
            **dict.fromkeys(("rx_bytes", "tx_bytes"), size),
        }
        assert not self.errors
        return joined


def numbered(count: int, size: int, first: int = 0) -> list[bytes]:
    """Envelopes of one size, the last of them shorter."""
    header = len(encode("M", "1", b""))
    bodies = [b"%05d" % number for number in range(first, first + count)]
    return [encode("M", "1", body.ljust(size - header, b".")) for body in bodies[:-1]] + [
        encode("M", "1", bodies[-1])
    ]


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("gso", [False, True], ids=["gso-off", "gso-on"])
@pytest.mark.parametrize("gro", [False, True], ids=["gro-off", "gro-on"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("size", [64, 300])
def test_there_and_back(family: Family, gro: bool, gso: bool, batch: int, size: int) -> None:
    with Exchange(family, gro, gso) as peer:
        sends = [numbered(batch, size, first=number * batch) for number in range(3)]
        for send in sends:
            peer.send(*send)
        turns = peer.take(3 * batch)
        # Joined, a turn takes all; apart, a turn takes no more than it has buffers.
        assert peer.was_held_up or max(turns) == (3 * batch if gro else min(3 * batch, RX_BATCH))
        joined = peer.check([datagram for send in sends for datagram in send])
        assert peer.was_held_up or joined == (3 * batch if gso else 0)


@pytest.mark.parametrize("gro", [False, True], ids=["gro-off", "gro-on"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_sizes_in_any_order(family: Family, gro: bool) -> None:
    sizes = [14, 14, 15, 14, 1400, 9, 9, 9, 30000, 14, 1400, 1400, 9, 65507, 10, 9]
    datagrams = [encode("M", "", bytes([i]) * (size - 9)) for i, size in enumerate(sizes)]
    with Exchange(family, gro) as peer:
        for datagram in datagrams:
            peer.send(datagram)
        peer.take(len(datagrams))
        peer.check(datagrams)


@pytest.mark.parametrize("gro", [False, True], ids=["gro-off", "gro-on"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_the_largest_datagram_and_the_largest_send(family: Family, gro: bool) -> None:
    largest = encode("M", "1", bytes(MAX_DATAGRAM_BYTES - 10))
    # 64 segments, and as many bytes as one send may have.
    send = [encode("M", "1", bytes([i]) * 1013) for i in range(64)]
    assert len(largest) == MAX_DATAGRAM_BYTES
    assert MAX_DATAGRAM_BYTES - sum(map(len, send)) < 64
    with Exchange(family, gro) as peer:
        for datagrams in ([largest], send):
            peer.send(*datagrams)
            peer.take(len(datagrams))
        peer.check([largest, *send])


@pytest.mark.parametrize("gro", [False, True], ids=["gro-off", "gro-on"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_datagrams_of_no_bytes_between_joined_ones(family: Family, gro: bool) -> None:
    """They are datagrams too, and must neither end the batch nor be taken for a part of it."""
    first, second = numbered(8, 100), numbered(8, 100, first=8)
    with Exchange(family, gro) as peer:
        for datagrams in ([b""], first, [b""], [b""], second, [b""]):
            peer.send(*datagrams)
        peer.take(20)
        assert peer.slot.counters()["decode_empty"] == 4
        assert [message.body for message in peer.seen] == [
            decode(datagram).body for datagram in first + second
        ]
        replies, _ = peer.receive_all(16)
        assert replies == first + second


@pytest.mark.parametrize("gro", [False, True], ids=["gro-off", "gro-on"])
@pytest.mark.parametrize("few", [1, 5])
def test_few_after_a_full_batch(gro: bool, few: int) -> None:
    """Buffers that recvmmsg did not fill are not parsed again (brubeck's bug)."""
    full = [encode("M", "1", b"%05d" % number) for number in range(RX_BATCH)]
    after = [encode("M", "1", b"%d" % number) for number in range(few)]
    with Exchange(FAMILIES["v4"], gro) as peer:
        for datagrams in (full, after, full, after):
            for datagram in datagrams:
                peer.send(datagram)
            assert peer.take(len(datagrams)) == [len(datagrams)] or peer.was_held_up
        peer.check((full + after) * 2)


def test_a_stride_does_not_outlive_its_buffer() -> None:
    """A joined buffer is followed, in the same one, by a datagram that is longer than its stride."""
    joined = numbered(8, 100)
    single = [encode("M", "1", bytes(5000))]
    with Exchange(FAMILIES["v4"]) as peer:
        for datagrams in (joined, single, joined, single):
            peer.send(*datagrams)
            assert peer.take(len(datagrams)) == [len(datagrams)] or peer.was_held_up
        peer.check((joined + single) * 2)


def test_senders_in_turn() -> None:
    """Each reply goes to its own client, also where the peer could join it to its neighbour."""
    with Exchange(FAMILIES["dual-v4"]) as peer:
        clients = [
            peer.new_client((socket.AF_INET, socket.AF_INET6)[number % 2]) for number in range(6)
        ]
        order = [number * number % 6 for number in range(60)]
        for at, number in enumerate(order):
            clients[number].send(encode("M", "1", b"%02d" % at))
        peer.take(len(order))
        assert [message.sender for message in peer.seen] == [
            clients[number].getsockname()[:2] for number in order
        ]
        for number, client in enumerate(clients):
            for at in (at for at, to in enumerate(order) if to == number):
                assert decode(client.recv(100)).body == b"%02d" % at
