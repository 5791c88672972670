"""Runs ``peerd supervise`` as a user does: a process, its output, its ports, its control socket."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from harness.command import command
from harness.eventually import eventually
from harness.ports import free_ports
from harness.terminal import Terminal
from peerd import control

NO_ETCD = "http://127.0.0.1:1"
"""No etcd listens there."""


class Supervised:
    def __init__(self, folder: Path, etcd: str) -> None:
        self.folder = folder
        self.etcd = etcd
        self._running: list[Running] = []

    def write_app(self, source: str) -> None:
        """Replace the app of ``start(app=...)``; a worker loads it when it starts."""
        (self.folder / "supervised_app.py").write_text(source)

    def start(
        self,
        *args: str,
        peers: int = 8,
        base_port: int | None = None,
        prefix: str | None = None,
        etcd: str | None = None,
        app: str | None = None,
        through: Sequence[str] = (),
        on_terminal: bool = False,
        **options: Any,
    ) -> Running:
        """Start it and return at once; ``Running.wait_ready()`` and the like wait for facts.

        ``app`` is the source of its app. ``through``: a command that runs the rest of its line in its
        place. ``options`` are those of Popen.
        """
        if app is not None:
            self.write_app(app)
            args = ("--app=supervised_app:app", *args)
        running = Running(
            self.folder / f"supervisor-{len(self._running)}",
            range(base_port := base_port or free_ports(peers), base_port + peers),
            prefix or f"test-{random.randrange(10**9)}",
            etcd or self.etcd,
        )
        line = [*through, *command("supervise", f"--peers={peers}", f"--base-port={base_port}")]
        line += [f"--prefix={running.prefix}", f"--etcd={running.etcd}"]
        line += [f"--control={running.control}", "--log-format=text", *args]
        running.begin(line, on_terminal, {"cwd": self.folder, **options})
        self._running.append(running)
        return running

    def kill_all(self) -> None:
        for running in self._running:
            running.kill()


class Running:
    process: subprocess.Popen[bytes]
    terminal: Terminal | None = None

    def __init__(self, folder: Path, ports: range, prefix: str, etcd: str) -> None:
        folder.mkdir()
        self.base_port = ports[0]
        self.ports = ports
        self.prefix = prefix
        self.etcd = etcd
        self.control = folder / "control.sock"
        self._out = folder / "out"
        self._err = folder / "err"

    def begin(self, line: list[str], on_terminal: bool, options: dict[str, Any]) -> None:
        if on_terminal:
            self.terminal = Terminal(line, **options)
            self.process = self.terminal.process
        else:
            with self._out.open("wb") as out, self._err.open("wb") as err:
                streams: dict[str, Any] = {"stdout": out, "stderr": err}
                self.process = subprocess.Popen(line, stdin=subprocess.DEVNULL, **streams | options)
        self.pid = self.process.pid

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        """Its standard error so far, or everything that its terminal shows."""
        return self.terminal.text if self.terminal else self._err.read_text()

    def status(self) -> dict[str, Any]:
        report = control.request(self.control, "status")
        assert isinstance(report, dict)
        return report

    def peer(self, slot: int) -> dict[str, Any]:
        peer = self.status()["peers"][slot]
        assert isinstance(peer, dict)
        return peer

    def wait_ready(self) -> Running:
        eventually(lambda: all(p["state"] == "ready" for p in self.status()["peers"]))
        return self

    def wait_registered(self) -> Running:
        eventually(lambda: all(p["registered"] for p in self.status()["peers"]))
        return self

    def tree(self) -> list[psutil.Process]:
        """The supervisor and everything below it."""
        supervisor = psutil.Process(self.pid)
        return [supervisor, *supervisor.children(recursive=True)]

    def tree_pids(self) -> list[int]:
        return [process.pid for process in self.tree()]

    def registrar(self) -> psutil.Process:
        workers = {peer["pid"] for peer in self.status()["peers"]}
        (registrar,) = [
            child for child in psutil.Process(self.pid).children() if child.pid not in workers
        ]
        return registrar

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {self.err}") from None

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        with self.process:  # closes its pipes
            self.process.kill()
        if self.terminal:
            self.terminal.close()


def is_gone(pid: int) -> bool:
    """Whether the process has ended; its zombie may still wait to be reaped."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if not is_gone(pid)]


def all_gone(pids: list[int]) -> bool:
    return not alive(pids)


def send_signal(pid: int, number: int) -> None:
    os.kill(pid, number)


def udp_socket(port: int) -> str:
    """The socket bound to a loopback port, as /proc/PID/fd shows it."""
    for line in Path("/proc/net/udp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].partition(":")[2], 16) == port:
            return f"socket:[{fields[9]}]"
    raise AssertionError(f"no socket is bound to UDP port {port}")
