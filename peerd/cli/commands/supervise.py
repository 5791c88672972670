"""``peerd supervise``: settings, sockets, the first screen, then the supervisor."""

from __future__ import annotations

import logging
import os
import resource
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
from peerd.cli.wording import counted, ports
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

    SIGTERM or Ctrl-C stops in order: the records are revoked, the queues served, then it exits. A
    second one stops at once. Exit code 0 after SIGTERM, 130 after Ctrl-C. SIGHUP is peerd reload.

    Each option can also come from the environment, as PEERD_SUPERVISE_BASE_PORT or PEERD_BASE_PORT,
    or from a file: --config peerd.toml, base-port = 6001. 'peerd check' takes the same options, tries
    everything and says what would run.

    \b
    Example: an app of your own on four ports, in an etcd of your own
      peerd supervise --peers 4 --base-port 6001 --app chat:app --etcd http://etcd.example:2379
    """
    # Here, as below, so that --help does without.
    from peerd.supervisor.sockets import listen
    from peerd.supervisor.supervisor import Supervisor

    if settings.app is not None:
        import orjson  # noqa: F401 - an app may use Message.json(), and forked workers share it
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
    """One a peer. What systemd has kept of an earlier run is used; what has no peer any more is dropped."""
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
    """Up to the hard limit: the soft one is low for the sake of select(), which nobody uses here."""
    from peerd.supervisor.scaler import DESCRIPTORS_PER_PEER, OTHER_DESCRIPTORS

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = DESCRIPTORS_PER_PEER * peers + OTHER_DESCRIPTORS
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SettingsError(
            f"--peers {peers} needs {needed} open files, and the limit is {hard}: "
            "raise it (ulimit -Hn), or run fewer",
            "peers",
        )


def _own_etcd() -> EmbeddedEtcdSettings | None:
    """An etcd at the default endpoint, if nobody is there and a binary is."""
    # What it takes to run an etcd, only where it may have to: the workers wait for all that is imported.
    import tempfile

    from peerd.registry import embedded_etcd

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
    directory = Path(tempfile.gettempdir(), f"peerd-etcd-{os.urandom(8).hex()}")
    command = embedded_etcd.command(binary, DEFAULT_ENDPOINT, directory)
    return EmbeddedEtcdSettings(tuple(command), directory)


def _print_first_screen(
    settings: SupervisorSettings, own_etcd: EmbeddedEtcdSettings | None, control_path: Path
) -> None:
    pid = os.getpid()
    registry = settings.registry
    started = ", started here with throw-away data" if own_etcd else ""
    metrics = f"  metrics   http://{settings.metrics}/metrics\n" if settings.metrics else ""
    peers = counted(settings.peers, "peer")
    click.echo(
        f"peerd {__version__}, supervisor pid {pid}: {peers} on {settings.host}, "
        f"{ports(settings)}\n"
        f"  app       {settings.app or 'built in: answers PING and ECHO'}\n"
        f"  registry  etcd at {registry.endpoint}{started}, keys {registry.prefix}/{settings.peer_id(0)}\n"
        f"  control   {control_path} (peerd status)\n"
        f"{metrics}"
        f"  stop      Ctrl-C, peerd stop, or kill {pid}; peerd reload loads the app anew"
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
        def at_end() -> None:
            if os.getppid() != supervisor_pid:
                # Killed, so it cannot clean up; etcd was killed with it.
                _discard(own_etcd)

        logging_setup.name_process("registrar")
        return registrar.run(settings, board, lifeline_fd, report_fd, at_end)

    return run_registrar


def _discard(own_etcd: EmbeddedEtcdSettings | None) -> None:
    if own_etcd is None:
        return
    import shutil

    # Again while an etcd that was killed a moment ago still writes.
    for _ in range(DISCARD_TRIES):
        shutil.rmtree(own_etcd.data_dir, ignore_errors=True)
        if not own_etcd.data_dir.exists():
            return
        time.sleep(0.01)
