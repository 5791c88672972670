"""The Peer class: one peer in the calling process."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from harness import raw_client
from harness.eventually import eventually
from harness.ports import free_ports
from peerd import App, Peer, PeerConflictError, PortInUseError, RegistryUnavailableError
from peerd.registry import Registry

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_it_serves_in_a_thread_and_is_registered_meanwhile(etcd: str) -> None:
    app = App()
    app.handler("CHAT")(lambda message: b"hello " + message.body)
    port = free_ports()
    peer = Peer(app, port=port, peer_id="seedId", etcd=etcd, prefix="peer-class", partition_key="p")
    with Registry(etcd, "peer-class") as registry:
        with peer:
            assert raw_client.request(port, b"CHAT", b"you") == (b"CHAT", b"1.0", b"hello you")
            eventually(lambda: peer.counters()["handled"] == 1)
            (record,) = registry.nodes()
            assert (record.peer_id, record.url, record.port) == ("seedId", "localhost", port)
            assert record.partition_key == "p"
        assert registry.nodes() == []


def test_it_serves_in_the_foreground_until_it_is_stopped() -> None:
    port = free_ports()
    peer = Peer(port=port)
    thread = threading.Thread(target=peer.serve_forever)
    thread.start()
    eventually(lambda: raw_client.request(port, b"PING", b"x", timeout_s=0.2)[0] == b"PONG")
    peer.stop()
    thread.join(30)
    assert not thread.is_alive()


def test_a_peer_that_cannot_start_leaves_nothing_open(etcd: str) -> None:
    port = free_ports(2)
    with Peer(port=port, peer_id="one", etcd=etcd, prefix="peer-fails"):
        with pytest.raises(PortInUseError, match=f"held by pid {os.getpid()}.*another port"):
            Peer(port=port).start()
        with pytest.raises(PeerConflictError, match=str(port)):
            Peer(port=port + 1, peer_id="one", etcd=etcd, prefix="peer-fails").start()
        with pytest.raises(RegistryUnavailableError):
            Peer(port=port + 1, etcd="http://127.0.0.1:9").start()
        with Peer(port=port + 1):  # the port is free again
            pass


def test_ctrl_c_in_the_foreground(etcd: str) -> None:
    port = free_ports()
    code = f"import peerd; peerd.Peer(port={port}, etcd={etcd!r}, prefix='ctrl-c').serve_forever()"
    with (
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as process,
        Registry(etcd, "ctrl-c") as registry,
    ):
        eventually(registry.nodes)
        process.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1]
        assert registry.nodes() == []


def test_the_quick_start(etcd: str) -> None:
    port = free_ports()
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py"), "--port", str(port), "--etcd", etcd],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert f"Url = localhost, Port = {port}" in done.stdout
