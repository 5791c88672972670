"""Each documented exit code, from a real run."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from harness.command import command, peerd
from harness.ports import free_ports
from harness.supervised import Supervised, alive, send_signal
from peerd.registry import Registry


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 128 + 2)])
def test_0_done_and_128_and_the_number_of_a_signal(
    supervised: Supervised, number: signal.Signals, code: int
) -> None:
    running = supervised.start().wait_registered()
    assert peerd("status", f"--control={running.control}").returncode == 0
    tree = running.tree_pids()
    running.signal(number)
    assert running.wait() == code
    assert not alive(tree)
    with Registry(running.etcd, running.prefix) as registry:
        assert registry.nodes() == []
    assert not running.control.exists()
    assert "Traceback" not in running.err


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


@pytest.mark.parametrize("how", ["dies", "cannot start"])
def test_70_crash_loop(supervised: Supervised, how: str) -> None:
    app = "import peerd\napp = peerd.App()\n"
    running = supervised.start("--on-crashloop=exit", peers=2, app=app).wait_ready()
    tree = running.tree_pids()
    supervised.write_app(
        "import os\nos._exit(3)\n" if how == "dies" else "raise ValueError('broken')\n"
    )
    send_signal(running.peer(0)["pid"], signal.SIGKILL)
    assert running.wait() == 70
    assert ("exit code 3" if how == "dies" else "ValueError: broken") in running.err
    stops = f"peer localhost:{running.ports[0]} is in a crash loop: stopping"
    parked = "times within 60 s; the supervisor stops (--on-crashloop)"
    assert running.err.index(parked) < running.err.index(stops)  # the certificate comes first
    assert not alive(tree)


def test_73_cannot_bind(supervised: Supervised) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        running = supervised.start(peers=1, base_port=port)
        assert running.wait() == 73
        assert f"UDP port {port} is in use, held by pid {os.getpid()}" in running.err
        done = peerd("check", f"--base-port={port}", f"--etcd={supervised.etcd}")
        assert done.returncode == 73


def test_78_bad_configuration_or_app(supervised: Supervised, tmp_path: Path) -> None:
    config = tmp_path / "peerd.toml"
    config.write_text("peer = 8\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    assert supervised.start(f"--config={config}", peers=1).wait() == 78
    running = supervised.start("--app=broken:app", peers=1)
    assert running.wait() == 78
    assert running.err.count("Traceback") == 1
    assert "broken.py" in running.err
    port = f"--base-port={free_ports()}"
    assert peerd("check", f"--config={config}").returncode == 78
    assert peerd("check", "--app=broken:app", port, cwd=tmp_path).returncode == 78


def test_128_and_the_number_of_a_signal_that_cannot_be_caught() -> None:
    """A shell reports 128 + n for a command that was killed."""
    with subprocess.Popen(
        ["sh", "-c", '"$@" & kill -9 $!; wait $!', "sh", *command("wait", "--timeout=60")],
        stderr=subprocess.DEVNULL,
    ) as shell:
        assert shell.wait(60) == 128 + signal.SIGKILL
