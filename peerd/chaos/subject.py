"""The supervisor that chaos is done to: ``peerd supervise`` as a user starts it, seen from outside."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from peerd import control
from peerd.errors import NotRunningError

COMMAND_TIMEOUT_S = 90.0
"""Commands queue, and each of a full queue takes its time."""

POLL_S = 0.05

MARK = "PEERD_CHAOS_RUN"
PORTS = range(10_000, 30_000)
"""Below the kernel's ephemeral ones."""


class Subject:
    """A running supervisor with a folder, ports, a prefix and a control socket of its own."""

    def __init__(
        self,
        folder: Path,
        etcd: str,
        *,
        app: str,
        peers: int,
        most_peers: int,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Starts it. ``folder`` exists, and gets its output and whatever it writes."""
        self.folder = folder
        self.etcd = etcd
        self.base_port = _free_ports(most_peers)
        self.prefix = f"chaos-{uuid.uuid4().hex[:12]}"
        self.control = folder / "control.sock"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        command = [sys.executable, "-m", "peerd", "supervise", f"--app={app}"]
        command += [f"--peers={peers}", f"--base-port={self.base_port}", f"--etcd={etcd}"]
        command += [f"--prefix={self.prefix}", f"--control={self.control}", *arguments]
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                process_group=0,  # a Ctrl-C in the terminal is not for it
                env={
                    **os.environ,
                    **(environment or {}),
                    "TMPDIR": str(self.temporary),
                    # Titles would otherwise be written over the environment, and the mark with it.
                    "SPT_NOENV": "1",
                    MARK: self._mark.partition("=")[2],
                },
            )
        self.pid = self.process.pid

    def command(self, name: str, **arguments: object) -> Any:
        """Raises ControlError and NotRunningError."""
        return control.request(self.control, name, arguments, timeout_s=COMMAND_TIMEOUT_S)

    def status(self) -> dict[str, Any]:
        report = control.request(self.control, "status", timeout_s=10.0)
        assert isinstance(report, dict)
        return report

    def peers(self) -> list[dict[str, Any]]:
        peers = self.status()["peers"]
        assert isinstance(peers, list)
        return peers

    def events(self, after: int) -> list[dict[str, Any]]:
        found = control.request(self.control, "events", {"after": after})
        assert isinstance(found, list)
        return found

    def port(self, slot: int) -> int:
        return self.base_port + slot

    def worker(self, slot: int) -> int | None:
        """Its pid; None while there is none."""
        return next((peer["pid"] for peer in self.peers() if peer["slot"] == slot), None)

    def registrar(self) -> int | None:
        """Its pid: the one child that says so in its title."""
        for child in self.children():
            with contextlib.suppress(psutil.Error):
                if "registrar" in " ".join(child.cmdline()):
                    return child.pid
        return None

    def successor(self, slot: int, known: Collection[int]) -> int | None:
        """The pid of a worker of this slot that is none of ``known``; None while there is none."""
        title = f"peerd: peer localhost:{self.port(slot)}"
        for child in self.children():
            with contextlib.suppress(psutil.Error):
                if child.pid not in known and title in " ".join(child.cmdline()):
                    return child.pid
        return None

    def children(self) -> list[psutil.Process]:
        """Raises NotRunningError."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            raise NotRunningError("the supervisor has ended") from None

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def send_child(self, pid: int, number: signal.Signals) -> bool:
        """False when it is no child of the supervisor any more."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            # From here on the pid may be another's, but not the pidfd.
            if psutil.Process(pid).ppid() != self.pid:
                return False
            signal.pidfd_send_signal(pidfd, number)
        except (psutil.Error, ProcessLookupError):
            return False
        finally:
            os.close(pidfd)
        return True

    def descriptors(self) -> list[str]:
        """What the supervisor has open, by what it is: ``socket``, ``pipe``, ``/dev/null``.

        Raises NotRunningError.
        """
        found = []
        folder = f"/proc/{self.pid}/fd"
        try:
            names = os.listdir(folder)
        except OSError:
            raise NotRunningError("the supervisor has ended") from None
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"{folder}/{name}").partition(":[")[0])
        return sorted(found)

    def processes(self) -> list[int]:
        """Every process that descends from this supervisor, wherever it hangs by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                if self._mark.encode() in environment:
                    found.append(process.pid)
        return found

    def last_words(self) -> str:
        """The last line of what it has written, and where the rest is."""
        path = self.folder / "err"
        lines = path.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'it has said nothing'} ({path})"

    def kill(self) -> None:
        """And wait for its end; what descends from it ends with it, or is a finding."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def wait_for(fact: Callable[[], bool], within_s: float) -> bool:
    """Whether it came true in time."""
    until_s = time.monotonic() + within_s
    while not fact():
        if time.monotonic() >= until_s:
            return False
        time.sleep(POLL_S)
    return True


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _free_ports(count: int) -> int:
    """The first of ``count`` neighbouring free UDP ports."""
    while True:
        base = random.choice(PORTS)
        if all(is_free(port) for port in range(base, base + count)):
            return base
