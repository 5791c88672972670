"""A real etcd that tests kill, stop and wipe, optionally with TLS or as a member of a cluster.

``EmbeddedEtcd`` is part of peerd; this one is for the faults that peerd must survive.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.etcd_gateway import Gateway
from harness.eventually import eventually
from harness.ports import free_ports
from peerd.address import Address
from peerd.registry.embedded_etcd import is_healthy


class ServerTls(NamedTuple):
    cert_file: Path
    key_file: Path
    client_ca_file: Path  # clients must present a certificate of this CA


class EtcdProcess:
    """One member of etcd with a data directory and ports of its own, for a ``with`` block.

    It dies with the thread that started it (PR_SET_PDEATHSIG), so start it from the test's main thread.
    """

    def __init__(
        self,
        binary: Path,
        folder: Path,
        *,
        name: str = "etcd",
        tls: ServerTls | None = None,
        flags: Sequence[str] = (),
        host: str = "127.0.0.1",
        peer_host: str = "127.0.0.1",
        namespace: str | None = None,
    ) -> None:
        """``namespace``: the name of the network namespace to run in, which has both hosts."""
        self.name = name
        self.flags = list(flags)
        self.client = Address(host, free_ports())
        self.peer = Address(peer_host, free_ports())
        self.plain = Address(host, free_ports()) if tls else self.client
        """Always plain HTTP, so that the gateway needs no certificates."""
        self.gateway = Gateway(self.plain)
        self._binary = binary
        self._tls = tls
        self._namespace = namespace
        self._data = folder / f"{name}.data"
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.client}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Returns when it serves."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Starts it and returns at once: a member of a cluster serves only with the others."""
        assert not self.running
        namespace = ["ip", "netns", "exec", self._namespace] if self._namespace else []
        # A variable such as ETCD_NAME would contradict the flags.
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("ETCD_")
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *namespace, *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                process_group=0,  # Ctrl-C in the terminal does not end it
            )

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self._process is not None
            status = self._process.poll()
            # Not raised here: eventually() would wait for better.
            return status is not None or self.is_healthy()

        eventually(ready)
        assert self.running, f"etcd ended: {self._log.read_text(errors='replace')[-2000:]}"

    def is_healthy(self, timeout_s: float = 1.0) -> bool:
        return is_healthy(self.plain, timeout_s)

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        lines = self.gateway.metrics().splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])

    def kill(self) -> None:
        """SIGKILL. Data and ports are kept for a restart."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """SIGSTOP: connections stay open, and the kernel accepts new ones, but etcd does not answer."""
        stop_process(self.pid)

    def cont(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        self.kill()
        self.start()

    def wipe(self) -> None:
        """Killed and restarted without its data. The new history begins at revision 1, under the same
        cluster id, which etcd makes from names and addresses.
        """
        self.kill()
        shutil.rmtree(self._data)
        self.start()

    def __enter__(self) -> EtcdProcess:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _command(self) -> list[str]:
        urls = [f"http://{self.plain}"]
        tls_flags = []
        if self._tls:
            urls.append(f"https://{self.client}")
            tls_flags = [
                f"--cert-file={self._tls.cert_file}",
                f"--key-file={self._tls.key_file}",
                "--client-cert-auth",
                f"--trusted-ca-file={self._tls.client_ca_file}",
            ]
        return [
            str(self._binary),
            f"--name={self.name}",
            f"--data-dir={self._data}",
            f"--listen-client-urls={','.join(urls)}",
            f"--advertise-client-urls={self.endpoint}",
            f"--listen-peer-urls=http://{self.peer}",
            f"--initial-advertise-peer-urls=http://{self.peer}",
            f"--initial-cluster={self.name}=http://{self.peer}",
            # A single member need not wait a second for others before it leads.
            "--heartbeat-interval=20",
            "--election-timeout=200",
            "--unsafe-no-fsync",  # data survive a kill of etcd, and the machine does not crash
            "--logger=zap",
            "--log-level=warn",
            "--log-outputs=stderr",
            *tls_flags,
            *self.flags,  # the last one counts
        ]


def stop_process(pid: int) -> None:
    """SIGSTOP; returns once no thread runs: one that is on a CPU goes on until it handles the signal."""
    os.kill(pid, signal.SIGSTOP)

    def states() -> Iterator[str]:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                yield (thread / "stat").read_text().rpartition(")")[2].split()[0]

    eventually(lambda: set(states()) == {"T"})
