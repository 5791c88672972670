"""A reply that cannot leave costs the clients behind other links neither a reply nor time."""

from __future__ import annotations

import logging
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from harness.eventually import eventually
from harness.namespaces import Host, Hosts
from harness.supervised import Supervised
from peerd import control, decode, encode
from peerd._loop import DatagramLoop
from peerd._scoreboard import Scoreboard, Slot
from peerd.serving.app import builtin_app
from peerd.serving.worker import make_loop
from peerd.settings import DatagramSettings

PORT = 5001
# 1 Mbit/s and a queue of seven datagrams: 1,000 replies of 400 bytes per second fill it.
SLOW = "tc qdisc add dev slow root tbf rate 1mbit burst 2000 limit 3000"


@contextmanager
def hosts() -> Iterator[Hosts]:
    with Hosts("slow", "fast") as made:
        yield made


@contextmanager
def peer_on(host: Host) -> Iterator[Slot]:
    with host.socket("0.0.0.0", PORT) as sock:
        slot = Scoreboard(1).slots[0]
        loop: DatagramLoop = make_loop(builtin_app(), sock.fileno(), slot, DatagramSettings())
        thread = threading.Thread(target=loop.run)
        thread.start()
        try:
            yield slot
        finally:
            loop.stop()
            thread.join()


@contextmanager
def client_of(made: Hosts, link: str, number: int = 0) -> Iterator[socket.socket]:
    with made.behind[link].socket() as client:
        client.settimeout(5)
        client.connect((f"10.{77 + ('slow', 'fast').index(link)}.0.1", PORT + number))
        yield client


@contextmanager
def asking(client: socket.socket, size: int, interval_s: float = 0.001) -> Iterator[None]:
    """Without reading an answer."""
    over = threading.Event()

    def ask() -> None:
        while not over.wait(interval_s):
            client.send(encode("ECHO", "1", bytes(size)))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def pings(client: socket.socket, count: int) -> list[float]:
    """Seconds per round trip; each has to be answered."""
    took_s = []
    for number in range(count):
        began_s = time.monotonic()
        client.send(encode("PING", "1", b"%d" % number))
        assert decode(client.recv(2000)).body == b"%d" % number
        took_s.append(time.monotonic() - began_s)
    return took_s


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def test_a_slow_link_does_not_slow_the_others() -> None:
    with ExitStack() as stack:
        made = stack.enter_context(hosts())
        made.server.run(SLOW)
        slot = stack.enter_context(peer_on(made.server))
        slow = stack.enter_context(client_of(made, "slow"))
        fast = stack.enter_context(client_of(made, "fast"))
        with asking(slow, 400):
            eventually(lambda: slot.counters()["tx_dropped_congested"] > 100)
            assert median(pings(fast, 150)) < 0.05  # it was 0.23 s with one queue for all
        # The replies that the link has room for arrive.
        assert decode(slow.recv(2000)).body == bytes(400)


def test_a_link_with_a_smaller_mtu_costs_large_replies_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One ECHO of 1,440 bytes, which the far end of the link drops: the sender gets ENOBUFS."""
    with ExitStack() as stack:
        made = stack.enter_context(hosts())
        made.behind["slow"].ip("link set slow mtu 1400")
        slot = stack.enter_context(peer_on(made.server))
        slow = stack.enter_context(client_of(made, "slow"))
        fast = stack.enter_context(client_of(made, "fast"))
        with caplog.at_level(logging.WARNING):
            slow.send(encode("ECHO", "1", bytes(1440)))
            assert median(pings(fast, 20)) < 0.05
            assert median(pings(slow, 20)) < 0.05
            eventually(lambda: caplog.records)
        assert slot.counters()["tx_dropped_congested"] == 1
        assert "1 reply dropped" in caplog.text
        assert "ENOBUFS" in caplog.text


@pytest.mark.skipif(shutil.which("nft") is None, reason="apt-get install nftables")
@pytest.mark.parametrize(
    ("hook", "reason"), [("egress device slow", "congested"), ("output", "refused")]
)
def test_a_filter_that_drops_for_one_client_costs_no_other(hook: str, reason: str) -> None:
    """A filter at the device reports ENOBUFS, one of the output hook EPERM."""
    table = "netdev" if "device" in hook else "ip"
    with ExitStack() as stack:
        made = stack.enter_context(hosts())
        made.server.run(f"nft add table {table} t")
        made.server.run(f"nft add chain {table} t c {{ type filter hook {hook} priority 0 ; }}")
        made.server.run(f"nft add rule {table} t c udp sport {PORT} ip daddr 10.77.0.2 drop")
        slot = stack.enter_context(peer_on(made.server))
        slow = stack.enter_context(client_of(made, "slow"))
        fast = stack.enter_context(client_of(made, "fast"))
        with asking(slow, 10):
            eventually(lambda: slot.counters()[f"tx_dropped_{reason}"] > 20)
            assert median(pings(fast, 100)) < 0.05


ASYNC_APP = """
import asyncio
from peerd import App, Message

app = App()

@app.handler("ECHO")
async def echo(message):
    await asyncio.sleep(0)
    return message.body

@app.handler("PING")
async def ping(message):
    return Message("PONG", message.version, message.body)
"""


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_reload_over_a_slow_link_has_no_gap(supervised: Supervised, kind: str) -> None:
    with ExitStack() as stack:
        made = stack.enter_context(hosts())
        made.server.run(SLOW)
        (supervised.folder / "late.py").write_text(ASYNC_APP)
        running = supervised.start(
            "--host=0.0.0.0",
            *(["--app=late:app"] if kind == "async" else []),
            peers=1,
            base_port=PORT,
            etcd="http://127.0.0.1:1",
            through=["ip", "netns", "exec", made.server.name],
        )
        running.wait_ready()
        slow = stack.enter_context(client_of(made, "slow"))
        fast = stack.enter_context(client_of(made, "fast"))
        with asking(slow, 400):
            eventually(lambda: running.peer(0)["counters"]["tx_dropped_congested"] > 20)
            assert median(pings(fast, 100)) < 0.05
            reload = threading.Thread(target=control.request, args=(running.control, "reload"))
            reload.start()
            while reload.is_alive():
                # It was 5 s, for as long as the worker's last reply had no room.
                assert max(pings(fast, 20)) < 2
            reload.join()
        assert running.peer(0)["generation"] == 2
