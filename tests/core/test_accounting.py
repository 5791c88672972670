"""Sent = delivered + every kind of drop, exactly, whatever is sent and however fast.

The sends are ordinary ones, so that what the kernel drops is one datagram each time; of joined
datagrams (UDP_SEGMENT, UDP_GRO) it counts a whole buffer as one drop.
"""

import gc
import os
import random
import select
import socket
import threading
from collections import Counter

import psutil
import pytest

from harness import reference_wire
from harness.eventually import eventually
from harness.loop_harness import LoopHarness
from peerd import App, Message, decode, encode
from peerd.linux import SO_RCVMARK, SO_TIMESTAMPNS
from peerd.supervisor.socket_queue import queue_state

IPV6_2292PKTINFO, IPV6_2292HOPLIMIT, IPV6_FLOWINFO, IPV6_ORIGDSTADDR = 2, 8, 11, 74
# RX_BATCH of ext/peerd/receive.pxd.
RX_BATCH = 16


class Accounted(LoopHarness):
    """Collects M, answers PING; what the kernel dropped is among its counters."""

    def __init__(
        self,
        recv_buffer_bytes: int = 1 << 20,
        family: socket.AddressFamily = socket.AF_INET,
        gro: bool = True,
    ) -> None:
        self.seen: list[Message] = []
        app = App()
        app.handler("M")(self.seen.append)
        app.handler("PING")(lambda message: message.body)
        super().__init__(app, family, recv_buffer_bytes, gro=gro)

    @property
    def counters(self) -> Counter[str]:
        kernel_drops = queue_state(self.sock).dropped
        return Counter({**super().counters, "rx_kernel_drops": kernel_drops})

    @property
    def accounted(self) -> int:
        """Datagrams that were delivered, or dropped and counted."""
        counters = self.counters
        return counters["rx_datagrams"] + counters["rx_kernel_drops"]

    def turn_until_empty(self) -> None:
        while select.select([self.loop], [], [], 0)[0]:
            self.loop.turn()


def random_datagram(generator: random.Random) -> bytes:
    """Any bytes, or an envelope, or one that was cut off or has a byte changed."""
    kind = generator.randrange(4)
    if kind == 0:
        return generator.randbytes(generator.randrange(100))
    magic = generator.choice(["M", "NOPE", ""])
    datagram = bytearray(encode(magic, "1", generator.randbytes(generator.randrange(50))))
    if kind == 2:
        del datagram[generator.randrange(len(datagram)) :]
    if kind == 3:
        datagram[generator.randrange(len(datagram))] = generator.randrange(256)
    return bytes(datagram)


def outcome_of(datagram: bytes) -> str:
    """The counter that a datagram belongs to."""
    try:
        magic, _, _ = reference_wire.decode(datagram)
    except reference_wire.RefusedError as refused:
        return f"decode_{refused.reason}"
    return "rx_messages" if magic in ("M", "PING") else "unknown_magic"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("gro", [False, True], ids=["gro-off", "gro-on"])
def test_a_socket_that_overran(gro: bool, family: socket.AddressFamily) -> None:
    """5,000 are sent before the first turn; the drops are known from that turn on."""
    with Accounted(20_000, gro=gro, family=family) as peer:
        for number in range(5000):
            peer.client.send(encode("M", "1", b"%04d" % number))
        assert peer.loop.turn() == RX_BATCH
        peer.turn_until_empty()
        assert peer.accounted == 5000
        assert peer.counters["rx_kernel_drops"] == 5000 - len(peer.seen) > 4000
        # The queue keeps what came first.
        assert [int(message.body) for message in peer.seen] == list(range(len(peer.seen)))


def test_a_socket_that_overruns_while_it_is_served() -> None:
    """Any datagrams at any speed: the counters add up once the loop has looked at the socket again."""
    generator = random.Random(4)
    datagrams = [random_datagram(generator) for _ in range(2000)]
    expected = Counter(map(outcome_of, datagrams))
    with Accounted(5000) as peer:
        rounds = 0
        with peer.running():
            # Mostly the first one overruns it.
            while rounds < 10 or (rounds < 1000 and not queue_state(peer.sock).dropped):
                rounds += 1
                for datagram in datagrams:
                    peer.client.send(datagram)
            eventually(lambda: peer.accounted == rounds * len(datagrams))
        assert peer.counters["rx_kernel_drops"] > 0
        assert peer.counters["handled"] == peer.counters["rx_datagrams"]
        assert not peer.errors
        for name, count in expected.items():
            assert peer.counters[name] <= rounds * count, name


def test_drops_are_counted_once_though_loops_come_and_go() -> None:
    """A worker is replaced; its socket, with what it has queued and counted, stays."""
    with Accounted(5000) as peer:
        sent = 0
        for _ in range(4):
            for _ in range(500):
                peer.client.send(encode("M", "1", b""))
            sent += 500
            peer.loop = peer.new_loop()
            peer.turn_until_empty()
            assert peer.accounted == sent
        assert peer.counters["rx_kernel_drops"] > 1000


def test_drops_are_seen_while_nothing_arrives() -> None:
    """Drops are counted without a further datagram (SO_RXQ_OVFL would need one)."""
    entered, go_on = threading.Event(), threading.Event()

    def wait(message: Message) -> None:
        entered.set()
        go_on.wait()

    with Accounted(5000) as peer:
        peer.app.handler("WAIT")(wait)
        peer.loop = peer.new_loop()
        with peer.running():
            peer.client.send(encode("WAIT", "1", b""))
            entered.wait()
            for _ in range(1000):
                peer.client.send(encode("M", "1", b""))
            go_on.set()
            eventually(lambda: peer.accounted == 1001)
        assert peer.counters["rx_kernel_drops"] > 0


def test_what_has_lost_its_control_messages_is_not_delivered() -> None:
    """The control messages that the owner of the socket asked for do not fit: the kernel sets MSG_CTRUNC."""
    with Accounted(family=socket.AF_INET6) as peer:
        peer.client.send(encode("M", "1", b"before"))
        peer.turn_until_empty()
        for option in (
            socket.IPV6_RECVPKTINFO,
            socket.IPV6_RECVHOPLIMIT,
            socket.IPV6_RECVTCLASS,
            IPV6_2292PKTINFO,
            IPV6_2292HOPLIMIT,
            IPV6_FLOWINFO,
            IPV6_ORIGDSTADDR,
        ):
            peer.sock.setsockopt(socket.IPPROTO_IPV6, option, 1)
        for option in (SO_TIMESTAMPNS, SO_RCVMARK):
            peer.sock.setsockopt(socket.SOL_SOCKET, option, 1)
        for _ in range(5):
            peer.client.send(encode("M", "1", b"during"))
        peer.turn_until_empty()
        peer.sock.setsockopt(socket.IPPROTO_IPV6, IPV6_ORIGDSTADDR, 0)
        peer.sock.setsockopt(socket.IPPROTO_IPV6, IPV6_2292PKTINFO, 0)
        peer.sock.setsockopt(socket.IPPROTO_IPV6, IPV6_2292HOPLIMIT, 0)
        peer.client.send(encode("M", "1", b"after"))
        peer.turn_until_empty()
        assert [message.body for message in peer.seen] == [b"before", b"after"]
        assert peer.counters["rx_truncated"] == 5
        assert peer.counters["handled"] == peer.accounted == 7


def test_a_flood_of_random_bytes_changes_nothing_but_counters() -> None:
    """Single and joined, while another client's pings are all answered."""
    generator = random.Random(5)
    with Accounted() as peer:
        other = peer.new_client()
        sent = Counter[str]()
        with peer.running():
            for number in range(300):
                datagrams = [generator.randbytes(generator.randrange(100)) for _ in range(20)]
                # Joined ones are of one size, none of them empty.
                joined = [generator.randbytes(40) for _ in range(60)]
                for datagram in datagrams:
                    peer.client.send(datagram)
                peer.send(*joined)
                sent.update(map(outcome_of, datagrams + joined))
                other.send(encode("PING", "1", b"%d" % number))
                assert decode(other.recv(100)).body == b"%d" % number
            sent["rx_messages"] += 300
            eventually(lambda: peer.counters["rx_datagrams"] == sent.total())
        for name, count in sent.items():
            assert peer.counters[name] == count, name
        assert peer.accounted == 300 * 81
        assert not peer.seen
        assert not peer.errors


def test_memory_stays_flat_under_random_bytes() -> None:
    """Versions and magic codes are the sender's choice: what is kept of them is bounded."""
    generator = random.Random(6)
    with Accounted() as peer:

        def rounds(count: int) -> int:
            for _ in range(count):
                for _ in range(50):
                    version = generator.randbytes(16).hex()
                    peer.client.send(encode("PING", version, b""))
                    peer.client.send(encode(version, "1", b""))
                    peer.client.send(generator.randbytes(60))
                peer.turn_until_empty()
                for _ in range(50):
                    peer.client.recv(100)
            gc.collect()
            return psutil.Process(os.getpid()).memory_info().rss

        before = rounds(20)
        assert rounds(200) - before < 2 << 20


def test_histograms_have_every_turn() -> None:
    """Batches of 1, 2, 3, ... datagrams, each taken in one turn."""
    batches = [1, 2, 3, 4, 7, 8, 15, 16]
    with Accounted() as peer:
        for batch in batches:
            for _ in range(batch):
                peer.client.send(encode("M", "1", b""))
            assert peer.loop.turn() == batch
            peer.loop.turn()  # finds nothing, and is no turn
        assert peer.counters["turns"] == len(batches)
        batch_histogram = peer.slot.histograms()["batch_datagrams"]
        assert batch_histogram[:5] == [1, 2, 2, 2, 1]
        assert sum(batch_histogram) == sum(peer.slot.histograms()["turn_us"]) == len(batches)


def test_histograms_sum_to_turns_under_load() -> None:
    with Accounted() as peer:
        with peer.running():
            joined = [encode("M", "1", bytes(20))] * 50
            for _ in range(200):
                peer.send(*joined)
                peer.client.send(encode("PING", "1", b""))
                peer.client.recv(100)
            eventually(lambda: peer.counters["rx_datagrams"] == 200 * 51)
        histograms = peer.slot.histograms()
        turns = peer.counters["turns"]
        assert sum(histograms["batch_datagrams"]) == sum(histograms["turn_us"]) == turns
        least = sum(count << bucket for bucket, count in enumerate(histograms["batch_datagrams"]))
        assert least <= 200 * 51 < 2 * least
