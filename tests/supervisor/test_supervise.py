"""The whole system as a user runs it: the command, real signals, a real etcd, a client without peerd."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import orjson
import psutil
import pytest

from harness import raw_client
from harness.command import command, peerd, started
from harness.eventually import eventually
from harness.ports import free_ports
from harness.supervised import Running, Supervised, all_gone, is_gone, send_signal, udp_socket
from peerd.registry import Joined, Left, PeerRecord, Registry
from peerd.registry.embedded_etcd import EmbeddedEtcd, is_listening
from peerd.registry.etcd import Etcd
from peerd.settings import DEFAULT_ENDPOINT


def records(running: Running) -> list[PeerRecord]:
    with Registry(running.etcd, running.prefix) as registry:
        return registry.nodes()


def has_another_registrar(running: Running, registrar_pid: int) -> bool:
    return running.registrar().pid != registrar_pid


def test_eight_peers_are_registered_and_answer(supervised: Supervised) -> None:
    running = supervised.start().wait_registered()
    assert [(record.url, record.port) for record in records(running)] == [
        ("localhost", port) for port in running.ports
    ]
    for port in running.ports:
        assert raw_client.request(port, b"PING", b"x") == (b"PONG", b"1.0", b"x")
    assert running.status()["registry"] == {"state": "connected", "endpoint": running.etcd}
    # Each record has its own lease.
    with contextlib.closing(Etcd(running.etcd, 5.0)) as etcd:
        leases = [item.lease_id for item in etcd.list(f"{running.prefix}/".encode()).items]
    assert len(set(leases)) == 8
    assert 0 not in leases
    # Only the registrar has gRPC and threads.
    registrar = running.registrar()
    for process in running.tree():
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert ("cygrpc" in maps) is (process.pid == registrar.pid)
        if process.pid != registrar.pid:
            assert process.num_threads() == 1


@pytest.mark.parametrize(
    ("host", "reached_at"),
    [("::1", ["::1"]), ("::", ["::1", "127.0.0.1"]), ("0.0.0.0", ["127.0.0.1"])],
)
def test_hosts_other_than_loopback(
    supervised: Supervised, host: str, reached_at: list[str]
) -> None:
    running = supervised.start(f"--host={host}", peers=1).wait_registered()
    port = running.ports[0]
    for address in reached_at:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as client:
            client.settimeout(30)
            client.sendto(raw_client.pack(b"PING", b"1.0", b"x"), (address, port))
            assert raw_client.unpack(client.recv(1 << 16))[0] == b"PONG"
    (record,) = records(running)
    url = "::1" if host == "::1" else socket.gethostname()
    assert (record.url, record.port) == (url, port)
    assert record.peer_id == (f"[::1]:{port}" if host == "::1" else f"{url}:{port}")


@pytest.mark.alone
def test_a_killed_worker_is_replaced_on_the_same_socket(supervised: Supervised) -> None:
    """At 1,000 pings/s, the unanswered ones are at most those of one receive batch."""
    running = supervised.start(peers=2).wait_ready()
    port = running.ports[0]
    sock, old_pid = udp_socket(port), running.peer(0)["pid"]
    answered: set[bytes] = set()
    sent = 2000
    with raw_client.connected(port) as client:
        reader = threading.Thread(target=lambda: collect(client, answered, sent))
        reader.start()
        begun_s = time.monotonic()
        for number in range(sent):
            # The test is about this pace. A busy wait would take the GIL from the reader.
            time.sleep(max(0.0, begun_s + number / 1000 - time.monotonic()))
            client.send(raw_client.pack(b"PING", b"1.0", b"%d" % number))
            if number == sent // 2:
                send_signal(old_pid, signal.SIGKILL)
        client.send(raw_client.pack(b"ECHO", b"1.0", b"last"))
        reader.join()
    assert udp_socket(port) == sock
    peer = running.peer(0)
    assert peer["pid"] not in (old_pid, None)
    assert peer["restarts"] == 1
    # One receive batch is 16 buffers; at this pace each holds one datagram.
    assert sent - len(answered) <= 16


def collect(client: socket.socket, answered: set[bytes], sent: int) -> None:
    """Collect every PONG until the reply to the last message, which is an ECHO."""
    while len(answered) < sent:
        magic, _, body = raw_client.unpack(client.recv(1 << 16))
        if magic == b"ECHO":
            return
        answered.add(body)


def test_queues_are_served_before_it_exits(supervised: Supervised) -> None:
    running = supervised.start(peers=1).wait_ready()
    pid = running.peer(0)["pid"]
    send_signal(pid, signal.SIGSTOP)
    with raw_client.connected(running.ports[0]) as client:
        for number in range(100):
            client.send(raw_client.pack(b"PING", b"1.0", b"%d" % number))
        running.signal(signal.SIGTERM)
        eventually(lambda: "SIGTERM" in running.err)
        send_signal(pid, signal.SIGCONT)
        assert running.wait() == 0
        bodies = {raw_client.unpack(client.recv(1 << 16))[2] for _ in range(100)}
    assert len(bodies) == 100


def test_a_killed_registrar_is_replaced_and_no_record_disappears(supervised: Supervised) -> None:
    """With the shortest lease, records without keep-alives would be gone within 3 s."""
    running = supervised.start("--ttl=2").wait_registered()
    old = running.registrar()
    with Registry(running.etcd, running.prefix) as registry:
        assert len(registry.nodes()) == 8
        old.kill()
        eventually(lambda: len(registry.nodes()) == 8 and running.registrar().pid != old.pid)
        deadline_s = time.monotonic() + 4
        while time.monotonic() < deadline_s:
            assert len(registry.nodes()) == 8
    assert all(peer["registered"] for peer in running.status()["peers"])


def test_a_registrar_that_is_killed_repeatedly_comes_back(supervised: Supervised) -> None:
    """A stop while there is none leaves no record."""
    running = supervised.start(peers=2).wait_registered()
    for _ in range(7):
        old = eventually(running.registrar)
        old.kill()
        eventually(partial(has_another_registrar, running, old.pid))
        assert len(records(running)) == 2
    running.wait_registered()
    running.registrar().kill()
    assert running.stop() == 0
    assert records(running) == []


def test_nohup_is_respected(supervised: Supervised) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        running = supervised.start(peers=1)
    finally:
        signal.signal(signal.SIGHUP, previous)
    running.wait_ready()
    running.signal(signal.SIGHUP)
    assert running.stop() == 0


def test_watchers_learn_of_a_dead_worker_within_milliseconds(supervised: Supervised) -> None:
    running = supervised.start(peers=2).wait_registered()
    with Registry(running.etcd, running.prefix) as registry, registry.watch() as watch:
        assert [type(next(watch)) for _ in range(2)] == [Joined, Joined]
        for slot in (0, 1, 0):
            peer = running.peer(slot)
            send_signal(peer["pid"], signal.SIGKILL)
            left, joined = next(watch), next(watch)
            assert (type(left), type(joined)) == (Left, Joined)
            assert left.record == joined.record
            assert left.record.peer_id == peer["peer_id"]
            running.wait_registered()


def test_two_supervisors_that_advertise_the_same_address(supervised: Supervised) -> None:
    """Each has its own address and ports; the first one holds the peer ids."""
    first = supervised.start("--advertise=game.example", peers=2).wait_registered()
    with Registry(first.etcd, first.prefix) as registry, registry.watch() as watch:
        before = [next(watch) for _ in range(2)]
        second = supervised.start(
            "--advertise=game.example",
            "--host=127.0.0.2",
            peers=2,
            base_port=first.base_port,
            prefix=first.prefix,
        )
        eventually(lambda: all(peer["conflict"] for peer in second.status()["peers"]))
        for slot, peer in enumerate(second.status()["peers"]):
            assert not peer["registered"]
            assert f"'game.example:{first.base_port + slot}' belongs to" in peer["conflict"]
            assert f"process {first.pid} on " in peer["conflict"]
        first.registrar().kill()  # its successor registers before any other process
        eventually(lambda: "the registrar, pid" in first.err)
        first.wait_registered()
        first.signal(signal.SIGTERM)
        first.wait()
        second.wait_registered()
        happened = [type(next(watch)) for _ in range(4)]
        assert sorted(kind.__name__ for kind in happened) == ["Joined"] * 2 + ["Left"] * 2
        assert [type(event) for event in before] == [Joined, Joined]
    assert not any(peer["conflict"] for peer in second.status()["peers"])


def test_a_supervisor_takes_over_the_records_of_its_dead_predecessor(
    supervised: Supervised,
) -> None:
    """Its registrar is killed too, so the leases, of ten minutes here, remain."""
    running = supervised.start("--ttl=600", peers=2).wait_registered()
    tree = running.tree()
    for process in [running.registrar(), *tree]:
        with contextlib.suppress(psutil.NoSuchProcess):  # the workers die with the supervisor
            process.kill()
    eventually(lambda: all_gone([process.pid for process in tree]))
    assert len(records(running)) == 2
    successor = supervised.start(
        peers=2, base_port=running.base_port, prefix=running.prefix
    ).wait_registered()
    assert successor.stop() == 0
    assert records(running) == []


def test_a_hung_worker_has_no_record_until_it_makes_progress(supervised: Supervised) -> None:
    running = supervised.start(peers=2).wait_registered()
    pid = running.peer(0)["pid"]
    send_signal(pid, signal.SIGSTOP)
    eventually(lambda: len(records(running)) == 1)
    send_signal(pid, signal.SIGCONT)
    eventually(lambda: len(records(running)) == 2)


def test_a_second_supervisor_on_the_same_ports_names_the_first(supervised: Supervised) -> None:
    first = supervised.start().wait_ready()
    second = supervised.start(base_port=first.base_port)
    assert second.wait() == 73
    assert f"UDP port {first.base_port} is in use, held by pid {first.pid}" in second.err
    assert len(second.err.strip().splitlines()) == 1
    for port in first.ports:
        assert raw_client.request(port, b"PING", b"x")[0] == b"PONG"


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--peers=0"], 2, "--peers 0: give a number from 1"),
        (["--peers=x"], 2, "'x' is not a valid integer"),
        (["--base-port=65530", "--peers=8"], 2, "use --base-port 65528 or lower"),
        (["--app=no_such:app"], 78, "there is no module 'no_such'"),
        (["--app=peerd:nothing"], 78, "has no attribute 'nothing'"),
        (["--ttl=1"], 2, "etcd grants 2 for 1"),
        (["--etcd=localhost:2379"], 2, "http://host:port"),
        (["--host=192.0.2.1"], 73, "this machine has no such address"),
        (["--no-such-flag"], 2, "No such option"),
        (["--config=/no/such.toml"], 78, "/no/such.toml"),
    ],
)
def test_bad_settings_get_one_line(
    supervised: Supervised, args: list[str], code: int, text: str
) -> None:
    running = supervised.start(*args, peers=1)
    assert running.wait() == code
    assert text in running.err
    assert "Traceback" not in running.err
    assert len([line for line in running.err.splitlines() if text in line]) == 1


def test_settings_come_from_flags_then_the_environment_then_the_file(
    supervised: Supervised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "peerd.toml"
    config.write_text('advertise = "from-file"\nttl = 7\nlog-level = "debug"\n')
    monkeypatch.setenv("PEERD_SUPERVISE_TTL", "8")
    running = supervised.start(
        f"--config={config}", "--advertise=from-flag", peers=1
    ).wait_registered()
    assert running.peer(0)["peer_id"].startswith("from-flag:")
    config.write_text("peer = 8\n")
    refused = supervised.start(f"--config={config}", peers=1)
    assert refused.wait() == 78
    assert "unknown setting 'peer'" in refused.err


def test_an_unreachable_etcd_stops_nothing(supervised: Supervised) -> None:
    with EmbeddedEtcd() as etcd:
        etcd.kill()
        running = supervised.start(etcd=etcd.endpoint).wait_ready()
        assert raw_client.request(running.ports[0], b"PING", b"x")[0] == b"PONG"
        assert running.status()["registry"]["state"] == "suspended"
        etcd.restart()
        running.wait_registered()
        assert len(records(running)) == 8
        assert running.stop() == 0


def test_it_stops_in_time_without_etcd(supervised: Supervised) -> None:
    running = supervised.start("--stop-timeout=60", etcd="http://127.0.0.1:9").wait_ready()
    begun_s = time.monotonic()
    assert running.stop() == 0
    assert time.monotonic() - begun_s < 30


@pytest.mark.alone  # any test that asks for no etcd would find this one
def test_the_embedded_etcd_comes_and_goes_with_the_supervisor(tmp_path: Path) -> None:
    """At the default endpoint, because it is started there only."""
    assert not is_listening(DEFAULT_ENDPOINT), "port 23790 is needed for this test"
    before = etcd_directories()
    base_port = free_ports(2)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with started(
            command("supervise", "--peers=2", f"--base-port={base_port}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            eventually(lambda: nodes_json() == [base_port, base_port + 1])
            tree = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
            assert len(tree) == 4
            process.send_signal(number)
            out, _ = process.communicate()
        assert "started by peerd with throw-away data" in out
        eventually(partial(all_gone, tree))
        eventually(lambda: not is_listening(DEFAULT_ENDPOINT))
        eventually(lambda: etcd_directories() == before)
    for path in Path(os.environ["XDG_RUNTIME_DIR"]).glob("peerd/*.sock"):
        path.unlink()  # left by the SIGKILL; the next start on these ports would replace it


def etcd_directories() -> set[Path]:
    """The session's own etcd has one, too."""
    return set(Path(os.environ["TMPDIR"]).glob("peerd-etcd-*"))


def nodes_json() -> list[int]:
    return [node["port"] for node in orjson.loads(peerd("nodes", "--json").stdout)]


def test_the_control_socket_is_private_and_a_stale_one_is_replaced(supervised: Supervised) -> None:
    first = supervised.start(peers=1).wait_ready()
    assert stat.S_IMODE(first.control.stat().st_mode) == 0o600
    first.kill()
    eventually(lambda: is_gone(first.pid))
    assert first.control.exists()
    second = supervised.start(f"--control={first.control}", peers=1)
    second.control = first.control
    second.wait_ready()
    assert second.stop() == 0
    assert not first.control.exists()


@pytest.mark.parametrize(("folder", "level"), [("/proc/no", "INFO"), ("/proc/other", "WARNING")])
def test_an_unwritable_control_socket_is_no_error(
    supervised: Supervised, monkeypatch: pytest.MonkeyPatch, folder: str, level: str
) -> None:
    """In the default directory, it is only information."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/no")
    port = free_ports()
    place = f"{folder}/peerd/{port}.sock"
    running = supervised.start(f"--control={place}", peers=1, base_port=port)
    eventually(lambda: "the peer is ready" in running.err)
    (line,) = [each for each in running.err.splitlines() if "no control socket" in each]
    assert f" {level} " in line
    text = f"no control socket, so no 'peerd status': {place}: No such file or directory"
    assert line.endswith(text)
    assert "ERROR" not in running.err
    assert running.stop() == 0
