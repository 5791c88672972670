"""A reply that cannot leave costs the clients behind other links neither a reply nor time."""

import logging
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median

import pytest

from harness.eventually import eventually
from harness.loop_harness import LoopHarness
from harness.namespaces import Hosts
from harness.supervised import NO_ETCD, Supervised
from peerd import control, decode, encode
from peerd.serving.loop_logs import DroppedReplyLog

PORT = 5001
# 1 Mbit/s and a queue of seven datagrams: 1,000 replies of 400 bytes per second fill it.
SLOW = "tc qdisc add dev slow root tbf rate 1mbit burst 2000 limit 3000"


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts("slow", "fast") as made:
        yield made


def clients_of(hosts: Hosts, stack: ExitStack) -> list[socket.socket]:
    """One behind either link, the slow one first."""
    made = []
    for number, link in enumerate(("slow", "fast"), 77):
        client = stack.enter_context(hosts.behind[link].socket())
        client.connect((f"10.{number}.0.1", PORT))
        made.append(client)
    return made


@contextmanager
def peer_and_clients(hosts: Hosts) -> Iterator[tuple[LoopHarness, socket.socket, socket.socket]]:
    with ExitStack() as stack:
        sock = hosts.server.socket("0.0.0.0", PORT)
        log = DroppedReplyLog("")
        peer = stack.enter_context(LoopHarness(sock=sock, on_replies_dropped=log))
        slow, fast = clients_of(hosts, stack)
        stack.enter_context(peer.running())
        yield peer, slow, fast


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


def test_a_slow_link_does_not_slow_the_others(hosts: Hosts) -> None:
    hosts.server.run(SLOW)
    with peer_and_clients(hosts) as (peer, slow, fast):
        with asking(slow, 400):
            eventually(lambda: peer["tx_dropped_congested"] > 100)
            assert median(pings(fast, 150)) < 0.05  # it was 0.23 s with one queue for all
        # The replies that the link has room for arrive.
        assert decode(slow.recv(2000)).body == bytes(400)


def test_a_link_with_a_smaller_mtu_costs_large_replies_only(
    hosts: Hosts, caplog: pytest.LogCaptureFixture
) -> None:
    """One ECHO of 1,440 bytes, which the far end of the link drops: the sender gets ENOBUFS."""
    hosts.behind["slow"].ip("link set slow mtu 1400")
    with peer_and_clients(hosts) as (peer, slow, fast), caplog.at_level(logging.WARNING):
        slow.send(encode("ECHO", "1", bytes(1440)))
        assert median(pings(fast, 20)) < 0.05
        assert median(pings(slow, 20)) < 0.05
        eventually(lambda: caplog.records)
        assert peer["tx_dropped_congested"] == 1
        assert "1 reply dropped" in caplog.text
        assert "ENOBUFS" in caplog.text


@pytest.mark.skipif(shutil.which("nft") is None, reason="apt-get install nftables")
@pytest.mark.parametrize(
    ("hook", "reason"), [("egress device slow", "congested"), ("output", "refused")]
)
def test_a_filter_that_drops_for_one_client_costs_no_other(
    hosts: Hosts, hook: str, reason: str
) -> None:
    """A filter at the device reports ENOBUFS, one of the output hook EPERM."""
    table = "netdev" if "device" in hook else "ip"
    for command in (
        f"table {table} t",
        f"chain {table} t c {{ type filter hook {hook} priority 0 ; }}",
        f"rule {table} t c udp sport {PORT} ip daddr 10.77.0.2 drop",
    ):
        hosts.server.run(f"nft add {command}")
    with peer_and_clients(hosts) as (peer, slow, fast), asking(slow, 10):
        eventually(lambda: peer[f"tx_dropped_{reason}"] > 20)
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
def test_a_reload_over_a_slow_link_has_no_gap(
    hosts: Hosts, supervised: Supervised, kind: str
) -> None:
    hosts.server.run(SLOW)
    running = supervised.start(
        "--host=0.0.0.0",
        peers=1,
        base_port=PORT,
        app=ASYNC_APP if kind == "async" else None,
        etcd=NO_ETCD,
        through=["ip", "netns", "exec", hosts.server.name],
    ).wait_ready()
    with ExitStack() as stack:
        slow, fast = clients_of(hosts, stack)
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
