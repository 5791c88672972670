"""``peerd supervise``: settings, sockets, the first screen, then the supervisor."""

from __future__ import annotations

import os
import resource
import secrets
import shutil
import socket
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import click

from peerd import __version__, embedded_etcd, registrar, worker
from peerd._scoreboard import Scoreboard, Slot
from peerd.address import Address
from peerd.cli import logs
from peerd.cli.options import HOST_PORT, SECONDS, access_options, etcd_option, prefix_option
from peerd.errors import SettingsError
from peerd.settings import (
    DEFAULT_ENDPOINT,
    DatagramSettings,
    EmbeddedEtcdSettings,
    EtcdAccess,
    RegistrySettings,
    SupervisorSettings,
    default_linger_us,
)
from peerd.supervisor import control
from peerd.supervisor.notify import Notifier
from peerd.supervisor.sockets import bind_all, listen
from peerd.supervisor.supervisor import Supervisor
from peerd.supervisor.surroundings import Entries, Surroundings
from peerd.supervisor.workers import BootReport

# Its socket, the pidfd and, while it starts, the pipe of its report.
DESCRIPTORS_PER_PEER = 3
OTHER_DESCRIPTORS = 128


class BadConfigError(click.ClickException):
    exit_code = 78


def _read_config(ctx: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    """peerd.toml gives defaults: flags and environment variables win."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadConfigError(f"{path}: {error}") from None
    known = {param.name: param for param in ctx.command.params if param.name != "config"}
    for key, value in values.items():
        name = "control_path" if key == "control" else key.replace("-", "_")
        if name not in known:
            options = ", ".join(sorted(str(param.opts[0])[2:] for param in known.values()))
            raise BadConfigError(f"{path}: unknown setting {key!r}; there are: {options}")
        try:
            # As text, so that a file is read by the same rules as a flag: 2.7 is no number of peers.
            checked = known[name].type_cast_value(ctx, str(value))
        except click.BadParameter as error:
            raise BadConfigError(f"{path}: {key}: {error.message}") from None
        ctx.default_map = {**(ctx.default_map or {}), name: checked}
    return path


@click.command()
@click.option("--peers", type=int, default=1, show_default=True, help="How many peers.")
@click.option(
    "--base-port",
    type=int,
    default=5001,
    show_default=True,
    help="Peer i serves UDP port BASE-PORT + i.",
)
@click.option(
    "--host", default="localhost", show_default=True, help="The address to bind; 0.0.0.0 for all."
)
@click.option("--advertise", metavar="HOST", help="The host name in the records, if not --host.")
@click.option("--app", metavar="MODULE:ATTR", help="Your peerd.App. Without it: PING and ECHO.")
@etcd_option(
    default=None,
    help=f"The etcd to register in. Without it: {DEFAULT_ENDPOINT}, and one is started there, with "
    "throw-away data, if nobody listens.",
)
@access_options
@prefix_option
@click.option("--partition-key", metavar="KEY", help="What the records carry as PartitionKey.")
@click.option(
    "--ttl", type=int, default=10, show_default=True, help="Lease of the records, in seconds."
)
@click.option(
    "--control",
    "control_path",
    type=click.Path(path_type=Path),
    envvar="PEERD_CONTROL",
    help="Path of the control socket.  [default: BASE-PORT.sock in the run-time directory]",
)
@click.option(
    "--metrics",
    type=HOST_PORT,
    metavar="HOST:PORT",
    help="Serve /metrics (Prometheus text), /healthz/live and /healthz/ready here, over HTTP, to "
    "whoever reaches it.",
)
@click.option(
    "--offload/--no-offload",
    default=DatagramSettings.offload,
    show_default=True,
    help="Let the kernel join datagrams of one size (UDP_GRO, UDP_SEGMENT).",
)
@click.option(
    "--linger",
    type=int,
    metavar="MICROSECONDS",
    help="Wait for more after a short batch, where it pays: less CPU time, a later answer. 0 for "
    "never.  [default: 0 when each peer has a core, else 50 for each peer on a core, at most 400]",
)
@click.option(
    "--recv-buffer",
    type=int,
    default=SupervisorSettings.recv_buffer_bytes,
    show_default=True,
    help="Kernel receive buffer of each peer, in bytes.",
)
@click.option(
    "--stuck-timeout",
    type=SECONDS,
    default=SupervisorSettings.stuck_timeout_s,
    show_default=True,
    help="Seconds after which a worker whose handler does not return is killed and replaced.",
)
@click.option(
    "--stop-timeout",
    type=SECONDS,
    default=SupervisorSettings.stop_timeout_s,
    show_default=True,
    help="Hard end of a stop, in seconds.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What is logged, on standard error.",
)
@click.option(
    "--log-format",
    type=click.Choice(["auto", "text", "json"]),
    default="auto",
    show_default=True,
    help="auto: text to a terminal, lines of JSON otherwise.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    callback=_read_config,
    envvar="PEERD_CONFIG",
    help="A TOML file with these options: peers = 8.",
)
def supervise(
    peers: int,
    base_port: int,
    host: str,
    advertise: str | None,
    app: str | None,
    etcd: str | None,
    access: EtcdAccess,
    prefix: str,
    partition_key: str | None,
    ttl: int,
    control_path: Path | None,
    metrics: Address | None,
    offload: bool,
    linger: int | None,
    recv_buffer: int,
    stuck_timeout: float,
    stop_timeout: float,
    log_level: str,
    log_format: str,
    config: Path | None,
) -> None:
    """Run peers: one worker process for each UDP port, restarted when it dies, registered in etcd.

    SIGTERM or Ctrl-C stops in order: the records are revoked, the queues served, then it exits. A
    second one stops at once. Exit code 0 after SIGTERM, 130 after Ctrl-C. SIGHUP is peerd reload.

    \b
    Example: an app of your own on four ports, in an etcd of your own
      peerd supervise --peers 4 --base-port 6001 --app chat:app --etcd http://etcd.example:2379
    """
    settings = SupervisorSettings(
        peers=peers,
        base_port=base_port,
        host=host,
        advertise=advertise,
        app=app,
        partition_key=partition_key,
        registry=RegistrySettings(
            endpoint=etcd or DEFAULT_ENDPOINT, access=access, prefix=prefix, lease_ttl_s=ttl
        ),
        datagrams=DatagramSettings(
            offload=offload,
            linger_us=default_linger_us(peers, len(os.sched_getaffinity(0)))
            if linger is None
            else linger,
        ),
        recv_buffer_bytes=recv_buffer,
        stuck_timeout_s=stuck_timeout,
        stop_timeout_s=stop_timeout,
        metrics=metrics,
    )
    log_dropped = logs.configure(log_level, log_format)
    _raise_descriptor_limit(peers)
    sockets = bind_all(
        settings.host, settings.base_port, settings.peers, settings.recv_buffer_bytes
    )
    metrics_socket = listen(metrics, "--metrics") if metrics else None
    own_etcd = _own_etcd() if etcd is None else None
    path = control_path or control.default_path(settings.base_port)
    _print_first_screen(settings, own_etcd, path)
    supervisor = Supervisor(
        settings,
        Entries(worker=_worker_entry(settings), registrar=_registrar_entry(settings, own_etcd)),
        Surroundings(
            sockets=sockets,
            control_path=path,
            metrics_socket=metrics_socket,
            etcd=own_etcd,
            notifier=Notifier.from_environment(),
            version=__version__,
            log_dropped=log_dropped,
        ),
    )
    try:
        code = supervisor.run()
    finally:
        _discard(own_etcd)
    sys.exit(code)


def _raise_descriptor_limit(peers: int) -> None:
    """Up to the hard limit: the soft one is low for the sake of select(), which nobody uses here."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = DESCRIPTORS_PER_PEER * peers + OTHER_DESCRIPTORS
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SettingsError(
            f"--peers {peers} needs {needed} open files, and the limit is {hard}: "
            "raise it (ulimit -Hn), or run fewer"
        )


def _own_etcd() -> EmbeddedEtcdSettings | None:
    """An etcd at the default endpoint, if nobody is there and a binary is."""
    if embedded_etcd.is_listening(DEFAULT_ENDPOINT):
        return None
    binary = embedded_etcd.find_etcd()
    if binary is None:
        click.echo(
            f"peerd: nobody listens at {DEFAULT_ENDPOINT}; the peers serve, and are registered "
            f"once somebody does. {embedded_etcd.HOW_TO_GET_ETCD}",
            err=True,
        )
        return None
    # Only named here: etcd's own process makes it, when there is somebody who will remove it.
    directory = Path(tempfile.gettempdir(), f"peerd-etcd-{secrets.token_hex(8)}")
    command = embedded_etcd.command(binary, DEFAULT_ENDPOINT, directory)
    return EmbeddedEtcdSettings(tuple(command), directory)


def _print_first_screen(
    settings: SupervisorSettings, own_etcd: EmbeddedEtcdSettings | None, control_path: Path
) -> None:
    pid = os.getpid()
    registry = settings.registry
    ports = f"UDP port {settings.base_port}"
    if settings.peers > 1:
        ports = f"UDP ports {settings.base_port} to {settings.last_port}"
    started = ", started here with throw-away data" if own_etcd else ""
    metrics = f"  metrics   http://{settings.metrics}/metrics\n" if settings.metrics else ""
    peers = "1 peer" if settings.peers == 1 else f"{settings.peers} peers"
    click.echo(
        f"peerd {__version__}, supervisor pid {pid}: {peers} on {settings.host}, {ports}\n"
        f"  app       {settings.app or 'built in: answers PING and ECHO'}\n"
        f"  registry  etcd at {registry.endpoint}{started}, keys {registry.prefix}/{settings.peer_id(0)}\n"
        f"  control   {control_path} (peerd status)\n"
        f"{metrics}"
        f"  stop      Ctrl-C, peerd stop, or kill {pid}; peerd reload loads the app anew"
    )


def _worker_entry(settings: SupervisorSettings) -> Any:
    def run_worker(index: int, sock: socket.socket, slot: Slot, report: BootReport) -> int:

        def count_dropped(number: int) -> None:
            slot.log_dropped += number

        logs.become_worker(count_dropped)
        return worker.run(
            worker.WorkerSettings(
                peer_id=settings.peer_id(index),
                app=settings.app,
                datagrams=settings.datagrams,
                drain_timeout_s=settings.drain_timeout_s,
            ),
            sock,
            slot,
            report,
        )

    return run_worker


def _registrar_entry(settings: SupervisorSettings, own_etcd: EmbeddedEtcdSettings | None) -> Any:
    supervisor_pid = os.getpid()

    def run_registrar(board: Scoreboard, lifeline_fd: int, report_fd: int) -> int:
        logs.name_process("registrar")
        code = registrar.run(settings, board, lifeline_fd, report_fd)
        if os.getppid() != supervisor_pid:
            # Killed, so it cannot clean up; etcd was killed with it.
            _discard(own_etcd)
        return code

    return run_registrar


def _discard(own_etcd: EmbeddedEtcdSettings | None) -> None:
    if own_etcd is not None:
        shutil.rmtree(own_etcd.data_dir, ignore_errors=True)
