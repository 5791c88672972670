"""The commands that talk to peers and etcd, run as a shell would."""

from __future__ import annotations

import re
import subprocess
import sys

import orjson
import pytest

from harness.ports import free_ports
from harness.supervised import Supervised
from peerd.registry import PeerRecord, Registry
from peerd.registry.etcd import Etcd


def peerd(*args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "peerd", *args], input=stdin, capture_output=True, timeout=30
    )


def test_nodes(supervised: Supervised) -> None:
    running = supervised.start(peers=2)
    running.wait_registered()
    where = [f"--etcd={running.etcd}", f"--prefix={running.prefix}"]
    shown = peerd("nodes", *where)
    assert shown.returncode == 0
    assert [line.split()[0] for line in shown.stdout.decode().splitlines()[2:]] == [
        f"localhost:{port}" for port in running.ports
    ]
    port = running.ports[0]
    assert orjson.loads(peerd("nodes", "--json", *where).stdout)[0] == {
        "peer_id": f"localhost:{port}",
        "url": "localhost",
        "port": port,
        "protocol": "udp",
        "partition_key": None,
        "metadata": {},
    }


def test_nodes_lists_faasnet_records_and_counts_other_values(etcd: str) -> None:
    store = Etcd(etcd, 5.0)
    try:
        store.put(
            b"mixed/localhost", b'{"Url":"localhost","Port":5009,"PartitionKey":null,"Id":"x"}', 0
        )
        store.put(b"mixed/garbage", b"not json", 0)
    finally:
        store.close()
    shown = peerd("nodes", "--json", f"--etcd={etcd}", "--prefix=mixed")
    assert [node["port"] for node in orjson.loads(shown.stdout)] == [5009]
    assert b"skipped values below mixed/ that are not peer records: 1" in shown.stderr


def test_nodes_without_etcd() -> None:
    shown = peerd("nodes", "--etcd=http://127.0.0.1:9")
    assert shown.returncode == 69
    assert b"127.0.0.1:9" in shown.stderr
    assert len(shown.stderr.splitlines()) == 1


def test_nodes_of_an_empty_prefix(etcd: str) -> None:
    shown = peerd("nodes", f"--etcd={etcd}", "--prefix=empty")
    assert shown.returncode == 0
    assert b"no peers below empty/" in shown.stdout


def test_ping_and_send(supervised: Supervised) -> None:
    running = supervised.start(peers=1)
    running.wait_registered()
    target = f"localhost:{running.ports[0]}"
    pinged = peerd("ping", target, "-c", "2", "-i", "0")
    assert pinged.returncode == 0
    assert pinged.stdout.count(b"PONG from localhost") == 2
    assert peerd("send", target, "ECHO", "hello").stdout == b"hello\n"
    assert peerd("send", target, "ECHO", "-", stdin=b"from stdin").stdout == b"from stdin\n"
    reply = orjson.loads(peerd("send", target, "ECHO", "x", "--json").stdout)
    assert reply == {"magic": "ECHO", "version": "1.0", "body": "x", "sender": target}
    silent = peerd("send", target, "NOPE", "-t", "0.1")
    assert silent.returncode == 1
    assert b"nothing within 0.1 s" in silent.stderr


def test_a_peer_id_is_looked_up(supervised: Supervised) -> None:
    running = supervised.start("--advertise=127.0.0.1", peers=1)
    running.wait_registered()
    where = [f"--etcd={running.etcd}", f"--prefix={running.prefix}"]
    record = PeerRecord(url="localhost", port=running.ports[0], peer_id="seedId")
    with Registry(running.etcd, running.prefix) as registry, registry.register(record):
        pinged = orjson.loads(peerd("ping", "seedId", "-c", "1", "--json", *where).stdout)
        assert (pinged["target"], pinged["address"]) == ("seedId", f"localhost:{record.port}")
        assert pinged["answered"] == 1
        assert peerd("send", "seedId", "ECHO", "hello", *where).stdout == b"hello\n"
    unknown = peerd("ping", "unknown", *where)
    assert unknown.returncode == 1
    assert b"no peer has the id 'unknown'" in unknown.stderr


def test_ping_of_a_closed_port() -> None:
    no_etcd = "--etcd=http://127.0.0.1:9"  # which an address does not need
    shown = peerd("ping", f"localhost:{free_ports()}", "-c", "1", no_etcd)
    assert shown.returncode == 1
    assert b"Connection refused" in shown.stdout
    assert b"no answer from localhost:" in shown.stdout


def test_ping_of_an_invalid_host() -> None:
    shown = peerd("ping", "no..host:5001")
    assert shown.returncode == 1
    assert b"no answer from no..host:5001" in shown.stderr


@pytest.mark.parametrize("target", ["localhost:0", "localhost:99999"])
def test_ping_of_an_invalid_port(target: str) -> None:
    shown = peerd("ping", target)
    assert shown.returncode == 2
    assert b"from 1 to 65535" in shown.stderr


@pytest.mark.parametrize("target", ["", ":23001"])
def test_ping_without_a_host(target: str) -> None:
    for args in (["ping", target], ["send", target, "PING"]):
        shown = peerd(*args)
        assert shown.returncode == 2
        assert b"write HOST:PORT, or a peer id" in shown.stderr


def test_no_etcd_is_started_at_another_endpoint() -> None:
    named = peerd("nodes", "--etcd=http://no.such.invalid:2379")
    assert named.returncode == 69
    # The second reason appears on machines without DNS.
    reasons = rb"\((domain name not found|could not contact dns servers)\)"
    assert re.search(rb"does not answer " + reasons + rb": see that it runs, or", named.stderr)


def test_every_option_has_a_variable_with_the_name_of_its_flag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PEERD_RELOAD_TIMEOUT", "x")
    shown = peerd("reload")
    assert (shown.returncode, b"'--timeout': 'x'" in shown.stderr) == (2, True)
    monkeypatch.setenv("PEERD_NODES_ETCD", "http://127.0.0.1:9")
    monkeypatch.setenv("PEERD_ETCD", "http://127.0.0.1:8")
    assert b"etcd at http://127.0.0.1:9 " in peerd("nodes").stderr
    assert b"etcd at http://127.0.0.1:8 " in peerd("ping", "someone").stderr


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["restart", "x"], b"'x' is not a valid slot number"),
        (["logs", "x"], b"'x' is not a valid slot number"),
        (["scale", "x"], b"'x' is not a valid number of peers"),
    ],
)
def test_a_word_where_a_number_belongs_is_named(args: list[str], text: bytes) -> None:
    shown = peerd(*args)
    assert (shown.returncode, text in shown.stderr) == (2, True)
