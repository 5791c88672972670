"""The supervisors that are compared, how each is configured, and a run of one.

All run the same number of peers, each a process with a UDP port, and restart them when they die. Every
other setting has its documented default. The control sockets are Unix sockets, because circus's default
ports may be in use.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from contenders.guard import kill_all_in, processes_in

HERE = Path(__file__).parent
ECHO = HERE / "plain_peer.py"
ECHO_APP = HERE / "peerd_peer.py"
MORTAL = HERE / "mortal_peer.py"

STOP_TIMEOUT_S = 5.0

_ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
"""Compiling at every start would take twice the time, and more memory."""


@dataclass(frozen=True)
class Environment:
    """The environment of supervisord and circus. Their peers run on its Python."""

    python: Path
    scripts: Path

    def has(self, program: str) -> bool:
        return (self.scripts / program).is_file()


@dataclass(frozen=True)
class Order:
    folder: Path
    ports: Sequence[int]  # Consecutive
    plain: Path  # The program of a peer, whose argument is its port
    app: Path | None  # The same as a peerd app; None: the built-in app
    etcd: str
    environment: Environment


@dataclass(frozen=True)
class Contender:
    name: str
    package: str
    program: str
    command: Callable[[Order], list[str]]
    """Returns the command line, after writing its configuration into the folder of the order."""

    def executable(self, others: Environment) -> Path:
        """peerd's is that of this program's environment."""
        where = environment(None) if self.package == "peerd" else others
        return where.scripts / self.program


def environment(folder: Path | None) -> Environment:
    """Of a virtual environment; None: the one that runs this program."""
    if folder is None:
        return Environment(Path(sys.executable), Path(sysconfig.get_path("scripts")))
    return Environment(folder / "bin" / "python", folder / "bin")


def installed_version(where: Environment, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.check_output([where.python, "-c", code], text=True).strip()


def _peerd(order: Order) -> list[str]:
    app = []
    if order.app is not None:
        # The app has to be a module in the directory in which the supervisor runs.
        (order.folder / order.app.name).symlink_to(order.app)
        app = ["--app", f"{order.app.stem}:app"]
    return [
        *(str(PEERD.executable(order.environment)), "supervise", "--host", "127.0.0.1"),
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
    return [str(SUPERVISORD.executable(order.environment)), "-c", str(file)]


def _circus(order: Order) -> list[str]:
    # One watcher per peer, which starts as fast as numprocesses with $(circus.wid).
    file = order.folder / "circus.ini"
    file.write_text(
        f"[circus]\nendpoint = ipc://{order.folder}/endpoint\n"
        f"pubsub_endpoint = ipc://{order.folder}/pubsub\n"
        + "".join(
            f"[watcher:{port}]\ncmd = {order.environment.python} {order.plain} {port}\n"
            for port in order.ports
        )
    )
    return [str(CIRCUS.executable(order.environment)), str(file)]


PEERD = Contender("peerd", "peerd", "peerd", _peerd)
SUPERVISORD = Contender("supervisord", "supervisor", "supervisord", _supervisord)
CIRCUS = Contender("circus", "circus", "circusd", _circus)
CONTENDERS = {contender.name: contender for contender in (PEERD, SUPERVISORD, CIRCUS)}


class Run:
    def __init__(self, process: subprocess.Popen[bytes], order: Order, began_ns: int) -> None:
        self.began_ns = began_ns  # Monotonic time of the command
        self.ports = order.ports
        self.folder = order.folder
        self._process = process

    def kill(self) -> None:
        """SIGKILL to the supervisor alone."""
        self._process.kill()
        self._process.wait()

    def alive(self) -> int:
        """The number of processes of this run, orphans included."""
        return len(processes_in(self.folder))

    def tree(self) -> list[psutil.Process]:
        """The supervisor first."""
        supervisor = psutil.Process(self._process.pid)
        return [supervisor, *supervisor.children(recursive=True)]

    def last_words(self) -> str:
        text = (self.folder / "output").read_text(errors="replace").strip()
        return text.rpartition("\n")[2] or "none"


@contextlib.contextmanager
def started(contender: Contender, order: Order) -> Iterator[Run]:
    """The supervisor and all of its processes are gone after the block."""
    order.folder.mkdir()
    command = contender.command(order)
    with (order.folder / "output").open("wb") as output:
        began_ns = time.monotonic_ns()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=order.folder,  # by which guard.py recognizes the processes of this run
            env=_ENVIRONMENT,
            process_group=0,
        )
    try:
        yield Run(process, order, began_ns)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    finally:
        # The supervisor first, so that it starts no other processes meanwhile.
        process.kill()
        process.wait()
        kill_all_in(order.folder)
