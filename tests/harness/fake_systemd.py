"""Stands in for systemd with one service: a notify socket, a descriptor store, and the start of the service
with descriptors from 3 on (sd_notify(3), sd_listen_fds(3))."""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# Runs in the service's process, because LISTEN_PID must be its pid. The copies leave 3, 4, ... free.
LAUNCH = """
import fcntl, os, sys
passed = [fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 512) for fd in sys.argv[1].split(",") if fd]
for number, fd in enumerate(passed, 3):
    os.dup2(fd, number)
os.closerange(3 + len(passed), 512)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class Notification:
    """One message of the service."""

    at_s: float
    fields: dict[str, str]


@dataclass
class FakeSystemd:
    folder: Path
    kind: Literal["path", "abstract"] = "path"
    watchdog_s: float | None = None
    received: list[Notification] = field(default_factory=list)
    store: dict[str, list[socket.socket]] = field(default_factory=dict)
    sockets: dict[str, socket.socket] = field(default_factory=dict)
    """Sockets of .socket units: each start passes them before those of the store."""

    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> FakeSystemd:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        name = f"peerd-test-{os.getpid()}-{id(self)}"
        self.address = f"@{name}" if self.kind == "abstract" else str(self.folder / "notify")
        self._socket.bind(
            self.address.replace("@", "\0", 1) if name in self.address else self.address
        )
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._socket.shutdown(socket.SHUT_RD)
        self._thread.join()
        self._socket.close()
        for _name, sock in self.passed():
            sock.close()

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Type=notify with FileDescriptorStoreMax=infinity; output goes to ``folder``."""
        passed = self.passed()
        environment = {**os.environ, "NOTIFY_SOCKET": self.address, "LISTEN_FDS": str(len(passed))}
        environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in passed)
        if self.watchdog_s is not None:
            environment["WATCHDOG_USEC"] = str(int(self.watchdog_s * 1e6))
        fds = [sock.fileno() for _, sock in passed]
        with (self.folder / "out").open("ab") as out, (self.folder / "err").open("ab") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, ",".join(map(str, fds)), *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=self.folder,
                env=environment,
                pass_fds=fds,
            )
        return self.process

    def passed(self) -> list[tuple[str, socket.socket]]:
        """The descriptors that a start passes, in order, with their names."""
        stored = [(name, sock) for name, kept in self.store.items() for sock in kept]
        return [*self.sockets.items(), *stored]

    def stop(self) -> int:
        """SIGTERM to the main process (KillMode=mixed), as 'systemctl restart' does first."""
        self.signal(signal.SIGTERM)
        assert self.process is not None
        return self.process.wait(60)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def values(self, name: str) -> list[str]:
        """Every value that the service has sent for this name, oldest first."""
        return [each.fields[name] for each in list(self.received) if name in each.fields]

    def names(self) -> list[str]:
        """The names that the service has sent, in order, without descriptors and pings of the watchdog."""
        names = ("READY", "RELOADING", "STOPPING")
        return [name for each in list(self.received) for name in names if name in each.fields]

    def _read(self) -> None:
        while True:
            text, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(4 * 16))
            if not text:
                return
            lines = [line.partition("=") for line in text.decode().splitlines()]
            fields = {name: value for name, _, value in lines}
            fds = array.array("i")
            for _level, _kind, data in ancillary:
                fds.frombytes(data)
            self._keep(fields, [socket.socket(fileno=fd) for fd in fds])
            self.received.append(Notification(time.monotonic(), fields))

    def _keep(self, fields: dict[str, str], sockets: list[socket.socket]) -> None:
        name = fields.get("FDNAME", "stored")
        if fields.get("FDSTOREREMOVE") == "1":
            for sock in self.store.pop(name, []):
                sock.close()
        known = {os.fstat(sock.fileno()).st_ino for kept in self.store.values() for sock in kept}
        for sock in sockets:
            if fields.get("FDSTORE") == "1" and os.fstat(sock.fileno()).st_ino not in known:
                self.store.setdefault(name, []).append(sock)
            else:  # systemd accepts a descriptor that it has already
                sock.close()
