"""More peers and fewer while they serve: ``scale``, SIGTTIN, SIGTTOU."""

import contextlib
import resource
import signal
import socket
import time
from functools import partial

import psutil
import pytest

from harness import raw_client
from harness.eventually import eventually
from harness.ports import free_ports
from harness.supervised import Running, Supervised, alive, send_signal
from harness.supervisor_requests import (
    Asked,
    ask,
    events,
    http_get,
    is_replaced,
    logged,
    pids,
    scale,
)
from peerd.errors import ControlError
from peerd.free_ports import is_free
from peerd.registry import Left, Registry
from peerd.registry.embedded_etcd import EmbeddedEtcd
from peerd.supervisor.stopping import LAST_TIMEOUT_S

SLOW_S = 1.0
SLOW = f"import time\ntime.sleep({SLOW_S})\nfrom peerd.serving.app import builtin_app\napp = builtin_app()\n"
"""An app that loads slowly."""

STOP_TIMEOUT_S = 30.0
"""The default."""

NEVER_LOADED = SLOW.replace(str(SLOW_S), "60")
PLAIN = SLOW.replace(f"time.sleep({SLOW_S})\n", "")
BROKEN = "import peerd\nraise ValueError('broken today')\n"
DIES = "import os\nos._exit(3)\n"


def start(
    supervised: Supervised, *args: str, peers: int, room: int, app: str | None = None
) -> Running:
    """A supervisor with free ports behind its last one, for ``room`` peers in total."""
    running = supervised.start(*args, peers=peers, base_port=free_ports(room), app=app)
    return running.wait_registered()


def registered(running: Running) -> list[int]:
    with Registry(running.etcd, running.prefix) as registry:
        return sorted(record.port for record in registry.nodes())


def answers(port: int) -> bool:
    return raw_client.request(port, b"PING", b"x") == (b"PONG", b"1.0", b"x")


def title(running: Running) -> str:
    return " ".join(psutil.Process(running.pid).cmdline()).strip()


def test_new_peers_serve_on_the_ports_behind_the_last(supervised: Supervised) -> None:
    running = start(supervised, peers=2, room=4)
    base = running.base_port
    before = pids(running)
    result = scale(running, 4)
    assert (result["before"], result["peers"], result["stopped"]) == (2, 4, [])
    after = pids(running)
    assert after[:2] == before
    assert result["started"] == [
        {"slot": slot, "peer_id": f"localhost:{base + slot}", "pid": after[slot]} for slot in (2, 3)
    ]
    assert all(answers(port) for port in range(base, base + 4))
    running.wait_registered()
    assert registered(running) == list(range(base, base + 4))
    status = running.status()
    assert status["supervisor"]["configured_peers"] == 2
    assert [peer["slot"] for peer in status["peers"]] == [0, 1, 2, 3]
    assert title(running) == f"peerd: supervisor of ports {base} to {base + 3}"
    (event,) = events(running, "scaled")
    assert (event["before"], event["peers"]) == (2, 4)
    assert "scaled from 2 to 4 peers" in running.err
    # They are restarted and logged like any other.
    send_signal(after[3], signal.SIGKILL)
    eventually(partial(is_replaced, running, 3, after[3]))
    running.wait_registered()
    assert any(f"worker pid {after[3]}: killed by SIGKILL" in line for line in logged(running, 3))
    assert ask(running, "restart", slot=3)["replaced"][0]["pid"] == pids(running)[3]


def test_the_highest_peers_go_first_and_their_queues_are_served(supervised: Supervised) -> None:
    running = start(supervised, peers=3, room=3)
    base, before = running.base_port, pids(running)
    with (
        Registry(running.etcd, running.prefix) as registry,
        registry.watch() as watch,
        raw_client.connected(base + 2) as client,
    ):
        for _ in range(3):
            next(watch)
        send_signal(before[2], signal.SIGSTOP)
        for number in range(100):
            client.send(raw_client.pack(b"PING", b"1.0", b"%d" % number))
        asked = Asked(running, "scale", peers=1)
        gone = [next(watch) for _ in range(2)]
        assert [type(event) for event in gone] == [Left, Left]
        # Revoked first, so no client is directed to a peer that is about to end.
        assert asked.is_under_way
        send_signal(before[2], signal.SIGCONT)
        result = asked.answer()
        bodies = {raw_client.unpack(client.recv(1 << 16))[2] for _ in range(100)}
    assert len(bodies) == 100
    assert [row["slot"] for row in result["stopped"]] == [2, 1]
    assert all(row["took_ms"] > 0 for row in result["stopped"])
    assert pids(running) == before[:1]
    assert registered(running) == [base]
    assert is_free(base + 1)
    assert is_free(base + 2)
    assert not alive(before[1:])
    assert answers(base)
    assert title(running) == f"peerd: supervisor of ports {base} to {base}"
    assert events(running, "died") == []


def has_peers(running: Running, number: int) -> bool:
    return len(pids(running)) == number


def test_signals_scale_by_one(supervised: Supervised) -> None:
    running = start(supervised, peers=1, room=3)
    for number in (2, 3):
        running.signal(signal.SIGTTIN)
        eventually(partial(has_peers, running, number))
    running.wait_registered()
    for number in (2, 1):
        running.signal(signal.SIGTTOU)
        eventually(partial(has_peers, running, number))
    running.signal(signal.SIGTTOU)
    # This is answered after the signal is handled.
    assert ask(running, "scale", peers=1)["before"] == 1
    assert answers(running.base_port)
    assert "ERROR" not in running.err


def test_twenty_signals_in_a_tenth_of_a_second(supervised: Supervised) -> None:
    """Pending signals of the same kind are merged (signal(7)), so some may be lost."""
    running = start(supervised, peers=1, room=21)
    for _ in range(20):
        running.signal(signal.SIGTTIN)
        time.sleep(0.005)  # the test is about this pace
    eventually(lambda: "scaled from" in running.err and not is_scaling(running))
    number = len(pids(running))
    assert 2 <= number <= 21
    running.wait_ready()
    assert all(answers(running.base_port + slot) for slot in range(number))
    for _ in range(30):
        running.signal(signal.SIGTTOU)
        time.sleep(0.003)
    eventually(lambda: len(pids(running)) < number and not is_scaling(running))
    left = len(pids(running))
    assert left >= 1
    assert events(running, "died", "not scaled") == []


def is_scaling(running: Running) -> bool:
    """A scaling to the current number waits for the earlier ones."""
    number = len(pids(running))
    return bool(scale(running, number)["before"] != number)


def test_an_invalid_number_changes_nothing(supervised: Supervised) -> None:
    running = supervised.start(peers=2).wait_ready()
    before = pids(running)
    for asked, why in (
        (0, "cannot scale to 0 peers: give a number from 1 to 4096"),
        (-1, "cannot scale to -1 peers"),
        (4097, "cannot scale to 4097 peers"),
        (1 << 62, "cannot scale to"),
        ("x", "cannot scale to 'x' peers: give a number"),
        (2.0, "cannot scale to 2.0 peers: give a number"),
        (True, "cannot scale to True peers: give a number"),
        (None, "cannot scale to None peers: give a number"),
    ):
        with pytest.raises(ControlError, match=why):
            scale(running, asked)
    # More than the descriptors allow.
    _, hard = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (200, hard))
    with pytest.raises(ControlError, match=r"open files, and the limit is 200 \(ulimit -n\)"):
        scale(running, 20)
    assert pids(running) == before


def test_a_port_in_use_changes_nothing(supervised: Supervised) -> None:
    running = start(supervised, peers=1, room=3)
    before, taken = pids(running), running.base_port + 2
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("127.0.0.1", taken))
        with pytest.raises(ControlError, match=f"UDP port {taken} is in use, held by pid"):
            scale(running, 3)
        assert pids(running) == before
        assert is_free(running.base_port + 1)
        running.signal(signal.SIGTTIN)
        eventually(lambda: len(pids(running)) == 2)
        running.signal(signal.SIGTTIN)
        eventually(lambda: f"not scaled: UDP port {taken} is in use" in running.err)
    assert scale(running, 3)["before"] == 2


def test_ports_end_at_65535(supervised: Supervised) -> None:
    running = supervised.start(peers=1, base_port=65534).wait_ready()
    before = pids(running)
    with pytest.raises(ControlError, match="the last port would be 65536; 2 fit"):
        scale(running, 3)
    assert pids(running) == before
    assert scale(running, 2)["peers"] == 2


def test_an_app_that_has_become_broken_leaves_the_old_peers(supervised: Supervised) -> None:
    running = start(supervised, peers=2, room=4, app=PLAIN)
    before = pids(running)
    supervised.write_app(BROKEN)
    with pytest.raises(ControlError) as refused:
        scale(running, 4)
    assert str(refused.value).startswith("not scaled, the number of peers is still 2: ")
    assert str(refused.value).count("Traceback") == 1
    assert "ValueError: broken today" in str(refused.value)
    assert pids(running) == before
    assert all(answers(port) for port in running.ports)
    assert is_free(running.base_port + 2)
    assert is_free(running.base_port + 3)
    (event,) = events(running, "not scaled")
    assert "Traceback" not in event["why"]
    supervised.write_app(PLAIN)
    assert scale(running, 4)["peers"] == 4


def test_new_peers_in_a_crash_loop_are_removed(supervised: Supervised) -> None:
    running = start(supervised, peers=1, room=3, app=PLAIN)
    before = pids(running)
    supervised.write_app(DIES)
    with pytest.raises(
        ControlError,
        match=r"not scaled, the number of peers is still 1: worker pid .*: exit code 3 before it was ready",
    ) as refused:
        scale(running, 3)
    assert "restarted" not in str(refused.value), "that is what does not happen any more"
    assert pids(running) == before
    assert registered(running) == [running.base_port]
    assert is_free(running.base_port + 1)
    assert running.status()["supervisor"]["state"] == "ready"


def test_a_scaling_and_a_reload_do_not_wait_for_each_other(supervised: Supervised) -> None:
    running = start(supervised, peers=3, room=4, app=SLOW)
    before = pids(running)
    reload = Asked(running, "reload")
    eventually(lambda: len(running.tree()) == 6)  # the registrar, and a successor
    assert scale(running, 4)["peers"] == 4
    assert reload.is_under_way
    scaling = Asked(running, "scale", peers=2)
    assert [row["slot"] for row in scaling.answer()["stopped"]] == [3, 2]
    replaced = [row["slot"] for row in reload.answer()["replaced"]]
    assert replaced[:2] == [0, 1]
    assert not set(pids(running)) & set(before)
    assert len(pids(running)) == 2


def test_a_reload_while_peers_are_added(supervised: Supervised) -> None:
    running = start(supervised, peers=1, room=3, app=SLOW)
    scaling = Asked(running, "scale", peers=3)
    eventually(lambda: len(running.status()["peers"]) == 3)
    replaced = ask(running, "reload")["replaced"]
    scaling.answer()
    assert [row["slot"] for row in replaced] == [0, 1, 2]
    assert [row["pid"] for row in replaced] == pids(running)
    assert all(answers(running.base_port + slot) for slot in range(3))
    running.wait_registered()
    assert events(running, "died") == []


def test_a_reload_while_a_peer_is_removed_and_added_again(supervised: Supervised) -> None:
    """The old peer is gone, and the new one has loaded the new app."""
    running = start(supervised, peers=3, room=3, app=SLOW)
    reload = Asked(running, "reload")
    scale(running, 2)
    scale(running, 3)
    assert reload.is_under_way
    replaced = [each["slot"] for each in reload.answer()["replaced"]]
    assert replaced in ([0, 1], [0, 1, 2])


def test_a_reload_that_waits_for_a_peer_that_is_scaled_away(supervised: Supervised) -> None:
    running = start(supervised, peers=2, room=2, app=f"print('loads')\n{SLOW}")
    reload = Asked(running, "reload")
    eventually(lambda: logged(running, 0).count("loads") == 2)
    supervised.write_app(NEVER_LOADED)
    restart = Asked(running, "restart", slot=1)
    eventually(lambda: events(running, "replaced"))  # so the reload waits behind the restart
    scale(running, 1)
    with pytest.raises(ControlError, match="stopping"):
        restart.answer()
    assert [each["slot"] for each in reload.answer()["replaced"]] == [0]


def test_a_peer_is_scaled_away_while_it_is_replaced(supervised: Supervised) -> None:
    running = start(supervised, peers=2, room=2, app=PLAIN)
    before = pids(running)
    supervised.write_app(NEVER_LOADED)
    restarts = [Asked(running, "restart", slot=1) for _ in range(2)]
    eventually(lambda: len(running.tree()) == 5)
    begun_s = time.monotonic()
    assert scale(running, 1)["peers"] == 1
    assert time.monotonic() - begun_s < STOP_TIMEOUT_S, "no worker had to be killed at the end"
    for restart in restarts:
        with pytest.raises(
            ControlError, match=f"localhost:{running.base_port + 1}:? .*is stopping"
        ):
            restart.answer()
    assert pids(running) == before[:1]
    assert len(running.tree()) == 3
    assert events(running, "died") == []


def test_a_stop_ends_a_scaling(supervised: Supervised) -> None:
    running = start(supervised, peers=1, room=3, app=PLAIN)
    supervised.write_app(NEVER_LOADED)
    scaling = Asked(running, "scale", peers=3)
    eventually(lambda: len(running.tree()) == 5)
    waiting = Asked(running, "scale", peers=2)
    tree = running.tree_pids()
    begun_s = time.monotonic()
    running.signal(signal.SIGTERM)
    for asked in (scaling, waiting):
        with pytest.raises(ControlError, match="the supervisor is stopping"):
            asked.answer()
    assert running.wait() == 0
    assert time.monotonic() - begun_s < STOP_TIMEOUT_S - LAST_TIMEOUT_S, "so late they are killed"
    assert not alive(tree)
    assert registered(running) == []


def test_a_stop_ends_a_scaling_that_waits_for_a_stopped_worker(supervised: Supervised) -> None:
    running = start(supervised, "--stop-timeout=1.5", peers=2, room=2)
    tree = running.tree_pids()
    send_signal(pids(running)[1], signal.SIGSTOP)
    scaling = Asked(running, "scale", peers=1)
    eventually(lambda: running.peer(1)["state"] == "stopping")
    begun_s = time.monotonic()
    running.signal(signal.SIGTERM)
    with pytest.raises(ControlError, match="the supervisor is stopping"):
        scaling.answer()
    assert running.wait() == 0
    assert time.monotonic() - begun_s < STOP_TIMEOUT_S
    assert not alive(tree)


def test_counters_continue_when_a_slot_is_used_again(supervised: Supervised) -> None:
    running = start(supervised, "--recv-buffer=20000", peers=2, room=2)
    port = running.base_port + 1
    for _ in range(10):
        assert answers(port)
    send_signal(pids(running)[1], signal.SIGSTOP)
    raw_client.send(port, b"PING", bytes(1000), 200)
    send_signal(pids(running)[1], signal.SIGCONT)
    # It is answered once the datagrams before it are counted.
    eventually(lambda: answers(port))
    before = running.peer(1)
    assert before["rx_messages"] + before["rx_dropped"] == 211
    assert before["rx_dropped"] > 0
    scale(running, 1)
    assert scale(running, 2)["started"][0]["slot"] == 1
    after = running.peer(1)
    for name in ("rx_messages", "rx_dropped", "rx_bytes"):
        assert after[name] == before[name]
    assert after["tx_messages"] >= before["tx_messages"]  # counted after they are sent
    assert after["restarts"] == 0
    assert after["generation"] == before["generation"] + 1
    assert answers(port)
    assert running.peer(1)["rx_messages"] == before["rx_messages"] + 1


def test_the_last_drops_are_counted(supervised: Supervised) -> None:
    """The counter was not read between the drops and the end of the socket."""
    running = start(supervised, "--recv-buffer=20000", peers=2, room=2)
    send_signal(pids(running)[1], signal.SIGSTOP)
    raw_client.send(running.base_port + 1, b"PING", bytes(1000), 200)
    scaling = Asked(running, "scale", peers=1)
    eventually(lambda: registered(running) == [running.base_port])
    for process in running.tree():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
    scaling.answer()
    scale(running, 2)
    peer = running.peer(1)
    assert peer["rx_messages"] + peer["rx_dropped"] == 200
    assert peer["rx_dropped"] > 100


def test_peers_are_removed_without_etcd(supervised: Supervised) -> None:
    with EmbeddedEtcd() as etcd:
        running = supervised.start("--ttl=3", etcd=etcd.endpoint, peers=3).wait_registered()
        send_signal(etcd.pid, signal.SIGSTOP)
        try:
            begun_s = time.monotonic()
            result = scale(running, 1)
            # Two seconds for the records; the queues are empty.
            assert 1.0 < time.monotonic() - begun_s < STOP_TIMEOUT_S
        finally:
            send_signal(etcd.pid, signal.SIGCONT)
        assert [row["slot"] for row in result["stopped"]] == [2, 1]
        assert len(pids(running)) == 1
        assert answers(running.base_port)
        eventually(lambda: registered(running) == [running.base_port])
        assert running.stop() == 0


def test_datagrams_that_are_unread_when_a_port_is_closed_are_counted(
    supervised: Supervised,
) -> None:
    """Status, metrics and an event agree with what the client has sent."""
    metrics = free_ports()
    args = ["--stop-timeout=1", "--recv-buffer=1000000", f"--metrics=127.0.0.1:{metrics}"]
    running = start(supervised, *args, peers=2, room=2)
    port, sent = running.base_port + 1, 50
    assert answers(port)
    send_signal(pids(running)[1], signal.SIGSTOP)
    raw_client.send(port, b"PING", count=sent)
    (stopped,) = scale(running, 1)["stopped"]
    assert 900 < stopped["took_ms"] < STOP_TIMEOUT_S * 1e3
    assert "has not stopped in time: SIGKILL" in running.err
    assert is_free(port)
    (closed,) = events(running, "closed")
    assert (closed["peer_id"], closed["lost_unread"]) == (f"localhost:{port}", sent)
    assert scale(running, 2)["peers"] == 2
    peer = running.peer(1)
    assert (peer["lost_unread"], peer["lost_in_flight"], peer["rx_messages"]) == (sent, 0, 1)
    lines = http_get(metrics, "/metrics")[1].splitlines()
    assert f'peerd_lost_unread_total{{peer="localhost:{port}"}} {sent}' in lines
    assert f'peerd_lost_unread_total{{peer="localhost:{running.base_port}"}} 0' in lines
