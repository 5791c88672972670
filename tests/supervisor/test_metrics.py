"""``--metrics``: metrics and health checks, over real connections."""

import os
import random
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness import raw_client
from harness.eventually import eventually
from harness.ports import free_ports
from harness.supervised import NO_ETCD, Running, Supervised, send_signal
from harness.supervisor_requests import ask, death_of, http_get, serving
from peerd.address import MAX_PORT
from peerd.supervisor import metrics, metrics_server
from peerd_chaos.load import Load

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""(name, labels) -> value"""


LONG = os.environ.get("PEERD_LONG_TESTS") == "1"
KILLS = 200 if LONG else 25
KILLED_PEERS = 8

pytestmark = pytest.mark.timeout(3600 if LONG else 300)


def start(
    supervised: Supervised, *args: str, peers: int = 2, **options: Any
) -> tuple[Running, int]:
    """A supervisor without etcd that is ready, and the port of its metrics."""
    port = free_ports()
    options = {"etcd": NO_ETCD, **options}
    running = supervised.start(f"--metrics=127.0.0.1:{port}", *args, peers=peers, **options)
    eventually(lambda: is_ready(port))
    return running, port


def is_ready(port: int) -> bool:
    return http_get(port, "/healthz/ready") == (200, "ready\n")


def scrape(port: int) -> tuple[Samples, Samples]:
    """All samples, and of them those that must never decrease."""
    return parse(http_get(port, "/metrics"))


def parse(answer: tuple[int, str]) -> tuple[Samples, Samples]:
    status, text = answer
    assert status == 200
    every: Samples = {}
    rising: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in every, key
            every[key] = sample.value
            if family.type in ("counter", "histogram"):
                rising[key] = sample.value
    return every, rising


def of_peer(samples: Samples, name: str, running: Running, slot: int, **labels: str) -> float:
    labels["peer"] = f"localhost:{running.ports[slot]}"
    return samples[name, tuple(sorted(labels.items()))]


def check_against_status(running: Running, port: int) -> bool:
    """Compares figures of two moments, so the caller retries until nothing changes in between."""
    samples, _ = scrape(port)
    for slot, peer in enumerate(running.status()["peers"]):

        def value(name: str, slot: int = slot, **labels: str) -> float:
            return of_peer(samples, name, running, slot, **labels)

        counters: dict[str, int] = peer["counters"]
        for name in metrics.COUNTERS:
            assert value(metrics.counter_metric(name)) == counters[name], name
        for name, reason in metrics.RX_DROPPED.items():
            assert value("peerd_rx_dropped_total", reason=reason) == counters[name]
        for name, reason in metrics.TX_DROPPED.items():
            assert value("peerd_tx_dropped_total", reason=reason) == counters[name]
        assert value("peerd_rx_dropped_total", reason="kernel") == peer["rx_dropped"]
        restarts = [
            value("peerd_restarts_total", reason=reason) for reason in metrics.RESTART_REASONS
        ]
        assert sum(restarts) == peer["restarts"]
        assert value("peerd_lost_in_flight_total") == peer["lost_in_flight"]
        assert value("peerd_registered") == peer["registered"]
        assert value("peerd_conflict") == bool(peer["conflict"])
        assert value("peerd_peer_state", state=peer["state"]) == 1
        assert value("peerd_heartbeat_age_seconds") < 30
        check_histograms(samples, running, slot, peer["histograms"])
    return True


def check_histograms(
    samples: Samples, running: Running, slot: int, expected: dict[str, list[int]]
) -> None:
    for metric, counted, unit_s in (
        ("peerd_batch_datagrams", "batch_datagrams", None),
        ("peerd_turn_seconds", "turn_us", 1e-6),
    ):
        below = 0
        *bounded, last = expected[counted]
        for number, count in enumerate(bounded):
            below += count
            # Datagrams are whole numbers, and microseconds are truncated.
            end = 2 ** (number + 1) - 1 if unit_s is None else 2 ** (number + 1) / 1e6
            bucket = of_peer(samples, f"{metric}_bucket", running, slot, le=str(float(end)))
            assert bucket == below, (metric, number)
        every = of_peer(samples, f"{metric}_bucket", running, slot, le="+Inf")
        assert every == below + last
        assert of_peer(samples, "peerd_turns_total", running, slot) == every


def test_metrics_agree_with_status(supervised: Supervised) -> None:
    running, port = start(supervised, etcd=supervised.etcd)
    running.wait_registered()
    for _ in range(5):
        raw_client.request(running.ports[0], b"PING", b"x")
    with raw_client.connected(running.ports[1]) as client:
        for datagram in (b"", b"abc", raw_client.pack(b"UNKNOWN", b"1.0", b"")):
            client.send(datagram)
    eventually(lambda: running.peer(1)["counters"]["rx_datagrams"] == 3)
    eventually(lambda: check_against_status(running, port))
    samples, _ = scrape(port)
    assert of_peer(samples, "peerd_tx_messages_total", running, 0) == 5
    for reason in ("decode_empty", "decode_short", "unknown_magic"):
        assert of_peer(samples, "peerd_rx_dropped_total", running, 1, reason=reason) == 1
    for slot in range(2):
        assert of_peer(samples, "peerd_registered", running, slot) == 1
    assert samples["peerd_registry_state", (("state", "connected"),)] == 1
    assert f"http://127.0.0.1:{port}/metrics" in running.out
    assert {name for name, _ in samples if not name.startswith("peerd_")} == set()


def test_no_counter_decreases_over_20_kills(supervised: Supervised) -> None:
    peers, rounds = 5, 4
    running, port = start(supervised, peers=peers)
    with pings(running.ports), watched(port) as seen:
        for number in range(rounds):
            for slot in range(peers):
                send_signal(running.peer(slot)["pid"], signal.SIGKILL)
            eventually(partial(restarted, running, number + 1))
            eventually(lambda: is_ready(port))
        scraped = len(seen)
        eventually(lambda: len(seen) > scraped + 1)
    eventually(lambda: check_against_status(running, port))
    samples, _ = scrape(port)
    for slot in range(peers):
        assert of_peer(samples, "peerd_restarts_total", running, slot, reason="signal") == rounds
        assert of_peer(samples, "peerd_worker_starts_total", running, slot) == rounds + 1
        assert of_peer(samples, "peerd_rx_messages_total", running, slot) > 0


@pytest.mark.alone
def test_scrapes_are_quick_while_workers_are_killed(supervised: Supervised) -> None:
    """200 kills with PEERD_LONG_TESTS=1. A parked peer is started by a command, to be killed again."""
    running, port = start(supervised, "--app=peerd_chaos.chaos_apps:app", peers=KILLED_PEERS)
    chance = random.Random(10)
    with Load(running.ports, rate=2_000.0), watched(port) as seen:
        for _ in range(KILLS):
            slot = chance.randrange(KILLED_PEERS)
            pid = serving(running, slot)
            send_signal(pid, signal.SIGKILL)
            death_of(running, pid)
        for slot in range(KILLED_PEERS):
            serving(running, slot)
        scraped = len(seen)
        eventually(lambda: len(seen) > scraped + 1)
    eventually(lambda: check_against_status(running, port))
    restarts = sum(peer["restarts"] for peer in running.status()["peers"])
    assert restarts >= KILLS
    # Some ms on a quiet machine. On a busy one, this process and the supervisor wait for a CPU as well.
    assert statistics.median(seen) <= 0.2, sorted(seen)
    assert statistics.quantiles(seen, n=20)[-1] <= 1.0, sorted(seen)


def restarted(running: Running, times: int) -> bool:
    peers = running.status()["peers"]
    return all(peer["restarts"] == times and peer["state"] == "ready" for peer in peers)


@contextmanager
def pings(ports: Sequence[int]) -> Iterator[None]:
    """One ping at a time per peer; a lost one is given up after 50 ms."""
    stop = threading.Event()

    def ping(port: int) -> None:
        while not stop.is_set():
            with suppress(TimeoutError):
                raw_client.request(port, b"PING", b"x", 0.05)

    with ThreadPoolExecutor(len(ports)) as threads:
        for port in ports:
            threads.submit(ping, port)
        try:
            yield
        finally:
            stop.set()


@contextmanager
def watched(port: int) -> Iterator[list[float]]:
    """Scrape in a thread; yields the seconds that each took. Fails at the end if a counter decreased."""
    stop, seen = threading.Event(), list[float]()

    def watch() -> None:
        before: Samples = {}
        while not stop.is_set():
            asked_s = time.monotonic()
            answer = http_get(port, "/metrics")
            took_s = time.monotonic() - asked_s
            _, now = parse(answer)
            assert before.keys() <= now.keys()
            back = {key: (old, now[key]) for key, old in before.items() if now[key] < old}
            assert not back
            before = now
            seen.append(took_s)

    with ThreadPoolExecutor() as threads:
        watching = threads.submit(watch)
        try:
            yield seen
        finally:
            stop.set()
        watching.result()


def test_the_gaps_of_a_reload_are_counted(supervised: Supervised) -> None:
    running, port = start(supervised)
    replaced = ask(running, "reload")["replaced"]
    samples = eventually(partial(scrape_after, port, len(replaced)))
    assert samples["peerd_registry_state", (("state", "suspended"),)] == 1
    gaps_s = [peer["gap_ms"] / 1e3 for peer in replaced]
    assert samples["peerd_reload_gap_seconds_sum", ()] == pytest.approx(sum(gaps_s))
    for end_s in metrics.RELOAD_GAP_BOUNDS_S:
        below = samples["peerd_reload_gap_seconds_bucket", (("le", str(end_s)),)]
        assert below == sum(gap_s <= end_s for gap_s in gaps_s)


def scrape_after(port: int, replaced: int) -> Samples | None:
    """None for a page rendered before."""
    samples, _ = scrape(port)
    return samples if samples["peerd_reload_gap_seconds_count", ()] == replaced else None


def test_restarts_are_counted_by_reason(supervised: Supervised) -> None:
    acts = {"exit": "os._exit(3)", "signal": "os.abort()", "stuck": "time.sleep(600)"}
    app = "import os, peerd, time\napp = peerd.App()\n"
    for reason, act in acts.items():
        app += f"@app.handler('{reason}')\ndef act(message): {act}\n"
    running, port = start(supervised, "--stuck-timeout=1", peers=3, app=app)
    for slot, reason in enumerate(acts):
        raw_client.send(running.ports[slot], reason.encode())
    eventually(lambda: restarted(running, 1))
    eventually(lambda: check_against_status(running, port))
    samples, _ = scrape(port)
    for slot, reason in enumerate(acts):
        assert of_peer(samples, "peerd_restarts_total", running, slot, reason=reason) == 1


def test_a_stopped_worker_makes_it_unready(supervised: Supervised) -> None:
    running, port = start(supervised)
    peer = running.peer(1)
    send_signal(peer["pid"], signal.SIGSTOP)
    try:
        line = eventually(lambda: unready(port))
        assert line.startswith(f"not ready: {peer['peer_id']} (process stopped for ")
        assert line.count("\n") == 1
        assert f"localhost:{running.ports[0]}" not in line
        assert http_get(port, "/healthz/live") == (200, "live\n")
        samples, _ = scrape(port)
        assert of_peer(samples, "peerd_heartbeat_age_seconds", running, 1) > 4
    finally:
        send_signal(peer["pid"], signal.SIGCONT)
    eventually(lambda: is_ready(port))


def unready(port: int) -> str | None:
    status, line = http_get(port, "/healthz/ready")
    return line if status == 503 else None


def test_at_most_eight_unready_peers_are_named(supervised: Supervised) -> None:
    app = "import os, peerd, time\napp = peerd.App()\nwhile not os.path.exists('go'): time.sleep(0.01)\n"
    port = free_ports()
    running = supervised.start(f"--metrics=127.0.0.1:{port}", peers=10, etcd=NO_ETCD, app=app)
    line = eventually(partial(all_starting, port))
    named = ", ".join(f"localhost:{number} (starting)" for number in running.ports[:8])
    assert line == f"not ready: {named}, and 2 more\n"
    (supervised.folder / "go").touch()
    eventually(lambda: is_ready(port))


def all_starting(port: int) -> str | None:
    status, line = http_get(port, "/healthz/ready")
    return line if status == 503 and line.count("(starting)") == 8 else None


REQUESTS = [
    (b"GET / HTTP/1.1\r\n\r\n", 404),
    (b"GET /metrics/ HTTP/1.1\r\n\r\n", 404),
    (b"GET /healthz/live?verbose=1 HTTP/1.0\r\n\r\n", 200),
    (b"GET /healthz/live HTTP/1.1\nHost: x\n\n", 200),
    (b"HEAD /metrics HTTP/1.1\r\n\r\n", 405),
    (b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405),
    (b"GET /metrics HTTP/2\r\n\r\n", 400),
    (b"GET /metrics\r\n\r\n", 400),
    (b"\r\n\r\n", 400),
    (b"\xff\x00 \xfe \x80\r\n\r\n", 400),
    (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", None),
    (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n", None),
    (b"\x16\x03\x01" + b"\xff" * 20_000, None),
    (b"", None),
    (b"GET /metrics HTTP/1.1\r\nHost: x", None),
]
"""Requests, and the status of their answers; None if there is none."""


def test_other_requests_are_refused_and_slow_clients_dropped(supervised: Supervised) -> None:
    running, port = start(supervised, peers=1)
    for request, status in REQUESTS:
        answer = b""
        connection = socket.create_connection(("127.0.0.1", port), timeout=30)
        # Some are dropped in the middle of what they send.
        with connection as client, suppress(ConnectionError):
            client.sendall(request)
            if status is None:
                with suppress(OSError):
                    client.shutdown(socket.SHUT_WR)
            while chunk := client.recv(1 << 16):
                answer += chunk
        assert answer == b"" if status is None else answer.startswith(b"HTTP/1.1 %d " % status)
        assert is_ready(port)
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(b"GET /metrics HTTP/1.1\r\n")
        slow.setblocking(False)
        # The server drops it when the next client connects.
        eventually(lambda: is_ready(port) and is_dropped(slow), 3 * metrics_server.CLIENT_TIMEOUT_S)
    assert running.process.poll() is None


def is_dropped(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_idle_clients_are_bounded_and_do_no_harm(supervised: Supervised) -> None:
    crowd = 3 * metrics_server.MAX_CLIENTS
    running, port = start(supervised)
    before = psutil.Process(running.pid).num_fds()
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(crowd)
        ]
        for number, client in enumerate(clients):
            client.setblocking(False)
            # Some send nothing, some half a request, some a request whose answer they never read.
            if number % 3:
                try:
                    client.sendall(b"GET /metrics HTTP/1.1\r\n" + b"\r\n" * (number % 3 - 1))
                except ConnectionError:
                    continue
        assert is_ready(port)
        assert scrape(port)[0]
        assert psutil.Process(running.pid).num_fds() <= before + metrics_server.MAX_CLIENTS
        for slot in running.ports:
            assert raw_client.request(slot, b"PING", b"x")[0] == b"PONG"
        assert not is_dropped(clients[-3])  # says nothing, and is one of the last
        eventually(lambda: is_dropped(clients[0]))
    eventually(lambda: psutil.Process(running.pid).num_fds() <= before)


def test_a_port_in_use_ends_the_start(supervised: Supervised) -> None:
    first, port = start(supervised)
    second = supervised.start(f"--metrics=127.0.0.1:{port}", peers=2, etcd=NO_ETCD)
    assert second.wait() == 73
    assert f"TCP port {port} is in use, held by pid {first.pid}" in second.err
    assert "--metrics" in second.err
    assert len(second.err.strip().splitlines()) == 1
    assert second.out == ""
    assert is_ready(port)
    assert first.stop() == 0
    # The next one gets it at once, though connections are in TIME_WAIT on the server's side.
    supervised.start(f"--metrics=127.0.0.1:{port}", peers=1, etcd=NO_ETCD)
    eventually(lambda: is_ready(port))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_wildcard_and_ipv6_addresses(supervised: Supervised, family: socket.AddressFamily) -> None:
    port = free_ports()
    host, reached_at = ("0.0.0.0", "127.0.0.1") if family == socket.AF_INET else ("[::1]", "::1")
    supervised.start(f"--metrics={host}:{port}", peers=1, etcd=NO_ETCD)

    def answers() -> bool:
        with socket.create_connection((reached_at, port), timeout=5) as client:
            client.sendall(b"GET /healthz/live HTTP/1.1\r\n\r\n")
            return client.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")

    eventually(answers)


@pytest.mark.parametrize(
    ("value", "code", "text"),
    [
        ("9464", 2, "write HOST:PORT"),
        (":9464", 2, "write HOST:PORT"),
        ("http://localhost:9464", 2, "write HOST:PORT"),
        ("localhost:0", 2, f"a port is a number from 1 to {MAX_PORT}"),
        ("localhost:65536", 2, f"a port is a number from 1 to {MAX_PORT}"),
        ("192.0.2.1:9464", 73, "cannot bind TCP 192.0.2.1:9464: this machine has no such address"),
        ("no-such-host.invalid:9464", 73, "use --metrics with an address of this machine"),
    ],
)
def test_an_unusable_address_is_one_line(
    supervised: Supervised, value: str, code: int, text: str
) -> None:
    running = supervised.start(f"--metrics={value}", peers=1, etcd=NO_ETCD)
    assert running.wait() == code
    assert text in running.err
    assert len(running.err.strip().splitlines()) == 1


@pytest.mark.parametrize("source", ["environment", "file"])
def test_the_environment_and_the_file_set_it(
    supervised: Supervised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    port = free_ports()
    args: list[str] = []
    if source == "environment":
        monkeypatch.setenv("PEERD_SUPERVISE_METRICS", f"127.0.0.1:{port}")
    else:
        config = tmp_path / "peerd.toml"
        config.write_text(f'metrics = "127.0.0.1:{port}"\n')
        args.append(f"--config={config}")
    supervised.start(*args, peers=1, etcd=NO_ETCD)
    eventually(lambda: is_ready(port))
