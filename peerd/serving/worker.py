"""One peer: an adopted socket, a DatagramLoop, the App and a slot of the scoreboard -> an exit code.

A worker runs in its own process, forked by the supervisor. The supervisor owns the socket; it observes
the worker through the slot, the boot report and the exit code.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import traceback
from dataclasses import dataclass, field
from typing import Protocol

from setproctitle import setproctitle

from peerd._loop import DatagramLoop
from peerd._scoreboard import Slot
from peerd.errors import AppLoadError
from peerd.linux import is_kernel_with_broken_gso, is_kernel_without_gro
from peerd.serving.app import App, load_app
from peerd.serving.loop_logs import DroppedReplyLog, HandlerErrorLog, IcmpErrorLog
from peerd.settings import DatagramSettings
from peerd.signals import DUMP_STACK, HAND_OVER

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    peer_id: str
    app: str | None = None
    datagrams: DatagramSettings = field(default_factory=DatagramSettings)
    drain_timeout_s: float = 1.0


class BootReport(Protocol):
    """A worker's messages to the supervisor while it starts."""

    def prepared(self) -> None:
        """The app is loaded. Returns once the predecessor, if any, has left the socket."""

    def ready(self) -> None: ...

    def failed(self, text: str) -> None: ...


def run(settings: WorkerSettings, sock: socket.socket, slot: Slot, report: BootReport) -> int:
    """Serve until SIGTERM and drain, or until HAND_OVER and leave the queue to a successor.

    Returns os.EX_CONFIG when the app cannot be loaded.
    """
    setproctitle(f"peerd: peer {settings.peer_id}")
    # Ctrl-C reaches every process of the terminal; the supervisor alone acts on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()  # writes the Python stack when C code crashes
    faulthandler.register(DUMP_STACK)  # before the import of the app, which may block
    try:
        app = load_app(settings.app)
    except AppLoadError as error:
        report.failed(_explain(error))
        return os.EX_CONFIG
    report.prepared()
    # Not earlier: the loop writes to the slot, as a predecessor does until its end.
    loop = make_loop(app, sock.fileno(), slot, settings.datagrams)
    try:
        _serve(loop, app, report, settings.drain_timeout_s)
    except SystemExit:
        log.critical("a handler has called sys.exit", exc_info=True)
        raise
    return os.EX_OK


def _serve(loop: DatagramLoop, app: App, report: BootReport, drain_timeout_s: float) -> None:
    if app.coroutine_handlers:
        # Only an app that has coroutine handlers pays for asyncio.
        from peerd.serving import async_server

        async_server.run(loop, report.ready, drain_timeout_s, app.timeouts_s)
        return
    signal.signal(signal.SIGTERM, lambda *_: loop.stop(drain_timeout_s))
    signal.signal(HAND_OVER, lambda *_: loop.stop(drain_timeout_s, hand_over=True))
    signal.set_wakeup_fd(loop.wakeup_fd, warn_on_full_buffer=False)
    loop.turn()
    report.ready()
    loop.run()


def make_loop(
    app: App, fd: int, slot: Slot, settings: DatagramSettings, about: str = ""
) -> DatagramLoop:
    """The datagram loop of a peer; the lines of its logs begin with ``about``."""
    return DatagramLoop(
        fd,
        app.handlers,
        app.batch_handlers,
        slot,
        HandlerErrorLog(about),
        coroutine_handlers=app.coroutine_handlers,
        max_waiting=app.max_waiting,
        on_icmp_error=IcmpErrorLog(about) if log.isEnabledFor(logging.DEBUG) else None,
        on_replies_dropped=DroppedReplyLog(about),
        gro=settings.offload and not is_kernel_without_gro(),
        gso=settings.offload and not is_kernel_with_broken_gso(),
        linger_s=settings.linger_us / 1e6,
        max_reply_rate=settings.max_reply_rate,
    )


def _explain(error: AppLoadError) -> str:
    """One line, then the traceback of the error that the app itself raised."""
    if error.__cause__ is None:
        return str(error)
    return f"{error}\n{''.join(traceback.format_exception(error.__cause__))}".rstrip()
