"""The children beside the workers: the registrar and, optionally, an embedded etcd.

Both are restarted when they end, as restart.py says, and never parked: a registrar is back before the leases
that its predecessor kept alive run out.

Instead of a death signal, the registrar has a lifeline, the pipe that also wakes it: it outlives the
supervisor for the time that it takes to revoke the records.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable

from peerd._scoreboard import RegistryState, Scoreboard
from peerd.settings import EmbeddedEtcdSettings, RegistrySettings
from peerd.supervisor import events
from peerd.supervisor.journal import Journal
from peerd.supervisor.loop import Loop
from peerd.supervisor.processes import Child, ChildPipes, Exit, redirect_output, spawn
from peerd.supervisor.restart import RestartPolicy, RestartSchedule

log = logging.getLogger(__name__)

LOG_END_BYTES = 8 * 1024

RegistrarEntry = Callable[[Scoreboard, int, int], int]
"""(scoreboard, lifeline, report) -> exit code; runs in the registrar.

The registrar reads the lifeline: a byte means that a slot has changed, the end of file that the supervisor
is gone. It writes a byte to the report when a registration has changed.
"""


class _RestartedService(abc.ABC):
    """A child that is restarted whenever it ends, until that is disabled."""

    name: str

    def __init__(self, loop: Loop, journal: Journal, max_delay_s: float) -> None:
        self._loop = loop
        self._journal = journal
        self._child: Child | None = None
        policy = RestartPolicy(max_failures=sys.maxsize, max_delay_s=max_delay_s)
        self._restarts = RestartSchedule(loop, policy, self.start)
        self._started_s = 0.0
        self._is_restarted = True

    @property
    def is_running(self) -> bool:
        return self._child is not None

    def start(self) -> None:
        self._restarts.cancel()
        self._started_s = time.monotonic()
        try:
            child = self._child = self._spawn()
        except OSError as error:
            self._journal.publish(events.CannotFork(what=self.name, why=str(error)))
            log.error("cannot start the %s: %s", self.name, error)
            self._restart()
            return
        self._loop.watch(child.pidfd, lambda: self._on_exit(child))

    def kill(self) -> None:
        if self._child is not None:
            self._child.send(signal.SIGKILL)

    def disable_restart(self) -> None:
        self._is_restarted = False
        self._restarts.cancel()

    def release(self) -> None:
        """End it, at the end of the supervisor."""
        self.disable_restart()
        if self._child is not None:
            self.kill()
            self._child.wait()

    def _on_exit(self, child: Child) -> None:
        self._loop.unwatch(child.pidfd)
        end = child.wait()
        self._child = None
        self._on_ended(child.pid, end)
        if not self._is_restarted:
            self._journal.publish(events.ServiceEnded(what=self.name))

    def _restart(self) -> None:
        restart = self._restarts.after_failure(time.monotonic() - self._started_s)
        self._restarts.arm()
        when = f"in {restart.delay_s:.2g} s" if restart.delay_s else "now"
        log.info("restarting the %s %s", self.name, when)

    @abc.abstractmethod
    def _spawn(self) -> Child: ...
    @abc.abstractmethod
    def _on_ended(self, pid: int, end: Exit) -> None: ...


class RegistrarService(_RestartedService):
    name = "registrar"

    def __init__(
        self,
        loop: Loop,
        journal: Journal,
        entry: RegistrarEntry,
        board: Scoreboard,
        settings: RegistrySettings,
    ) -> None:
        super().__init__(loop, journal, settings.lease_ttl_s / 4)
        self._entry = entry
        self._board = board
        self._lifeline_fd: int | None = None
        self._report_fd: int | None = None
        journal.subscribe(events.SlotChanged, lambda _: self._wake())

    def _wake(self) -> None:
        if self._lifeline_fd is not None:
            # Full: it has not read the last wake-ups yet. Broken: its end is about to be noticed.
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(self._lifeline_fd, b"\n")

    def cut_lifeline(self) -> None:
        """It revokes the remaining records, and exits within a second."""
        self.disable_restart()
        self._close_lifeline()

    def release(self) -> None:
        self.cut_lifeline()
        if self._child is not None:
            self._child.wait()
        self._close_report()

    def _spawn(self) -> Child:
        with ChildPipes() as pipes:
            read_lifeline_fd, lifeline_fd = pipes.to_child()
            report_fd, read_report_fd = pipes.from_child()
            os.set_blocking(lifeline_fd, False)
            os.set_blocking(read_report_fd, False)
            fds = (read_lifeline_fd, report_fd)
            child = spawn(lambda: self._entry(self._board, *fds), fds, die_with_parent=False)
            pipes.keep()
        self._lifeline_fd, self._report_fd = lifeline_fd, read_report_fd
        self._loop.watch(read_report_fd, self._read_report)
        return child

    def _read_report(self) -> None:
        assert self._report_fd is not None
        if not os.read(self._report_fd, 4096):
            self._close_report()
        self._journal.publish(events.RecordsChanged())

    def _on_ended(self, pid: int, end: Exit) -> None:
        self._close_lifeline()
        self._close_report()
        self._board.registry_state = RegistryState.SUSPENDED
        if self._is_restarted:
            self._journal.publish(events.ServiceDied(what=self.name, pid=pid, how=str(end)))
            log.error("the registrar, pid %d: %s", pid, end)
            self._restart()

    def _close_lifeline(self) -> None:
        if self._lifeline_fd is not None:
            os.close(self._lifeline_fd)
            self._lifeline_fd = None

    def _close_report(self) -> None:
        if self._report_fd is not None:
            self._loop.unwatch(self._report_fd)
            os.close(self._report_fd)
            self._report_fd = None


class EtcdService(_RestartedService):
    name = "etcd"

    def __init__(
        self, loop: Loop, journal: Journal, settings: EmbeddedEtcdSettings, endpoint: str
    ) -> None:
        super().__init__(loop, journal, max_delay_s=5.0)
        self._settings = settings
        self._endpoint = endpoint

    def _spawn(self) -> Child:
        command, data_dir = self._settings.command, self._settings.data_dir

        def run_etcd() -> int:
            os.makedirs(data_dir, mode=0o700, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            redirect_output(os.open(data_dir / "etcd.log", flags, 0o600))
            os.execv(command[0], command)

        return spawn(run_etcd, (), die_with_parent=True)

    def _on_ended(self, pid: int, end: Exit) -> None:
        if not self._is_restarted:
            return
        # Not at the top: it imports all that it takes to run an etcd.
        from peerd.registry.embedded_etcd import is_listening

        if is_listening(self._endpoint):
            # Two supervisors started at the same time, and the other one's etcd was first.
            log.info("etcd pid %d: %s; another one listens there by now and is used", pid, end)
            return
        self._journal.publish(events.ServiceDied(what=self.name, pid=pid, how=str(end)))
        log.error("etcd pid %d: %s; the end of its log:\n%s", pid, end, self._end_of_log())
        self._restart()

    def _end_of_log(self) -> str:
        with contextlib.suppress(OSError):
            with (self._settings.data_dir / "etcd.log").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_END_BYTES))
                text = file.read(LOG_END_BYTES).decode(errors="replace")
            return "\n".join(text.splitlines()[-3:]) or "(its log is empty)"
        return "(it has no log)"
