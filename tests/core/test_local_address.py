"""A wildcard peer answers from the address that was asked (ext/peerd/destination.pxd)."""

import asyncio
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from harness.loop_harness import LoopHarness, bound
from harness.namespaces import Hosts
from harness.ports import free_ports
from harness.supervised import NO_ETCD, Supervised
from peerd import (
    App,
    AsyncPeerClient,
    Message,
    Peer,
    PeerClient,
    SettingsError,
    control,
    decode,
    encode,
)
from peerd.linux import IP_PKTINFO, UDP_GRO, UDP_SEGMENT

V4, V6 = socket.AF_INET, socket.AF_INET6


class WildcardPeer(LoopHarness):
    """``locals``: where each request was sent to."""

    def __init__(self, sock: socket.socket, **options: Any) -> None:
        self.locals: list[tuple[str, int] | None] = []
        app = App()
        app.handler("ECHO")(self._echo)
        super().__init__(app, sock=sock, **options)

    def _echo(self, message: Message) -> bytes:
        self.locals.append(message.local)
        return message.body


@contextmanager
def connected(address: str, port: int) -> Iterator[socket.socket]:
    with socket.socket(V6 if ":" in address else V4, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        client.connect((address, port))
        yield client


@pytest.mark.parametrize("gso", [False, True])
@pytest.mark.parametrize(
    ("host", "asked"),
    [
        ("0.0.0.0", ["127.0.0.1", "127.0.0.2", "127.0.0.3"]),
        ("::", ["::1", "127.0.0.1", "127.0.0.2", "::ffff:127.0.0.3"]),
    ],
)
def test_each_client_is_answered_from_where_it_asked(
    host: str, asked: list[str], gso: bool
) -> None:
    """Requests in runs and alone, of several clients in turn; a run has one local address."""
    with ExitStack() as stack:
        peer = stack.enter_context(WildcardPeer(bound(host), gso=gso))
        clients = [stack.enter_context(connected(address, peer.port)) for address in asked]
        request = encode("ECHO", "1", b"%03d" % 0)
        for _ in range(3):
            for client in clients:
                size = struct.pack("=H", len(request))
                client.sendmsg([request * 5], [(socket.IPPROTO_UDP, UDP_SEGMENT, size)])
                client.send(request)
        peer.take(18 * len(clients))
        for client in clients:
            received = 0
            while received < 18 * len(request):
                received += len(client.recv(1 << 16))
        assert peer["tx_messages"] == 18 * len(clients)
        assert set(peer.locals) == {(a.removeprefix("::ffff:"), peer.port) for a in asked}


@pytest.mark.parametrize(
    ("host", "client_host", "asked"),
    [
        ("0.0.0.0", "127.0.0.1", ("127.0.0.1", "127.0.0.2")),
        ("::", "::", ("::1", "::ffff:127.0.0.3")),
    ],
)
def test_one_socket_that_asks_at_two_addresses_gets_both_answers_from_them(
    host: str, client_host: str, asked: tuple[str, str]
) -> None:
    """In the first case only the local address distinguishes the requests."""
    with WildcardPeer(bound(host)) as peer, bound(client_host) as client:
        client.settimeout(5)
        order = [*asked * 4, *[asked[1]] * 3]
        for number, address in enumerate(order):
            client.sendto(encode("ECHO", "1", b"%02d" % number), (address, peer.port))
        peer.take(len(order))
        for number, address in enumerate(order):
            data, sender = client.recvfrom(100)
            assert (decode(data).body, sender[:2]) == (b"%02d" % number, (address, peer.port))


def test_a_socket_bound_to_one_address_reports_none() -> None:
    """Also after a loop that has asked for it: a socket may be handed over."""
    sock = bound("127.0.0.1")
    sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
    with WildcardPeer(sock) as peer:
        assert sock.getsockopt(socket.IPPROTO_IP, IP_PKTINFO) == 0
        peer.client.send(encode("ECHO", "1", b"x"))
        peer.take(1)
        assert peer.receive().body == b"x"
        assert peer.locals == [("127.0.0.1", peer.port)]
        assert Message("M", "1", b"").local is None


def test_other_addresses_and_interfaces() -> None:
    """A second address, another interface's, IPv6 ones, a link-local one, and multicast."""
    with Hosts("left", "right") as hosts, ExitStack() as stack:
        hosts.server.ip("addr add 10.77.0.11/24 dev left")
        hosts.server.ip("addr add fd77::11/64 dev left nodad")
        hosts.server.ip("addr add fe80::77/64 dev left nodad")
        hosts.behind["left"].ip("route add default via 10.77.0.1")
        hosts.behind["left"].ip("route add 224.0.0.0/4 dev left")
        hosts.behind["left"].ip("-6 route add default via fd77::1")
        sock = hosts.server.socket("::", 5001, V6)
        joined = socket.inet_aton("239.1.2.3") + socket.inet_aton("10.77.0.11")
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, joined)
        peer = stack.enter_context(WildcardPeer(sock))
        for address in (
            *("10.77.0.1", "10.77.0.11", "10.78.0.1"),
            *("fd77::1", "fd77::11", "fd78::1", "fe80::77"),
        ):
            family = V6 if ":" in address else V4
            client = stack.enter_context(hosts.behind["left"].socket("", family=family))
            # In the client's namespace the interface has a number of its own.
            zone = (0, 2) if address.startswith("fe80") else ()
            client.connect((address, 5001, *zone))
            for _ in range(3):
                client.send(encode("ECHO", "1", b"x"))
            peer.take(3)
            assert decode(client.recv(100)).body == b"x"
            assert peer.locals[-1] == (address, 5001)
        client = stack.enter_context(hosts.behind["left"].socket())
        client.sendto(encode("ECHO", "1", b"x"), ("239.1.2.3", 5001))
        peer.take(1)
        _, sender = client.recvfrom(100)
        assert sender[0] in ("10.77.0.1", "10.77.0.11")


LATE_APP = """
import asyncio
from peerd import App
app = App()

@app.handler("ECHO")
async def echo(message):
    await asyncio.sleep(0.01)
    return b"%s:%d" % (message.local[0].encode(), message.local[1])
"""


def test_a_late_answer_leaves_from_there_too_also_after_a_reload(supervised: Supervised) -> None:
    running = supervised.start("--host=0.0.0.0", peers=1, app=LATE_APP, etcd=NO_ETCD).wait_ready()
    port = running.ports[0]
    with PeerClient() as client:
        for _ in range(2):
            for address in ("127.0.0.1", "127.0.0.2"):
                answer = client.request((address, port), "ECHO", b"", timeout=5)
                assert answer.body == b"%s:%d" % (address.encode(), port)
            control.request(running.control, "reload")


def test_a_client_chooses_its_source() -> None:
    app = App()
    app.handler("WHO")(lambda message: str(message.sender[0]).encode() if message.sender else None)
    port = free_ports()

    async def ask() -> bytes:
        async with AsyncPeerClient(source="127.0.0.6") as client:
            return (await client.request(("127.0.0.1", port), "WHO", b"", timeout=5)).body

    with Peer(app, host="127.0.0.1", port=port):
        with PeerClient(source="127.0.0.5") as client:
            assert client.request(("127.0.0.1", port), "WHO", b"", timeout=5).body == b"127.0.0.5"
            client.send(("127.0.0.1", port), "WHO", b"")
        assert asyncio.run(ask()) == b"127.0.0.6"
    with pytest.raises(SettingsError, match="numeric address"):
        PeerClient(source="localhost")
