"""Each documented exit code, from a real run."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
from pathlib import Path

from harness import raw_client
from harness.command import command, peerd
from harness.eventually import eventually
from harness.ports import free_ports
from harness.supervised import Supervised


def test_0_done(supervised: Supervised) -> None:
    running = supervised.start(peers=1)
    running.wait_ready()
    assert peerd("status", f"--control={running.control}").returncode == 0
    running.signal(signal.SIGTERM)
    assert running.wait() == 0


def test_1_failed() -> None:
    assert peerd("ping", f"localhost:{free_ports()}", "-c", "1", "-t", "0.1").returncode == 1


def test_2_usage() -> None:
    for args in (["no-such-command"], ["supervise", "--no-such-flag"], ["supervise", "--peers=0"]):
        done = peerd(*args)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


def test_3_not_running() -> None:
    for name in ("status", "events", "reload", "stop"):
        assert peerd(name).returncode == 3
    for args in (["restart", "0"], ["scale", "2"], ["wait", "--timeout=0"]):
        assert peerd(*args).returncode == 3


def test_69_registry_needed_but_unreachable() -> None:
    assert peerd("nodes", "--etcd=http://127.0.0.1:9").returncode == 69


def test_70_crash_loop(supervised: Supervised, tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(
        "import os, peerd\napp = peerd.App()\n@app.handler('DIE')\ndef die(message):\n    os._exit(3)\n"
    )
    running = supervised.start("--app=dies:app", "--on-crashloop=exit", peers=2)
    running.wait_ready()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect(("127.0.0.1", running.ports[0]))

        def killed_again() -> bool:
            with contextlib.suppress(ConnectionRefusedError):  # it has closed its sockets
                client.send(raw_client.pack(b"DIE", b"1", b""))
            return running.process.poll() is not None

        eventually(killed_again)
    assert running.wait() == 70
    assert "exit code 3" in running.err


def test_73_cannot_bind(supervised: Supervised) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        assert supervised.start(peers=1, base_port=port).wait() == 73
        done = peerd("check", f"--base-port={port}", f"--etcd={supervised.etcd}")
        assert done.returncode == 73


def test_78_bad_configuration_or_app(supervised: Supervised, tmp_path: Path) -> None:
    config = tmp_path / "peerd.toml"
    config.write_text("peer = 8\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    assert supervised.start(f"--config={config}", peers=1).wait() == 78
    assert supervised.start("--app=broken:app", peers=1).wait() == 78
    port = f"--base-port={free_ports()}"
    assert peerd("check", f"--config={config}").returncode == 78
    assert peerd("check", "--app=broken:app", port, cwd=tmp_path).returncode == 78


def test_128_and_the_number_of_a_signal(supervised: Supervised) -> None:
    running = supervised.start(peers=1)
    running.wait_ready()
    running.signal(signal.SIGINT)
    assert running.wait() == 128 + signal.SIGINT


def test_128_and_the_number_of_a_signal_that_cannot_be_caught() -> None:
    """A shell reports 128 + n for a command that was killed."""
    with subprocess.Popen(
        ["sh", "-c", '"$@" & kill -9 $!; wait $!', "sh", *command("wait", "--timeout=60")],
        stderr=subprocess.DEVNULL,
    ) as shell:
        assert shell.wait(60) == 128 + signal.SIGKILL
