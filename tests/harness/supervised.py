"""Runs ``peerd supervise`` as a user does: a process, its output, its ports, its control socket."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from harness.eventually import eventually
from harness.ports import free_ports
from peerd import control


class Supervised:
    def __init__(self, folder: Path, etcd: str) -> None:
        self.folder = folder
        self.etcd = etcd
        self._running: list[Running] = []

    def start(
        self,
        *args: str,
        peers: int = 8,
        base_port: int | None = None,
        prefix: str | None = None,
        etcd: str | None = None,
        cwd: Path | None = None,
        through: Sequence[str] = (),
    ) -> Running:
        """Start it and return at once; ``Running.wait_ready()`` and the like wait for facts.

        ``through``: a command that runs the rest of its line in its place.
        """
        number = len(self._running)
        running = Running(
            self.folder / f"supervisor-{number}",
            base_port or free_ports(peers),
            peers,
            prefix or f"test-{random.randrange(10**9)}",
            etcd or self.etcd,
            args,
            cwd or self.folder,
            through,
        )
        self._running.append(running)
        return running

    def kill_all(self) -> None:
        for running in self._running:
            running.kill()


class Running:
    def __init__(
        self,
        folder: Path,
        base_port: int,
        peers: int,
        prefix: str,
        etcd: str,
        args: tuple[str, ...],
        cwd: Path,
        through: Sequence[str],
    ) -> None:
        folder.mkdir()
        self.base_port = base_port
        self.ports = range(base_port, base_port + peers)
        self.prefix = prefix
        self.etcd = etcd
        self.control = folder / "control.sock"
        self._out = folder / "out"
        self._err = folder / "err"
        command = [*through, sys.executable, "-m", "peerd", "supervise", f"--peers={peers}"]
        command += [f"--base-port={base_port}", f"--prefix={prefix}", f"--etcd={etcd}"]
        command += [f"--control={self.control}", "--log-format=text", *args]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd
            )
        self.pid = self.process.pid

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def status(self) -> dict[str, Any]:
        report = control.request(self.control, "status")
        assert isinstance(report, dict)
        return report

    def peer(self, slot: int) -> dict[str, Any]:
        peer = self.status()["peers"][slot]
        assert isinstance(peer, dict)
        return peer

    def wait_ready(self, within_s: float = 60) -> None:
        eventually(lambda: all(p["state"] == "ready" for p in self.status()["peers"]), within_s)

    def wait_registered(self, within_s: float = 60) -> None:
        eventually(lambda: all(p["registered"] for p in self.status()["peers"]), within_s)

    def tree(self) -> list[psutil.Process]:
        """The supervisor and everything below it."""
        supervisor = psutil.Process(self.pid)
        return [supervisor, *supervisor.children(recursive=True)]

    def registrar(self) -> psutil.Process:
        workers = {peer["pid"] for peer in self.status()["peers"]}
        (registrar,) = [
            child for child in psutil.Process(self.pid).children() if child.pid not in workers
        ]
        return registrar

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 60) -> int:
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def is_gone(pid: int) -> bool:
    """Whether the process has ended; its zombie may still wait to be reaped."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if not is_gone(pid)]


def send_signal(pid: int, number: signal.Signals) -> None:
    os.kill(pid, number)
