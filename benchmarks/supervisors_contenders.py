"""The supervisors that are compared: how each is told to run peers, and a run of one.

All get the same: so many peers, a process and a UDP port each, to be restarted whenever they die. What
that does not need is left at its documented default. Their control sockets are Unix sockets, as
circus's default ports may be in use.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from children import BenchmarkError
from supervisors_guard import end_all_in, processes_in

HERE = Path(__file__).parent
ECHO = HERE / "supervisors_peer.py"
ECHO_APP = HERE / "supervisors_app.py"
MORTAL = HERE / "supervisors_mortal.py"

STOP_LIMIT_S = 5.0

_ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
"""Who has to compile each time starts in twice the time, and with more memory."""

FIRST_PORT = 10_000


@dataclass(frozen=True)
class Environment:
    """Where supervisord and circus are installed. Their peers run on its Python."""

    python: Path
    scripts: Path

    def has(self, program: str) -> bool:
        return (self.scripts / program).is_file()


@dataclass(frozen=True)
class Order:
    """What a supervisor is asked to run, and where."""

    folder: Path
    ports: Sequence[int]
    """One after the other."""

    plain: Path
    """The program of a peer, which gets its port."""

    app: Path | None
    """The same as a peerd app; None: the built-in one."""

    etcd: str
    environment: Environment


@dataclass(frozen=True)
class Contender:
    name: str
    package: str
    program: str
    command: Callable[[Order], list[str]]
    """Also writes what the command is to read into the folder of the order."""


def environment(folder: Path | None) -> Environment:
    """Of a virtual environment; None: the one that runs this."""
    if folder is None:
        return Environment(Path(sys.executable), Path(sysconfig.get_path("scripts")))
    return Environment(folder / "bin" / "python", folder / "bin")


@cache
def version_in(where: Environment, package: str) -> str:
    command = [
        str(where.python),
        "-c",
        f"import importlib.metadata as m; print(m.version({package!r}))",
    ]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode().strip()


def _peerd(order: Order) -> list[str]:
    app = []
    if order.app is not None:
        # A supervisor is asked for a module of the directory in which it runs.
        (order.folder / order.app.name).symlink_to(order.app)
        app = ["--app", f"{order.app.stem}:app"]
    return [
        *(str(environment(None).scripts / "peerd"), "supervise", "--host", "127.0.0.1"),
        *("--peers", str(len(order.ports)), "--base-port", str(order.ports[0])),
        *("--etcd", order.etcd, "--prefix", order.folder.name),
        *("--control", str(order.folder / "peerd.sock")),
        *app,
    ]


def _supervisord(order: Order) -> list[str]:
    file = order.folder / "supervisord.conf"
    file.write_text(f"""\
[supervisord]
nodaemon = true
childlogdir = {order.folder}
[unix_http_server]
file = {order.folder}/supervisor.sock
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[program:peer]
command = {order.environment.python} {order.plain} %(process_num)d
process_name = %(process_num)d
numprocs = {len(order.ports)}
numprocs_start = {order.ports[0]}
autorestart = true
""")
    return [str(order.environment.scripts / "supervisord"), "-c", str(file)]


def _circus(order: Order) -> list[str]:
    # A watcher for each, which starts no slower than numprocesses with $(circus.wid).
    file = order.folder / "circus.ini"
    file.write_text(
        f"[circus]\nendpoint = ipc://{order.folder}/endpoint\n"
        f"pubsub_endpoint = ipc://{order.folder}/pubsub\n"
        + "".join(
            f"[watcher:{port}]\ncmd = {order.environment.python} {order.plain} {port}\n"
            for port in order.ports
        )
    )
    return [str(order.environment.scripts / "circusd"), str(file)]


PEERD = Contender("peerd", "peerd", "peerd", _peerd)
SUPERVISORD = Contender("supervisord", "supervisor", "supervisord", _supervisord)
CIRCUS = Contender("circus", "circus", "circusd", _circus)
CONTENDERS = {contender.name: contender for contender in (PEERD, SUPERVISORD, CIRCUS)}


class Run:
    """A supervisor that was started, and its peers."""

    def __init__(self, process: subprocess.Popen[bytes], order: Order, began_ns: int) -> None:
        self.began_ns = began_ns
        """When the command was given, on the monotonic clock."""

        self.ports = order.ports
        self.folder = order.folder
        self._process = process

    def kill(self) -> None:
        """SIGKILL to the supervisor alone."""
        self._process.kill()
        self._process.wait()

    def alive(self) -> int:
        """Processes of this run, whoever their parent is by now."""
        return len(processes_in(self.folder))

    def tree(self) -> list[psutil.Process]:
        """The supervisor first."""
        supervisor = psutil.Process(self._process.pid)
        return [supervisor, *supervisor.children(recursive=True)]

    def last_words(self) -> str:
        text = (self.folder / "output").read_text(errors="replace").strip()
        return text.rpartition("\n")[2] or "nothing"


@contextlib.contextmanager
def started(contender: Contender, order: Order) -> Iterator[Run]:
    """Nothing of it is left when the block is left, in whichever way."""
    order.folder.mkdir()
    command = contender.command(order)
    with (order.folder / "output").open("wb") as output:
        began_ns = time.monotonic_ns()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=order.folder,  # by which supervisors_guard.py knows the processes of this run
            env=_ENVIRONMENT,
            process_group=0,
        )
    try:
        yield Run(process, order, began_ns)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_LIMIT_S)
    finally:
        # The supervisor first, so that it does not start others meanwhile.
        process.kill()
        process.wait()
        end_all_in(order.folder)


def free_ports(count: int) -> range:
    """UDP ports of loopback in a row, below those that the kernel hands out."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if low - count < FIRST_PORT:
        raise BenchmarkError(f"the ephemeral ports begin at {low}: no room for {count} below")
    while True:
        first = random.randrange(FIRST_PORT, low - count)
        ports = range(first, first + count)
        with contextlib.ExitStack() as stack:
            try:
                for port in ports:
                    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                    sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        return ports
