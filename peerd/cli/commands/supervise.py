"""``peerd supervise``: opens the sockets, prints what runs, and starts the supervisor."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import click

from peerd import __version__
from peerd._scoreboard import Scoreboard, Slot
from peerd.cli import logging_setup
from peerd.cli.setting_options import LaunchOptions, SupervisorCommand, supervisor_options
from peerd.cli.text_output import counted
from peerd.errors import SettingsError
from peerd.registry import registrar
from peerd.serving import worker
from peerd.settings import DEFAULT_ENDPOINT, MAX_PEERS, EmbeddedEtcdSettings, SupervisorSettings
from peerd.supervisor import pinning
from peerd.supervisor.cgroup import cpu_quota
from peerd.supervisor.notify import Notifier, socket_name
from peerd.supervisor.resources import ChildEntryPoints, Resources
from peerd.supervisor.worker_process import BootPipes

log = logging.getLogger(__name__)

DISCARD_TRIES = 50


@click.command(cls=SupervisorCommand)
@supervisor_options
@click.pass_context
def supervise(ctx: click.Context, settings: SupervisorSettings, launch: LaunchOptions) -> None:
    """Run peers: one worker process for each UDP port, restarted when it dies, registered in etcd.

    SIGTERM or Ctrl-C stops the supervisor gracefully: it revokes the records, serves the queues, and exits.
    A second signal stops it without serving the queues, a third kills what is left. SIGHUP does what
    'peerd reload' does.

    Each option can also be an environment variable (PEERD_SUPERVISE_BASE_PORT or PEERD_BASE_PORT), or a key
    in the file that --config names (base-port = 6001). Flags win over variables, variables over the file.
    'peerd check' takes the same options and validates them.

    \b
    Example: an app of your own on four ports
      peerd supervise --peers 4 --base-port 6001 --app chat:app --etcd http://etcd.example:2379

    \b
    Exit codes:
      0    SIGTERM or 'peerd stop'
      2    bad option
      70   a worker died too often (with --on-crashloop exit)
      73   a port cannot be bound
      78   bad file, or the app cannot be loaded
      130  Ctrl-C
    """
    # Imported here so that --help stays quick. Ctrl-C has its default effect meanwhile: a KeyboardInterrupt
    # while orjson is imported crashes the process.
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from peerd.supervisor.sockets import listen
    from peerd.supervisor.supervisor import Supervisor

    if settings.app is not None:
        import orjson  # noqa: F401 - Message.json() needs it, and forked workers share its memory
    signal.signal(signal.SIGINT, on_interrupt)
    log_dropped = logging_setup.configure(launch.log_level, launch.log_format)
    assert isinstance(ctx.command, SupervisorCommand)
    for line in ctx.command.misspelt_variables():
        log.warning("%s", line)
    raise_descriptor_limit(settings.peers)
    notifier = Notifier.from_environment()
    sockets = _open_sockets(settings, notifier)
    metrics_socket = listen(settings.metrics, "--metrics") if settings.metrics else None
    own_etcd = None if launch.etcd_is_named else _own_etcd()
    _print_first_screen(settings, own_etcd, launch.control_path)
    supervisor = Supervisor(
        settings,
        ChildEntryPoints(
            worker=_worker_entry(settings), registrar=_registrar_entry(settings, own_etcd)
        ),
        Resources(
            sockets=sockets,
            control_path=launch.control_path,
            metrics_socket=metrics_socket,
            etcd=own_etcd,
            notifier=notifier,
            version=__version__,
            log_dropped=log_dropped,
        ),
    )
    try:
        code = supervisor.run()
    finally:
        _discard(own_etcd)
    sys.exit(code)


def _open_sockets(settings: SupervisorSettings, notifier: Notifier) -> list[socket.socket]:
    """One per peer. Those that systemd kept from an earlier run are reused, or closed if not needed."""
    from peerd.supervisor.sockets import bind_all, inherited_sockets

    inherited = inherited_sockets(settings.host)
    sockets = bind_all(
        settings.host, settings.base_port, settings.peers, settings.recv_buffer_bytes, inherited
    )
    for port, sock in inherited.items():
        notifier.discard(socket_name(port))
        sock.close()
    return sockets


def raise_descriptor_limit(peers: int) -> None:
    """To the hard limit. The soft one is low because of select(), which peerd does not use."""
    from peerd.supervisor.scaler import DESCRIPTORS_PER_PEER, OTHER_DESCRIPTORS

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = DESCRIPTORS_PER_PEER * peers + OTHER_DESCRIPTORS
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SettingsError(
            f"--peers {peers} needs {needed} open files, and the limit is {hard}: "
            "raise it (ulimit -Hn), or run fewer peers",
            "peers",
        )


def _own_etcd() -> EmbeddedEtcdSettings | None:
    """An etcd to run at the default endpoint; None if something listens there, or if no etcd is installed."""
    # Imported only when needed: the start of the workers waits for every import.
    import tempfile

    from peerd.registry import embedded_etcd

    if embedded_etcd.is_listening(DEFAULT_ENDPOINT):
        return None
    binary = embedded_etcd.find_etcd()
    if binary is None:
        click.echo(
            f"peerd: no etcd listens at {DEFAULT_ENDPOINT}; the peers serve, and will be registered "
            f"once one does. {embedded_etcd.HOW_TO_GET_ETCD}",
            err=True,
        )
        return None
    # Created by the process that runs etcd, when a process that will remove it exists.
    directory = Path(tempfile.gettempdir(), f"peerd-etcd-{os.urandom(8).hex()}")
    command = embedded_etcd.command(binary, DEFAULT_ENDPOINT, directory)
    return EmbeddedEtcdSettings(tuple(command), directory)


def _print_first_screen(
    settings: SupervisorSettings, own_etcd: EmbeddedEtcdSettings | None, control_path: Path
) -> None:
    pid = os.getpid()
    registry = settings.registry
    started = ", started by peerd with throw-away data" if own_etcd else ""
    metrics = f"  metrics   http://{settings.metrics}/metrics\n" if settings.metrics else ""
    peers = counted(settings.peers, "peer")
    click.echo(
        f"peerd {__version__}, supervisor pid {pid}: {peers} on {settings.host}, "
        f"{settings.port_range}\n"
        f"  app       {settings.app or 'built-in: answers PING and ECHO'}\n"
        f"  registry  etcd at {registry.endpoint}{started}, keys {registry.prefix}/{settings.peer_id(0)}\n"
        f"  control   {control_path} (peerd status)\n"
        f"{metrics}"
        f"  stop      Ctrl-C, peerd stop, or kill {pid}; peerd reload loads the app again"
    )


def _worker_entry(settings: SupervisorSettings) -> Any:
    cpus = (
        pinning.plan(pinning.usable_cpus(), cpu_quota(), MAX_PEERS)
        if settings.pin == "auto"
        else ()
    )

    def run_worker(index: int, sock: socket.socket, slot: Slot, report: BootPipes) -> int:
        logging_setup.become_worker(slot.add_log_dropped)
        if cpus:
            os.sched_setaffinity(0, {cpus[index]})
        worker_settings = worker.WorkerSettings(
            peer_id=settings.peer_id(index),
            app=settings.app,
            datagrams=settings.datagrams,
            drain_timeout_s=settings.drain_timeout_s,
        )
        return worker.run(worker_settings, sock, slot, report)

    return run_worker


def _registrar_entry(settings: SupervisorSettings, own_etcd: EmbeddedEtcdSettings | None) -> Any:
    supervisor_pid = os.getpid()

    def run_registrar(board: Scoreboard, lifeline_fd: int, report_fd: int) -> int:
        def at_end() -> None:
            if os.getppid() != supervisor_pid:
                # The supervisor was killed and cannot clean up; etcd died with it.
                _discard(own_etcd)

        logging_setup.name_process("registrar")
        return registrar.run(settings, board, lifeline_fd, report_fd, at_end)

    return run_registrar


def _discard(own_etcd: EmbeddedEtcdSettings | None) -> None:
    if own_etcd is None:
        return
    import shutil

    # An etcd that was killed a moment ago may still be writing.
    for _ in range(DISCARD_TRIES):
        shutil.rmtree(own_etcd.data_dir, ignore_errors=True)
        if not own_etcd.data_dir.exists():
            return
        time.sleep(0.01)
