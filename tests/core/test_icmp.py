"""A client that cannot be reached is counted, and named to on_icmp_error; it stops and slows nothing.

The ICMP errors are real: of ports that were closed, and, where the test may open a raw socket, of
every type and code that a host or router can send about a UDP datagram.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from harness import forged_icmp
from harness.eventually import eventually
from harness.forged_datagram import forge_datagram
from harness.forged_icmp import FRAGMENTATION_NEEDED, PACKET_TOO_BIG, raw_socket
from harness.loop_harness import LoopHarness, bound
from peerd import App, Message, decode, encode
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


def ask_and_leave(peer: LoopHarness, family: socket.AddressFamily | None = None) -> tuple[str, int]:
    """A request of a client that is gone when its answer comes; its address."""
    with peer.new_client(family or peer.sock.family) as client:
        ask(client, b"gone")
        host, port = client.getsockname()[:2]
        return host, port


def ask(client: socket.socket, body: bytes) -> None:
    client.send(encode("ECHO", "1", body))


def answer(client: socket.socket) -> bytes:
    return decode(client.recv(1 << 16)).body


@pytest.mark.parametrize(
    ("host", "of_client"),
    [("127.0.0.1", V4), ("::1", V6), ("::", V6), ("::", V4)],
    ids=["v4", "v6", "dual-v6", "dual-v4"],
)
def test_an_unreachable_client_is_counted_and_named(
    host: str, of_client: socket.AddressFamily
) -> None:
    with LoopHarness(sock=bound(host)) as peer:
        gone = [ask_and_leave(peer, of_client) for _ in range(3)]
        for _ in range(3):
            peer.loop.turn()
        client = peer.new_client(of_client)
        ask(client, b"x")
        eventually(peer.loop.turn)
        assert answer(client) == b"x"
        assert peer.icmp_errors == [(address, errno.ECONNREFUSED) for address in gone]
        assert peer["icmp_errors"] == 3
        assert peer["tx_messages"] == 4
        assert peer["tx_dropped_refused"] == 0


def test_an_icmp_error_is_counted_without_a_callback() -> None:
    with LoopHarness(on_icmp_error=None) as peer:
        ask_and_leave(peer)
        peer.loop.turn()
        peer.loop.turn()
        assert peer["icmp_errors"] == 1


@pytest.mark.parametrize("family", [V4, V6], ids=["v4", "v6"])
def test_an_idle_loop_hears_of_it_too(family: socket.AddressFamily) -> None:
    """Woken by the error queue, with no datagram to follow."""
    with LoopHarness(family=family) as peer:
        gone = ask_and_leave(peer)
        with peer.running():
            eventually(lambda: peer["icmp_errors"])
        assert peer.icmp_errors == [(gone, errno.ECONNREFUSED)]


@pytest.mark.parametrize("family", [V4, V6], ids=["v4", "v6"])
def test_among_many_dead_clients_the_living_get_their_answers(
    family: socket.AddressFamily,
) -> None:
    """All in one turn or a few: each send to a dead one leaves an error to the send behind it."""
    with LoopHarness(family=family) as peer:
        gone = []
        for number in range(60):
            gone.append(ask_and_leave(peer))
            ask(peer.client, b"%d" % number)
        with peer.running():
            assert [answer(peer.client) for _ in range(60)] == [
                b"%d" % number for number in range(60)
            ]
            eventually(lambda: peer["icmp_errors"] == 60)
        assert peer.icmp_errors == [(address, errno.ECONNREFUSED) for address in gone]
        assert peer["tx_messages"] == 120
        assert peer["tx_dropped_refused"] == 0
        # Waiting for nothing, and turning in vain for nothing.
        assert peer["turns"] <= 120


def test_icmp_errors_take_no_room_from_datagrams_in_a_loop_that_is_never_idle() -> None:
    """They are charged to the receive buffer, and a loop under load never gets to poll()."""
    with LoopHarness() as peer:
        for _ in range(50):
            # Each batch is full, so the loop does not wait; and the last send of each works.
            for number in range(8):
                ask_and_leave(peer)
                ask(peer.client, b"%d" % number)
            peer.take(16)
            assert [answer(peer.client) for _ in range(8)] == [
                b"%d" % number for number in range(8)
            ]
            # An error that waits takes 768 bytes or more.
            memory = peer.sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36)
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
    with raw_socket(family) as raw, LoopHarness(family=family) as peer:
        forge_icmp_error(raw, kind, code, peer.sock, peer.client)
        ask(peer.client, b"x")
        peer.take(1)
        assert answer(peer.client) == b"x"
        peer.loop.turn()
        assert peer["icmp_errors"] == len(peer.icmp_errors) == 1
        address, error = peer.icmp_errors[0]
        assert address == peer.client.getsockname()[:2]
        assert os.strerror(error)


@pytest.mark.parametrize(("family", "kind", "code"), ERRORS, ids=ERROR_IDS)
def test_no_icmp_error_costs_another_client_its_reply(
    family: socket.AddressFamily, kind: int, code: int
) -> None:
    """It comes while the request is handled, so it shows in the sendmmsg of the reply."""
    with error_while_handling(family, kind, code) as peer:
        ask(peer.client, b"x")
        peer.take(1)
        assert answer(peer.client) == b"x"
        peer.loop.turn()
        assert peer["tx_messages"] == 1
        assert peer["tx_dropped_refused"] == peer["tx_dropped_too_big"] == 0
        assert peer["icmp_errors"] == len(peer.icmp_errors) == 1
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
    with error_while_handling(family, *error) as peer:
        for body in (b"x", b"y"):
            ask(peer.client, body)
        peer.take(2)
        assert [answer(peer.client), answer(peer.client)] == [b"x", b"y"]
        assert peer["tx_gso_refused"] == 0


@contextmanager
def error_while_handling(
    family: socket.AddressFamily, kind: int, code: int
) -> Iterator[LoopHarness]:
    """A peer that gets an ICMP error about another client with each request."""
    app = App()

    @app.handler("ECHO")
    def handle(message: Message) -> bytes:
        forge_icmp_error(raw, kind, code, peer.sock, other)
        return message.body

    with raw_socket(family) as raw, LoopHarness(app, family) as peer:
        other = peer.new_client(family)
        yield peer


def test_addresses_that_take_nothing_do_not_turn_offload_off() -> None:
    """Port 0 as a source is legal (RFC 768) and cannot be answered (EINVAL), run or no run.

    Any host can send such requests, from as many addresses as it likes.
    """
    with LoopHarness(sock=bound("0.0.0.0")) as peer:
        for number in range(1, 101):
            for _ in range(2):
                forge_datagram(0, peer.port, encode("ECHO", "1", b"x"), f"127.0.1.{number}")
            peer.take(2)
        assert peer["tx_dropped_refused"] == 200
        assert peer["tx_gso_refused"] == 0
        assert peer.loop.gso
