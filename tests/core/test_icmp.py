"""A client that cannot be reached is counted, and named to on_icmp_error; it stops and slows nothing.

The ICMP errors are real: of ports that were closed, and, where the test may open a raw socket, of
every type and code that a host or router can send about a UDP datagram.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from harness import forged_icmp
from harness.eventually import eventually
from harness.forged_icmp import FRAGMENTATION_NEEDED, LOOPBACK, PACKET_TOO_BIG, raw_socket
from peerd import App, Message, decode, encode
from peerd._loop import DatagramLoop
from peerd._scoreboard import Scoreboard, Slot
from peerd.linux import SO_MEMINFO

IP_MTU_DISCOVER, IP_PMTUDISC_INTERFACE = 10, 4
V4, V6 = socket.AF_INET, socket.AF_INET6

# Destination unreachable with all its codes, time exceeded, parameter problem: RFC 792, RFC 1122
# section 3.2.2.1, RFC 1812 section 5.2.7. Linux keeps "reassembly time exceeded" (11, 1) to itself.
V4_ERRORS = [(3, code) for code in range(16)] + [(11, 0), (12, 0), (12, 1)]
# Destination unreachable, packet too big, time exceeded, parameter problem: RFC 4443.
V6_ERRORS = [(1, code) for code in range(7)] + [(2, 0), (3, 0), (3, 1), (4, 0), (4, 1), (4, 2)]
ERRORS = [(V4, *error) for error in V4_ERRORS] + [(V6, *error) for error in V6_ERRORS]
ERROR_IDS = [f"v{4 if family == V4 else 6}-{kind}-{code}" for family, kind, code in ERRORS]


class Peer:
    """A loop that echoes, turn by turn or in a thread, and the ICMP errors that it named."""

    def __init__(
        self, sock: socket.socket, handle: Callable[[Message], bytes] | None = None
    ) -> None:
        self.sock = sock
        self.slot: Slot = Scoreboard(1).slots[0]
        self.icmp: list[tuple[tuple[str, int] | None, int]] = []
        self.errors: list[object] = []
        app = App()
        app.handler("ECHO")(handle or (lambda message: message.body))
        self.loop = DatagramLoop(
            sock.fileno(),
            app.handlers,
            {},
            self.slot,
            lambda *error: self.errors.append(error),
            on_icmp_error=lambda address, error: self.icmp.append((address, error)),
        )

    def take(self, datagrams: int) -> None:
        """Turn until so many are taken, and no more often."""
        while datagrams > 0:
            assert select.select([self.loop], [], [], 30)[0], f"{datagrams} did not come"
            datagrams -= self.loop.turn()

    def __getitem__(self, counter: str) -> int:
        return self.slot.counters()[counter]

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.loop.run)
        thread.start()
        try:
            yield
        finally:
            self.loop.stop()
            thread.join()


@contextmanager
def bound(family: socket.AddressFamily, address: str = "") -> Iterator[socket.socket]:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        if address == "::":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((address or LOOPBACK[family], 0))
        yield sock


@contextmanager
def connected(family: socket.AddressFamily, to: socket.socket) -> Iterator[socket.socket]:
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(30)
        client.connect((LOOPBACK[family], to.getsockname()[1]))
        yield client


def ask_and_leave(family: socket.AddressFamily, peer: socket.socket) -> tuple[str, int]:
    """A request of a client that is gone when its answer comes; its address."""
    with connected(family, peer) as client:
        client.send(encode("ECHO", "1", b"gone"))
        host, port = client.getsockname()[:2]
        return host, port


def ask(client: socket.socket, body: bytes) -> None:
    client.send(encode("ECHO", "1", body))


def answer(client: socket.socket) -> bytes:
    return decode(client.recv(1 << 16)).body


@pytest.mark.parametrize(
    ("family", "address", "of_client"),
    [(V4, "", V4), (V6, "", V6), (V6, "::", V6), (V6, "::", V4)],
    ids=["v4", "v6", "dual-v6", "dual-v4"],
)
def test_an_unreachable_client_is_counted_and_named(
    family: socket.AddressFamily, address: str, of_client: socket.AddressFamily
) -> None:
    with bound(family, address) as sock:
        peer = Peer(sock)
        gone = [ask_and_leave(of_client, sock) for _ in range(3)]
        for _ in range(3):
            peer.loop.turn()
        with connected(of_client, sock) as client:
            ask(client, b"x")
            eventually(peer.loop.turn)
            assert answer(client) == b"x"
        assert peer.icmp == [(address, errno.ECONNREFUSED) for address in gone]
        assert peer["icmp_errors"] == 3
        assert peer["tx_messages"] == 4
        assert peer["tx_dropped_refused"] == 0


def test_it_is_counted_without_anybody_to_name_it_to() -> None:
    with bound(V4) as sock:
        slot = Scoreboard(1).slots[0]
        app = App()
        app.handler("ECHO")(lambda message: message.body)
        loop = DatagramLoop(sock.fileno(), app.handlers, {}, slot, print)
        ask_and_leave(V4, sock)
        loop.turn()
        loop.turn()
        assert slot.counters()["icmp_errors"] == 1


@pytest.mark.parametrize("family", [V4, V6], ids=["v4", "v6"])
def test_an_idle_loop_hears_of_it_too(family: socket.AddressFamily) -> None:
    """Woken by the error queue, with no datagram to follow."""
    with bound(family) as sock:
        peer = Peer(sock)
        gone = ask_and_leave(family, sock)
        with peer.running():
            eventually(lambda: peer["icmp_errors"])
        assert peer.icmp == [(gone, errno.ECONNREFUSED)]


@pytest.mark.parametrize("family", [V4, V6], ids=["v4", "v6"])
def test_among_many_dead_clients_the_living_get_their_answers(
    family: socket.AddressFamily,
) -> None:
    """All in one turn or a few: each send to a dead one leaves an error to the send behind it."""
    with bound(family) as sock, connected(family, sock) as client:
        peer = Peer(sock)
        gone = []
        for number in range(60):
            gone.append(ask_and_leave(family, sock))
            ask(client, b"%d" % number)
        with peer.running():
            assert [answer(client) for _ in range(60)] == [b"%d" % number for number in range(60)]
            eventually(lambda: peer["icmp_errors"] == 60)
        assert peer.icmp == [(address, errno.ECONNREFUSED) for address in gone]
        assert peer["tx_messages"] == 120
        assert peer["tx_dropped_refused"] == 0
        # Waiting for nothing, and turning in vain for nothing.
        assert peer["turns"] <= 120


def test_icmp_errors_take_no_room_from_datagrams_in_a_loop_that_is_never_idle() -> None:
    """They are charged to the receive buffer, and a loop under load never gets to poll()."""
    with bound(V4) as sock, connected(V4, sock) as client:
        peer = Peer(sock)
        for _ in range(50):
            # Each batch is full, so the loop does not wait; and the last send of each works.
            for number in range(8):
                ask_and_leave(V4, sock)
                ask(client, b"%d" % number)
            peer.take(16)
            assert [answer(client) for _ in range(8)] == [b"%d" % number for number in range(8)]
            # An error that waits takes 768 bytes or more.
            memory = sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36)
            assert struct.unpack_from("=I", memory)[0] < 100 * 768
        assert peer["icmp_errors"] > 300


def forge_icmp_error(
    raw: socket.socket, kind: int, code: int, peer: socket.socket, client: socket.socket
) -> None:
    """Report to the peer that a datagram from it did not reach the client."""
    if peer.family == V4 and (kind, code) == FRAGMENTATION_NEEDED:
        # Else the kernel would believe it, of this address, for ten minutes and for every process.
        peer.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_INTERFACE)
    forged_icmp.forge_icmp_error(raw, kind, code, peer.getsockname()[1], client.getsockname()[1])


@pytest.mark.parametrize(("family", "kind", "code"), ERRORS, ids=ERROR_IDS)
def test_no_icmp_error_ends_the_loop(family: socket.AddressFamily, kind: int, code: int) -> None:
    """Anybody can send one, and each shows as an errno of its own in the next recvmmsg."""
    with ExitStack() as stack:
        raw = stack.enter_context(raw_socket(family))
        sock = stack.enter_context(bound(family))
        client = stack.enter_context(connected(family, sock))
        peer = Peer(sock)
        forge_icmp_error(raw, kind, code, sock, client)
        ask(client, b"x")
        peer.take(1)
        assert answer(client) == b"x"
        peer.loop.turn()
        assert peer["icmp_errors"] == len(peer.icmp) == 1
        address, error = peer.icmp[0]
        assert address == client.getsockname()[:2]
        assert os.strerror(error)


@pytest.mark.parametrize(("family", "kind", "code"), ERRORS, ids=ERROR_IDS)
def test_no_icmp_error_costs_another_client_its_reply(
    family: socket.AddressFamily, kind: int, code: int
) -> None:
    """It comes while the request is handled, so it shows in the sendmmsg of the reply."""
    with error_while_handling(family, kind, code) as (peer, client):
        ask(client, b"x")
        peer.take(1)
        assert answer(client) == b"x"
        peer.loop.turn()
        assert peer["tx_messages"] == 1
        assert peer["tx_dropped_refused"] == peer["tx_dropped_too_big"] == 0
        assert peer["icmp_errors"] == len(peer.icmp) == 1
        assert not peer.errors


@pytest.mark.parametrize(
    ("family", "error"), [(V4, FRAGMENTATION_NEEDED), (V6, PACKET_TOO_BIG)], ids=["v4", "v6"]
)
def test_no_icmp_error_costs_another_client_its_runs(
    family: socket.AddressFamily, error: tuple[int, int]
) -> None:
    """EMSGSIZE is what a run above the path's MTU meets as well, and for that one it is remembered.

    Remembered of 64 clients, it would end runs for all.
    """
    with error_while_handling(family, *error) as (peer, client):
        ask(client, b"x")
        ask(client, b"y")
        peer.take(2)
        assert [answer(client), answer(client)] == [b"x", b"y"]
        assert peer["tx_gso_refused"] == 0


@contextmanager
def error_while_handling(
    family: socket.AddressFamily, kind: int, code: int
) -> Iterator[tuple[Peer, socket.socket]]:
    """A peer that gets an ICMP error about another client with each request, and a client of it."""
    with ExitStack() as stack:
        raw = stack.enter_context(raw_socket(family))
        sock = stack.enter_context(bound(family))
        client = stack.enter_context(connected(family, sock))
        other = stack.enter_context(connected(family, sock))

        def handle(message: Message) -> bytes:
            forge_icmp_error(raw, kind, code, sock, other)
            return message.body

        yield Peer(sock, handle), client


def test_addresses_that_take_nothing_do_not_turn_offload_off() -> None:
    """Port 0 as a source is legal (RFC 768) and cannot be answered (EINVAL), run or no run.

    Anybody can send that, from as many addresses as he likes.
    """
    with ExitStack() as stack:
        try:
            raw = socket.socket(V4, socket.SOCK_RAW, socket.IPPROTO_UDP)
        except PermissionError:
            pytest.skip("a raw socket needs CAP_NET_RAW")
        stack.enter_context(raw)
        sock = stack.enter_context(bound(V4, "0.0.0.0"))
        peer = Peer(sock)
        request = encode("ECHO", "1", b"x")
        # Without a checksum: 0.
        header = struct.pack(">HHHH", 0, sock.getsockname()[1], 8 + len(request), 0)
        for number in range(1, 101):
            with socket.socket(V4, socket.SOCK_RAW, socket.IPPROTO_UDP) as source:
                source.bind((f"127.0.1.{number}", 0))
                source.sendto(header + request, ("127.0.0.1", 0))
                source.sendto(header + request, ("127.0.0.1", 0))
            peer.take(2)
        assert peer["tx_dropped_refused"] == 200
        assert peer["tx_gso_refused"] == 0
        assert peer.loop.gso
