"""The commands that talk to peers and etcd, run as a shell would."""

import re

import orjson
import pytest

from harness.command import peerd
from harness.ports import free_ports
from harness.supervised import Supervised
from peerd.registry import PeerRecord, Registry
from peerd.registry.etcd import Etcd


def test_nodes(supervised: Supervised) -> None:
    running = supervised.start(peers=2).wait_registered()
    where = [f"--etcd={running.etcd}", f"--prefix={running.prefix}"]
    shown = peerd("nodes", *where)
    assert shown.returncode == 0
    assert [line.split()[0] for line in shown.stdout.splitlines()[2:]] == [
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
    assert "skipped values below mixed/ that are not peer records: 1" in shown.stderr


def test_nodes_without_etcd() -> None:
    shown = peerd("nodes", "--etcd=http://127.0.0.1:9")
    assert shown.returncode == 69
    assert "127.0.0.1:9" in shown.stderr
    assert len(shown.stderr.splitlines()) == 1


def test_nodes_of_an_empty_prefix(etcd: str) -> None:
    shown = peerd("nodes", f"--etcd={etcd}", "--prefix=empty")
    assert shown.returncode == 0
    assert "no peers below empty/" in shown.stdout


def test_ping_and_send(supervised: Supervised) -> None:
    running = supervised.start(peers=1).wait_registered()
    target = f"localhost:{running.ports[0]}"
    pinged = peerd("ping", target, "-c", "2", "-i", "0")
    assert pinged.returncode == 0
    assert pinged.stdout.count("PONG from localhost") == 2
    assert peerd("send", target, "ECHO", "hello").stdout == "hello\n"
    assert peerd("send", target, "ECHO", "-", stdin="from stdin").stdout == "from stdin\n"
    reply = orjson.loads(peerd("send", target, "ECHO", "x", "--json").stdout)
    assert reply == {"magic": "ECHO", "version": "1.0", "body": "x", "sender": target}
    silent = peerd("send", target, "NOPE", "-t", "0.1")
    assert silent.returncode == 1
    assert "nothing within 0.1 s" in silent.stderr


def test_a_peer_id_is_looked_up(supervised: Supervised) -> None:
    running = supervised.start("--advertise=127.0.0.1", peers=1).wait_registered()
    where = [f"--etcd={running.etcd}", f"--prefix={running.prefix}"]
    record = PeerRecord(url="localhost", port=running.ports[0], peer_id="seedId")
    with Registry(running.etcd, running.prefix) as registry, registry.register(record):
        pinged = orjson.loads(peerd("ping", "seedId", "-c", "1", "--json", *where).stdout)
        assert (pinged["target"], pinged["address"]) == ("seedId", f"localhost:{record.port}")
        assert pinged["answered"] == 1
        assert peerd("send", "seedId", "ECHO", "hello", *where).stdout == "hello\n"
    unknown = peerd("ping", "unknown", *where)
    assert unknown.returncode == 1
    assert "no peer has the id 'unknown'" in unknown.stderr


def test_ping_of_a_closed_port() -> None:
    no_etcd = "--etcd=http://127.0.0.1:9"  # which an address does not need
    shown = peerd("ping", f"localhost:{free_ports()}", "-c", "1", no_etcd)
    assert shown.returncode == 1
    assert "Connection refused" in shown.stdout
    assert "no answer from localhost:" in shown.stdout


def test_no_etcd_is_started_at_another_endpoint() -> None:
    named = peerd("nodes", "--etcd=http://no.such.invalid:2379")
    assert named.returncode == 69
    # The second reason appears on machines without DNS.
    reasons = r"\((domain name not found|could not contact dns servers)\)"
    assert re.search(r"does not answer " + reasons + r": see that it runs, or", named.stderr)


def test_every_option_has_a_variable_with_the_name_of_its_flag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PEERD_RELOAD_TIMEOUT", "x")
    shown = peerd("reload")
    assert (shown.returncode, "'--timeout': 'x'" in shown.stderr) == (2, True)
    monkeypatch.setenv("PEERD_NODES_ETCD", "http://127.0.0.1:9")
    monkeypatch.setenv("PEERD_ETCD", "http://127.0.0.1:8")
    assert "etcd at http://127.0.0.1:9 " in peerd("nodes").stderr
    assert "etcd at http://127.0.0.1:8 " in peerd("ping", "someone").stderr


NEITHER = "write HOST:PORT, or a peer id"


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["ping", "no..host:5001"], 1, "no answer from no..host:5001"),
        (["ping", "localhost:0"], 2, "from 1 to 65535"),
        (["ping", "localhost:99999"], 2, "from 1 to 65535"),
        *((["ping", target], 2, NEITHER) for target in ("", ":23001")),
        *((["send", target, "PING"], 2, NEITHER) for target in ("", ":23001")),
        (["restart", "x"], 2, "'x' is not a valid slot number"),
        (["logs", "x"], 2, "'x' is not a valid slot number"),
        (["scale", "x"], 2, "'x' is not a valid number of peers"),
    ],
)
def test_a_bad_argument_is_named(args: list[str], code: int, text: str) -> None:
    shown = peerd(*args)
    assert (shown.returncode, text in shown.stderr) == (code, True)
