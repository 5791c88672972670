"""The supervisor under test: ``peerd supervise`` as a user starts it, seen from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import psutil

from peerd import control
from peerd.errors import NotRunningError, PeerdError
from peerd.free_ports import free_ports

COMMAND_TIMEOUT_S = 90.0  # Commands queue, so the last of a full queue waits for all others
START_TIMEOUT_S = 20.0
EXIT_TIMEOUT_S = 5.0

POLL_S = 0.05

MARK = "PEERD_CHAOS_RUN"


class Subject:
    """A running supervisor with its own folder, ports, prefix and control socket."""

    def __init__(
        self,
        folder: Path,
        etcd: str,
        *,
        app: str,
        peers: int,
        max_peers: int,
        arguments: Sequence[str] = (),
    ) -> None:
        """Start it. ``folder`` receives its output and all files that it writes."""
        self.folder = folder
        self.etcd = etcd
        self.base_port = free_ports.take(max_peers)
        self.prefix = f"chaos-{uuid.uuid4().hex[:12]}"
        self.control = folder / "control.sock"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._mark = uuid.uuid4().hex
        command = [sys.executable, "-m", "peerd", "supervise", f"--app={app}"]
        command += [f"--peers={peers}", f"--base-port={self.base_port}", f"--etcd={etcd}"]
        command += [f"--prefix={self.prefix}", f"--control={self.control}", *arguments]
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                process_group=0,  # out of reach of Ctrl-C in the terminal
                env={
                    **os.environ,
                    "TMPDIR": str(self.temporary),
                    # Process titles would otherwise overwrite the environment, and with it the mark.
                    "SPT_NOENV": "1",
                    MARK: self._mark,
                },
            )
        self.pid = self.process.pid

    def command(self, name: str, **arguments: object) -> Any:
        """Raises ControlError and NotRunningError."""
        return control.request(self.control, name, arguments, timeout_s=COMMAND_TIMEOUT_S)

    def peers(self) -> list[dict[str, Any]]:
        status = control.request(self.control, "status", timeout_s=10.0)
        peers: list[dict[str, Any]] = status["peers"]
        return peers

    def events(self, after: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = control.request(self.control, "events", {"after": after})
        return found

    def ports(self) -> list[int]:
        return [peer["port"] for peer in self.peers()]

    def port(self, slot: int) -> int:
        return self.base_port + slot

    def worker(self, slot: int) -> int | None:
        """The pid of the slot's worker; None while there is none."""
        return next((peer["pid"] for peer in self.peers() if peer["slot"] == slot), None)

    def registrar(self) -> int | None:
        return self._child_titled("registrar")

    def successor(self, slot: int, known: Collection[int]) -> int | None:
        """The pid of a worker of this slot that is not in ``known``; None while there is none."""
        return self._child_titled(f"peerd: peer localhost:{self.port(slot)}", known)

    def _child_titled(self, title: str, known: Collection[int] = ()) -> int | None:
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
        """Signal a child of the supervisor. False if the pid is no longer its child."""
        with contextlib.suppress(psutil.Error):
            child = psutil.Process(pid)
            if child.ppid() == self.pid:
                child.send_signal(number)  # raises NoSuchProcess if the pid has been reused
                return True
        return False

    def descriptors(self) -> list[str]:
        """The kinds of the supervisor's open descriptors: ``socket``, ``pipe``, ``/dev/null``.

        Raises NotRunningError.
        """
        found = []
        try:
            for path in Path(f"/proc/{self.pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    found.append(str(path.readlink()).partition(":[")[0])
        except OSError:
            raise NotRunningError("the supervisor has ended") from None
        return sorted(found)

    def settled_descriptors(self) -> list[str]:
        """``descriptors()`` once the connections of earlier requests are closed."""
        found: list[list[str]] = []

        def is_settled() -> bool:
            found.append(self.descriptors())
            return len(found) > 3 and found[-1] == found[-2] == found[-3]

        wait_for(is_settled, EXIT_TIMEOUT_S)
        return found[-1]

    def processes(self) -> list[int]:
        """All descendants of this supervisor, whatever their parents are by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if process.environ().get(MARK) == self._mark:
                    found.append(process.pid)
        return found

    def wait_started(self) -> None:
        """Until every peer is ready and registered. Raises PeerdError if that does not happen."""

        def is_registered() -> bool:
            with contextlib.suppress(PeerdError):
                return all(peer["registered"] for peer in self.peers())
            return self.process.poll() is not None

        wait_for(is_registered, START_TIMEOUT_S)
        if self.process.poll() is not None or any(p["state"] != "ready" for p in self.peers()):
            raise PeerdError(f"the supervisor has not started: {self.last_words()}")

    def exit_code(self) -> int | None:
        """None for a supervisor that lives on. Waits a moment for one that is just exiting: a killed
        process closes its sockets before it can be waited for."""
        wait_for(lambda: self.process.poll() is not None, EXIT_TIMEOUT_S)
        return self.process.poll()

    def terminate(self, timeout_s: float) -> int:
        """Send SIGTERM and return the exit code. Raises subprocess.TimeoutExpired."""
        self.send(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def last_words(self) -> str:
        """The last line on its standard error, and the path of the rest."""
        path = self.folder / "err"
        lines = path.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'it has written nothing'} ({path})"

    def kill(self) -> None:
        """SIGKILL it and wait until it has exited. Its descendants have to exit by themselves."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def wait_for(fact: Callable[[], bool], within_s: float) -> bool:
    until_s = time.monotonic() + within_s
    while not fact():
        if time.monotonic() >= until_s:
            return False
        time.sleep(POLL_S)
    return True
