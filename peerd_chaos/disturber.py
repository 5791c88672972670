"""Carries the actions of a schedule out, each at its time.

The main thread sends signals and harmful datagrams itself. Actions that take longer run in other
threads: each command in its own; changes of the number of peers one after the other, because the load
has to stop sending to a port before that port is closed; etcd's stops and starts in the thread that
started etcd, which etcd's death signal follows.

A slot that dies too often is parked by design (restart.py). It is restarted here, as an operator would.
"""

from __future__ import annotations

import functools
import os
import sched
import signal
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from peerd.errors import ControlError, NotRunningError
from peerd.registry.embedded_etcd import EmbeddedEtcd
from peerd_chaos.load import Load
from peerd_chaos.record import Record
from peerd_chaos.schedule import Action, ChaosSettings, Kind
from peerd_chaos.subject import COMMAND_TIMEOUT_S, Subject, wait_for

UPDATE_INTERVAL_S = 0.25
MAX_COMMANDS_AT_ONCE = 32
SUCCESSOR_TIMEOUT_S = 2.0
FORBIDDEN_ERRORS = ("internal error", "busy")

OnProgress = Callable[[float, str], None]
"""Called with the seconds since the load has begun, and what happens."""


@dataclass(kw_only=True)
class Disturber:
    """For a ``with`` block, which ends when every action has."""

    subject: Subject
    load: Load
    etcd: EmbeddedEtcd
    etcd_thread: ThreadPoolExecutor
    settings: ChaosSettings
    on_progress: OnProgress
    record: Record = field(default_factory=Record)

    def __post_init__(self) -> None:
        self._commands = ThreadPoolExecutor(MAX_COMMANDS_AT_ONCE)
        self._resizing = ThreadPoolExecutor(1)
        self._futures: list[Future[None]] = []
        self._stopped: set[int] = set()  # Workers that were sent SIGSTOP and not yet SIGCONT
        self._leaving: Collection[int] = ()
        """Slots that the change of the number of peers under way adds or removes."""

        self._begun_s = time.monotonic()
        self._due = sched.scheduler(self._now_s, self._pause)

    def __enter__(self) -> Disturber:
        return self

    def __exit__(self, *_: object) -> None:
        self._resizing.shutdown()
        self._commands.shutdown()

    def run(self, actions: Iterable[Action], seconds: float) -> None:
        self._begun_s = time.monotonic()
        for action in actions:
            self._due.enterabs(action.at_s, 0, self._do, (action,))
        self._due.enterabs(seconds, 1, lambda: None)
        self._due.run()

    def settle(self, within_s: float) -> None:
        """Continue the stopped workers and wait for the commands under way."""
        self.report("settling")
        for pid in self._stopped:
            self.subject.send_child(pid, signal.SIGCONT)
        until_s = time.monotonic() + within_s
        while wait(self._futures, UPDATE_INTERVAL_S).not_done and time.monotonic() < until_s:
            self.update()
        done, unfinished = wait(self._futures, 0)
        for future in done:
            future.result()
        if unfinished:
            self.record.failed_commands.append(f"{len(unfinished)} still running")

    def update(self) -> None:
        """Take in the news from the supervisor and restart the slots that it has parked."""
        for slot in self.record.update(self.subject):
            self.report(f"slot {slot} is parked")
            restart = functools.partial(self._restart, slot)
            self._submit(self._commands, f"restart of the parked slot {slot}", restart)

    def pace_for(self, peers: int) -> None:
        self.load.pace(self.settings.rate / self.settings.peers * peers)

    def resize_to(self, peers: int) -> None:
        self._resize(Action(at_s=self._now_s(), kind=Kind.SCALE, peers=peers))

    def report(self, text: str) -> None:
        self.on_progress(self._now_s(), text)

    # Time

    def _now_s(self) -> float:
        return time.monotonic() - self._begun_s

    def _pause(self, left_s: float) -> None:
        """At most until the next action is due. The scheduler calls it until then."""
        at_s = self._now_s() + left_s
        if left_s > UPDATE_INTERVAL_S:
            self.update()
        time.sleep(max(0.0, min(UPDATE_INTERVAL_S, at_s - self._now_s())))

    def _submit(
        self, pool: ThreadPoolExecutor, what: str, do: Callable[[], None], kind: Kind | None = None
    ) -> None:
        """``kind`` is recorded on success. A command may fail, because its slot may be gone or its
        successor killed, but never with one of FORBIDDEN_ERRORS."""

        def run() -> None:
            begun_s = time.monotonic()
            try:
                do()
            except (ControlError, NotRunningError) as error:
                why = str(error).partition("\n")[0]
                self.report(f"{what} failed: {why}")
                took_s = time.monotonic() - begun_s
                if took_s >= COMMAND_TIMEOUT_S or any(each in why for each in FORBIDDEN_ERRORS):
                    self.record.failed_commands.append(f"{what} ({why})")
            else:
                if kind is not None:
                    self.record.done.append(kind)

        self._futures.append(pool.submit(run))

    # Actions

    def _do(self, action: Action) -> None:
        slot, what = action.slot or 0, _with_due_time(action)
        if action.kind in (Kind.SUCCESSOR, Kind.SPIN, Kind.DIE, Kind.RESTART, Kind.HUP):
            self.report(what)
        match action.kind:
            case Kind.KILL:
                self._signal_worker(action, signal.SIGKILL)
            case Kind.STOP:
                self._stop(action)
            case Kind.SUCCESSOR:
                known = [child.pid for child in self.subject.children()]
                self._submit(self._commands, what, lambda: self._kill_successor(action, known))
                self._submit(self._commands, what, lambda: self._restart(slot))
            case Kind.SPIN | Kind.DIE:
                if self.load.send(self.subject.port(slot), action.kind.upper()):
                    self.record.done.append(action.kind)
            case Kind.RESTART:
                self._submit(self._commands, what, lambda: self._restart(slot), action.kind)
            case Kind.HUP:
                self.subject.send(signal.SIGHUP)
                self.record.done.append(action.kind)
            case Kind.SCALE | Kind.TTIN | Kind.TTOU:
                self._submit(self._resizing, what, lambda: self._resize(action))
            case Kind.REGISTRAR:
                pid = self.subject.registrar()
                if pid is None or not self.subject.send_child(pid, signal.SIGKILL):
                    self.report(f"{what}: there is none")
                else:
                    self.record.done.append(action.kind)
                    self.report(f"{what}: pid {pid}: SIGKILL")
            case Kind.ETCD_STOP | Kind.ETCD_KILL:
                disturb = functools.partial(self._disturb_etcd, action)
                self._submit(self.etcd_thread, what, disturb, action.kind)

    def _restart(self, slot: int) -> None:
        self.subject.command("restart", slot=slot)

    def _signal_worker(self, action: Action, number: signal.Signals) -> int | None:
        assert action.slot is not None
        pid = self.subject.worker(action.slot)
        if pid is None or not self.subject.send_child(pid, number):
            self.report(f"{_with_due_time(action)}: there is no worker")
            return None
        if number is signal.SIGKILL:
            self.record.killed.add(pid)
        if action.slot in self._leaving:
            self.record.may_have_exited.add(pid)
        self.record.done.append(action.kind)
        self.report(f"{_with_due_time(action)}: pid {pid}: {number.name}")
        return pid

    def _stop(self, action: Action) -> None:
        pid = self._signal_worker(action, signal.SIGSTOP)
        if pid is not None:
            assert action.for_s is not None
            self._stopped.add(pid)
            self._due.enter(action.for_s, 0, self._continue, (pid,))

    def _continue(self, pid: int) -> None:
        self._stopped.discard(pid)
        gone = "" if self.subject.send_child(pid, signal.SIGCONT) else ", which is gone"
        self.report(f"stop is over: pid {pid}: SIGCONT{gone}")

    def _kill_successor(self, action: Action, known: Collection[int]) -> None:
        """A successor that has not taken over yet needs no death certificate. Its predecessor may have
        been asked to hand its socket over just before."""
        assert action.slot is not None
        until_s = time.monotonic() + SUCCESSOR_TIMEOUT_S
        while (pid := self.subject.successor(action.slot, known)) is None:
            if time.monotonic() >= until_s:
                self.report(f"{action}: there is none")
                return
        worker = self.subject.worker(action.slot)
        if self.subject.send_child(pid, signal.SIGKILL):
            self.record.killed.add(pid)
            self.record.may_have_exited.update((pid, worker))
            self.record.done.append(action.kind)
            self.report(f"{action}: pid {pid}: SIGKILL")

    def _disturb_etcd(self, action: Action) -> None:
        assert action.for_s is not None
        self.report(_with_due_time(action))
        if action.kind is Kind.ETCD_STOP:
            os.kill(self.etcd.pid, signal.SIGSTOP)
            time.sleep(action.for_s)
            os.kill(self.etcd.pid, signal.SIGCONT)
        else:
            self.etcd.kill()
            time.sleep(action.for_s)
            self.etcd.start()
        self.report(f"{action.kind} is over")

    # The number of peers

    def _resize(self, action: Action) -> None:
        """The load leaves a port before it is closed, and uses a new one when it is open."""
        before = len(self.subject.peers())
        wanted = action.peers or before + (1 if action.kind is Kind.TTIN else -1)
        wanted = max(wanted, 1)
        if wanted > self.settings.max_peers:
            self.report(f"{action}: there are no more ports")
            return
        self.report(f"{_with_due_time(action)} ({before} now)")
        self.load.remove(self.subject.port(slot) for slot in range(wanted, before))
        self._leaving = range(min(wanted, before), max(wanted, before))
        peers = self.subject.peers()
        self.record.may_have_exited.update(p["pid"] for p in peers if p["slot"] in self._leaving)
        try:
            if action.kind is Kind.SCALE:
                self.subject.command("scale", peers=wanted)
            else:
                number = signal.SIGTTIN if action.kind is Kind.TTIN else signal.SIGTTOU
                self._resize_by_signal(number, wanted)
            self.record.done.append(action.kind)
        finally:
            self._leaving = ()
            ports = self.subject.ports()
            self.load.add(ports)
            self.pace_for(len(ports))

    def _resize_by_signal(self, number: signal.Signals, wanted: int) -> None:
        last = max((event["number"] for event in self.subject.events(0)), default=0)
        refused: list[str] = []

        def is_over() -> bool:
            news = self.subject.events(last)
            refused.extend(event["why"] for event in news if event["event"] == "not scaled")
            return bool(refused) or len(self.subject.ports()) == wanted

        self.subject.send(number)
        if not wait_for(is_over, COMMAND_TIMEOUT_S):
            raise ControlError(f"not {wanted} peers after {COMMAND_TIMEOUT_S:g} s")
        if refused:
            raise ControlError(f"not scaled: {refused[0]}")


def _with_due_time(action: Action) -> str:
    """The line that shows it begins with the time at which it was done."""
    return f"{action}, due at {action.at_s:.2f}"
