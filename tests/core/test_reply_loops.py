"""No datagram makes two peers, or one, answer each other's answers for ever (ext/peerd/loop_guard.pxd)."""

import logging
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from harness.eventually import eventually
from harness.forged_datagram import forge_datagram
from harness.loop_harness import LoopHarness, bound
from harness.ports import free_ports
from harness.supervised import NO_ETCD, Running, Supervised
from peerd import App, Message, Peer, control, encode
from peerd._scoreboard import PeerState, Scoreboard
from peerd.serving.loop_logs import DroppedReplyLog

APPENDING_APP = """
from peerd import App
app = App()

@app.handler("CHAT")
def chat(message):
    return message.body + b"!"

@app.handler("ECHO")
def echo(message):
    return message.body
"""
ANSWERS: dict[str, Callable[[Message], bytes | Message]] = {
    "ECHO": lambda message: message.body,
    "CHAT": lambda message: message.body + b"!",
    "TURN": lambda message: Message("TURN", message.version, os.urandom(20)),
    "ASK": lambda message: Message("ANSWER", message.version, message.body),
}
ADDRESSES = [
    ("127.0.0.1", "127.0.0.1"),
    ("0.0.0.0", "127.0.0.1"),
    ("::", "127.0.0.1"),
    ("::", "::1"),
]


@contextmanager
def peers(
    count: int, host: str = "127.0.0.1", rate: int = 20_000, one_supervisor: bool = True
) -> Iterator[list[LoopHarness]]:
    """On neighbouring ports below 32768, of one supervisor or of one each."""
    base = free_ports(count)
    board = Scoreboard(count)
    app = App()
    for magic, answer in ANSWERS.items():
        app.handler(magic)(answer)
    app.handler("ANSWER")(lambda _: None)
    with ExitStack() as stack:
        made = []
        for number in range(count):
            slot = board.slots[number] if one_supervisor else Scoreboard(1).slots[0]
            slot.state = PeerState.READY
            sock = bound(host, base + number)
            log = DroppedReplyLog("")
            peer = LoopHarness(
                app, sock=sock, slot=slot, max_reply_rate=rate, on_replies_dropped=log
            )
            made.append(stack.enter_context(peer))
        for peer in made:
            stack.enter_context(peer.running())
        yield made


def send(sender: LoopHarness, to: LoopHarness, datagram: bytes, address: str = "127.0.0.1") -> None:
    """From the peer's own socket, as a forged datagram claims."""
    if sender.sock.family == socket.AF_INET6 and ":" not in address:
        address = f"::ffff:{address}"
    sender.sock.sendto(datagram, (address, to.port))


@pytest.mark.parametrize("magic", ["ECHO", "CHAT", "TURN"])
@pytest.mark.parametrize(("host", "address"), ADDRESSES)
def test_peers_of_one_supervisor_do_not_answer_each_other(
    host: str, address: str, magic: str, caplog: pytest.LogCaptureFixture
) -> None:
    with peers(3, host) as (first, second, third), caplog.at_level(logging.WARNING):
        send(first, third, encode(magic, "1", b"x"), address)
        eventually(lambda: third["handled"] == 1)
        assert third["tx_loop"] == third["rx_messages"] == 1
        assert third["tx_messages"] == first["rx_datagrams"] == second["rx_datagrams"] == 0
        eventually(lambda: "another magic code" in caplog.text)


def test_a_reply_with_another_magic_code_reaches_a_peer() -> None:
    with peers(2) as (first, second):
        send(first, second, encode("ASK", "1", b"x"))
        eventually(lambda: first["rx_messages"] == 1)
        assert (second["tx_messages"], second["tx_loop"]) == (1, 0)


def test_the_port_of_a_peer_that_was_scaled_away_is_a_clients() -> None:
    with peers(2) as (first, second):
        second.slot.state = PeerState.STOPPED
        send(second, first, encode("ECHO", "1", b"x"))
        eventually(lambda: first["tx_messages"] == 1)


@pytest.mark.parametrize(("host", "address"), ADDRESSES)
def test_a_peer_does_not_answer_itself(host: str, address: str) -> None:
    with peers(1, host) as (peer,):
        for magic in ("ECHO", "ASK", "NOPE"):
            send(peer, peer, encode(magic, "1", b"x"), address)
        eventually(lambda: peer["handled"] == 3)
        assert peer["rx_own"] == peer["rx_datagrams"] == 3
        assert peer["rx_messages"] == peer["tx_messages"] == 0


def test_a_peer_in_a_program_does_not_answer_itself() -> None:
    port = free_ports(1)
    with Peer(port=port, host="127.0.0.1") as peer:
        forge_datagram(port, port, encode("ECHO", "1", b"x"))
        eventually(lambda: peer.counters()["rx_own"] == 1)
        assert peer.counters()["tx_messages"] == 0


@pytest.mark.parametrize("magic", ["ECHO", "CHAT", "TURN"])
def test_a_loop_of_strangers_ends(magic: str, caplog: pytest.LogCaptureFixture) -> None:
    with peers(2, one_supervisor=False) as both, caplog.at_level(logging.WARNING):
        for number in range(3):
            send(both[0], both[1], encode(magic, "1", b"%d" % number))
        eventually(lambda: sum(peer["tx_dropped_rate"] for peer in both) == 3)
        # Three that were forged, and the bucket of a second, refilled while it lasts.
        assert sum(peer["tx_messages"] for peer in both) < 20_000
        before = [peer["rx_datagrams"] for peer in both]
        eventually(lambda: all(peer["handled"] == peer["rx_datagrams"] for peer in both))
        assert [peer["rx_datagrams"] for peer in both] == before
        assert "--max-reply-rate" in caplog.text


def test_a_client_that_asks_more_than_the_default_rate_loses_nothing() -> None:
    generator = random.Random(1)
    with peers(1) as (peer,):
        for _ in range(600):
            bodies = [generator.randbytes(8) for _ in range(50)]
            for body in bodies:
                peer.client.send(encode("ECHO", "1", body))
            assert [peer.receive().body for _ in bodies] == bodies
        assert peer["tx_dropped_rate"] == 0


def test_a_rate_of_ones_own_is_for_every_source() -> None:
    """A source has its tokens whatever other sources do."""
    with peers(1, rate=100) as (peer,):
        began_s = time.monotonic()
        for number in range(3):
            client = peer.new_client()
            for _ in range(200):
                client.send(encode("ASK", "1", b""))
            eventually(lambda: peer["handled"] == 200 * (number + 1))  # noqa: B023
            # The tokens of one second, and those that came since.
            most = (number + 1) * 100 * (1 + time.monotonic() - began_s) + 1
            assert (number + 1) * 100 <= peer["tx_messages"] <= most
        assert peer["tx_messages"] + peer["tx_dropped_rate"] == 600


def test_no_rate_is_no_limit() -> None:
    with peers(1, rate=0) as (peer,), bound("127.0.0.1", free_ports()) as client:
        client.settimeout(5)
        for _ in range(3000):
            client.sendto(encode("ECHO", "1", b""), ("127.0.0.1", peer.port))
            client.recv(100)


def start(supervised: Supervised, peers: int) -> Running:
    return supervised.start(peers=peers, app=APPENDING_APP, etcd=NO_ETCD).wait_ready()


def test_a_forged_datagram_starts_no_loop_that_survives(supervised: Supervised) -> None:
    running = start(supervised, peers=2)

    def forge(loops: int) -> None:
        for magic in ("ECHO", "CHAT"):
            forge_datagram(running.ports[0], running.ports[1], encode(magic, "1", b"x"))
        eventually(lambda: running.peer(1)["counters"]["tx_loop"] == loops)
        assert running.peer(1)["tx_dropped"] == loops

    forge(2)
    control.request(running.control, "reload")
    forge(4)
    os.kill(running.peer(1)["pid"], signal.SIGKILL)
    eventually(lambda: running.peer(1)["restarts"] == 1)
    running.wait_ready()
    forge(6)
    assert running.peer(0)["rx_messages"] == 0
    assert "another magic code" in running.err
    eventually(lambda: events(running))
    assert [event["peer_id"] for event in events(running)] == [running.peer(1)["peer_id"]]


def events(running: Running) -> list[dict[str, object]]:
    shown: list[dict[str, object]] = control.request(running.control, "events")
    return [event for event in shown if event["event"] == "replies withheld"]


def test_a_forged_datagram_between_two_supervisors(supervised: Supervised) -> None:
    both = [start(supervised, peers=1) for _ in range(2)]
    ports = [running.ports[0] for running in both]

    def dropped() -> int:
        return sum(int(running.peer(0)["counters"]["tx_dropped_rate"]) for running in both)

    for forged, magic in enumerate(("ECHO", "CHAT"), 1):
        forge_datagram(ports[0], ports[1], encode(magic, "1", b"x"))
        eventually(lambda: dropped() >= forged)  # noqa: B023
    eventually(lambda: any(events(running) for running in both))
    before = [running.peer(0)["rx_messages"] for running in both]
    for running in both:
        counters = running.peer(0)["counters"]
        assert counters["handled"] == counters["rx_datagrams"]
    assert [running.peer(0)["rx_messages"] for running in both] == before
