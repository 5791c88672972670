"""Does the schedule to a supervisor under load, lets it settle, and checks what must hold then.

What is done at once is done by the main thread at its time: signals, and datagrams that harm. What
takes its time runs beside it: commands each in a thread of their own; changes of the number of peers
one after the other, since the load has to stop sending to a port before it is closed; and etcd's
stops and starts in the thread that has started it, with which it would die.

The promises are about the end, when nobody disturbs it any more: every peer ready again, every loss
reported, nothing left over. That it serves meanwhile is what the load shows.

A slot that dies too often is parked by design (restart.py); it is restarted here, as an operator would.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peerd.chaos import checks
from peerd.chaos.app import HANDLER_VARIABLE
from peerd.chaos.checks import Invariant
from peerd.chaos.load import Load
from peerd.chaos.schedule import SPARE_PEERS, Action, Kind, schedule
from peerd.chaos.subject import COMMAND_TIMEOUT_S, Subject, wait_for
from peerd.errors import ControlError, NotRunningError, PeerdError
from peerd.registry.embedded_etcd import EmbeddedEtcd
from peerd.supervisor.restart import RestartPolicy

LEASE_TTL_S = 4
RECV_BUFFER_BYTES = 64 * 1024 * 1024
"""Room for what arrives while a slot is parked: at 1,000 a second, more than a minute."""

STARTED_WITHIN_S = 20.0
POLICY = RestartPolicy()
READY_WITHIN_S = POLICY.max_delay_s * (1 + POLICY.jitter) + 5.0
"""The longest that a worker's start is put off, and a start."""

STOPPED_WITHIN_S = 9.0
"""--stop-timeout, and what it takes to say so."""

ANSWERED_WITHIN_S = 60.0
LOOK_S = 0.25
LOAD_BEFORE_STOP_S = 0.3
COMMANDS_AT_ONCE = 32
SUCCESSOR_WITHIN_S = 2.0
NO_REFUSALS = ("internal error", "busy")

Tell = Callable[[float, str], None]
"""Gets the seconds since the load has begun, and what happens."""


@dataclass(frozen=True, kw_only=True)
class ChaosSettings:
    seed: int
    seconds: float = 20.0
    peers: int = 4
    rate: float = 4000.0
    """Datagrams a second, to all peers of the beginning together; more of them get more."""

    handler_s: float = 0.0002
    """What a plain handler sleeps, so that queues are seldom empty."""

    coroutines: bool = False
    """Handlers are coroutines, many at a time: a peer then does not promise the order of its answers."""

    kinds: frozenset[Kind] = frozenset(Kind)


@dataclass(frozen=True)
class ChaosReport:
    seed: int
    done: dict[str, int]
    """How often each kind of action was done."""

    invariants: tuple[Invariant, ...]

    @property
    def broken(self) -> list[Invariant]:
        return [invariant for invariant in self.invariants if not invariant.holds]


def run(settings: ChaosSettings, folder: Path, tell: Tell) -> ChaosReport:
    """``folder`` exists and is empty, and keeps what the supervisor has written.

    Raises RegistryUnavailableError without an etcd to be had, and PeerdError when the supervisor does
    not even start.
    """
    with contextlib.ExitStack() as opened:
        etcd_thread = opened.enter_context(ThreadPoolExecutor(1))
        etcd = EmbeddedEtcd()
        etcd_thread.submit(etcd.start).result()
        opened.callback(lambda: etcd_thread.submit(etcd.stop).result())
        subject = Subject(
            folder,
            etcd.endpoint,
            app=f"peerd.chaos.app:{'coroutines' if settings.coroutines else 'app'}",
            peers=settings.peers,
            most_peers=settings.peers + SPARE_PEERS,
            arguments=[f"--ttl={LEASE_TTL_S}", f"--recv-buffer={RECV_BUFFER_BYTES}"],
            environment={HANDLER_VARIABLE: str(settings.handler_s)},
        )
        opened.callback(subject.kill)
        return _Chaos(settings, subject, etcd, etcd_thread, tell).run()


@dataclass
class _Seen:
    """What has been done, and what the supervisor has said of it."""

    done: list[Kind] = field(default_factory=list)
    killed: set[int] = field(default_factory=set)
    """Workers that got a SIGKILL."""

    told_to_end: set[int | None] = field(default_factory=set)
    """Those that were replaced or scaled away, and may have ended before they were killed; and those that
    were to be replaced by a successor that was killed."""

    deaths: list[dict[str, Any]] = field(default_factory=list)
    last_event: int = 0
    missed_events: int = 0
    unanswered: list[str] = field(default_factory=list)
    """Commands; and those that were answered as none should be."""

    away_since_s: dict[int, float] = field(default_factory=dict)
    """Slots that are not ready."""

    longest_away_s: float = 0.0


class _Chaos:
    def __init__(
        self,
        settings: ChaosSettings,
        subject: Subject,
        etcd: EmbeddedEtcd,
        etcd_thread: ThreadPoolExecutor,
        tell: Tell,
    ) -> None:
        self._settings = settings
        self._most_peers = settings.peers + SPARE_PEERS
        self._subject = subject
        self._etcd = etcd
        self._etcd_thread = etcd_thread
        self._begun_s = time.monotonic()
        self._tell_of = tell
        self._seen = _Seen()
        self._stopped: set[int] = set()
        self._leaving: Collection[int] = ()
        """Slots that a change of the number of peers is about."""

        self._rate = 0.0
        self._paced_s = self._begun_s
        self._due_datagrams = 0.0
        """Before it was paced last."""

        self._futures: list[Future[None]] = []
        self._invariants: list[Invariant] = []
        self._lost = 0
        """When it had settled."""

        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []

    def run(self) -> ChaosReport:
        self._wait_for_the_start()
        done_in_time: list[Kind] = []
        with (
            ThreadPoolExecutor(1) as self._resizing,
            ThreadPoolExecutor(COMMANDS_AT_ONCE) as self._commands,
            Load(self._all_ports(), rate=self._settings.rate) as self._load,
        ):
            try:
                descriptors = self._settled_descriptors()
                self._pace(self._settings.rate)
                self._do_everything()
                self._settle()
                done_in_time = self._seen.done.copy()  # what follows is not of the schedule
                self._check_what_is_settled(descriptors)
            except (ControlError, NotRunningError) as error:
                self._check("the supervisor lives and answers", False, self._why_no_answer(error))
            except BaseException:
                self._subject.kill()  # so that no command waits for its answer
                raise
            self._stop()
        done = {str(kind): count for kind, count in Counter(done_in_time).items()}
        return ChaosReport(self._settings.seed, done, tuple(self._invariants))

    # The schedule

    def _do_everything(self) -> None:
        self._begun_s = time.monotonic()
        settings = self._settings
        for action in schedule(settings.seed, settings.seconds, settings.peers, settings.kinds):
            self._plan(action.at_s, functools.partial(self._do, action))
        while self._due:
            at_s, _, do = heapq.heappop(self._due)
            self._wait_until(at_s)
            do()
        self._wait_until(settings.seconds)

    def _plan(self, at_s: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._due, (at_s, next(self._order), do))

    def _wait_until(self, at_s: float) -> None:
        while (left_s := self._begun_s + at_s - time.monotonic()) > 0:
            if left_s > LOOK_S:
                self._look()
            time.sleep(max(0.0, min(LOOK_S, self._begun_s + at_s - time.monotonic())))

    def _look(self) -> None:
        """Note who has died since and who is away, and restart who is parked."""
        for event in self._subject.events(self._seen.last_event):
            self._seen.missed_events += event["number"] - self._seen.last_event - 1
            self._seen.last_event = event["number"]
            if event["event"] == "died" and "peer_id" in event:
                self._seen.deaths.append(event)
            elif event["event"] == "replaced" and "old_pid" in event:
                self._seen.told_to_end.add(event["old_pid"])
        now_s = time.monotonic()
        away_since_s, self._seen.away_since_s = self._seen.away_since_s, {}
        for peer in self._subject.peers():
            slot = peer["slot"]
            if peer["state"] == "crashloop":
                self._tell(f"slot {slot} is parked")
                restart = functools.partial(self._restart, slot)
                self._beside(self._commands, f"restart of the parked slot {slot}", restart)
            if peer["state"] != "ready":
                since_s = self._seen.away_since_s[slot] = away_since_s.get(slot, now_s)
                self._seen.longest_away_s = max(self._seen.longest_away_s, now_s - since_s)

    def _do(self, action: Action) -> None:
        slot, for_s = action.slot or 0, action.for_s or 0.0
        what = _with_time(action)
        match action.kind:
            case Kind.KILL:
                self._harm(action, signal.SIGKILL)
            case Kind.SUCCESSOR:
                self._tell(what)
                known = [child.pid for child in self._subject.children()]
                self._beside(self._commands, what, lambda: self._kill_successor(action, known))
                self._beside(self._commands, what, lambda: self._restart(slot))
            case Kind.STOP:
                pid = self._harm(action, signal.SIGSTOP)
                if pid is not None:
                    self._stopped.add(pid)
                    now_s = time.monotonic() - self._begun_s
                    self._plan(now_s + for_s, functools.partial(self._continue, pid))
            case Kind.SPIN | Kind.DIE:
                self._tell(what)
                if self._load.send(self._subject.port(slot), action.kind.upper()):
                    self._seen.done.append(action.kind)
            case Kind.RESTART:
                self._tell(what)
                self._beside(self._commands, what, lambda: self._restart(slot), action.kind)
            case Kind.HUP:
                self._tell(what)
                self._subject.send(signal.SIGHUP)
                self._seen.done.append(action.kind)
            case Kind.SCALE | Kind.TTIN | Kind.TTOU:
                self._beside(self._resizing, what, lambda: self._resize(action))
            case Kind.REGISTRAR:
                pid = self._subject.registrar()
                if pid is not None and self._subject.send_child(pid, signal.SIGKILL):
                    self._seen.done.append(action.kind)
                    self._tell(f"{what}: pid {pid}: SIGKILL")
                else:
                    self._tell(f"{what}: there is none")
            case Kind.ETCD_STOP | Kind.ETCD_KILL:
                disturb = functools.partial(self._disturb_etcd, action)
                self._beside(self._etcd_thread, what, disturb, action.kind)

    def _harm(self, action: Action, number: signal.Signals) -> int | None:
        assert action.slot is not None
        pid = self._subject.worker(action.slot)
        if pid is None or not self._subject.send_child(pid, number):
            self._tell(f"{_with_time(action)}: there is no worker")
            return None
        if number is signal.SIGKILL:
            self._seen.killed.add(pid)
        if action.slot in self._leaving:
            self._seen.told_to_end.add(pid)
        self._seen.done.append(action.kind)
        self._tell(f"{_with_time(action)}: pid {pid}: {number.name}")
        return pid

    def _kill_successor(self, action: Action, known: Collection[int]) -> None:
        """One that has not taken over by then has no death that would need a certificate. The worker may
        have been told to leave its socket to it just before."""
        assert action.slot is not None
        until_s = time.monotonic() + SUCCESSOR_WITHIN_S
        while (pid := self._subject.successor(action.slot, known)) is None:
            if time.monotonic() >= until_s:
                self._tell(f"{action}: there is none")
                return
        worker = self._subject.worker(action.slot)
        if self._subject.send_child(pid, signal.SIGKILL):
            self._seen.killed.add(pid)
            self._seen.told_to_end.update((pid, worker))
            self._seen.done.append(action.kind)
            self._tell(f"{action}: pid {pid}: SIGKILL")

    def _continue(self, pid: int) -> None:
        self._stopped.discard(pid)
        gone = "" if self._subject.send_child(pid, signal.SIGCONT) else ", which is gone"
        self._tell(f"stop is over: pid {pid}: SIGCONT{gone}")

    def _disturb_etcd(self, action: Action) -> None:
        assert action.for_s is not None
        self._tell(_with_time(action))
        if action.kind is Kind.ETCD_STOP:
            os.kill(self._etcd.pid, signal.SIGSTOP)
            time.sleep(action.for_s)
            os.kill(self._etcd.pid, signal.SIGCONT)
        else:
            self._etcd.kill()
            time.sleep(action.for_s)
            self._etcd.start()
        self._tell(f"{action.kind} is over")

    def _resize(self, action: Action) -> None:
        """The load leaves a port before it closes, and comes when it is open."""
        before = len(self._subject.peers())
        wanted = action.peers or before + (1 if action.kind is Kind.TTIN else -1)
        wanted = max(wanted, 1)
        if wanted > self._most_peers:
            self._tell(f"{action}: there are no more ports")
            return
        self._tell(f"{_with_time(action)} ({before} now)")
        self._load.remove(self._subject.port(slot) for slot in range(wanted, before))
        self._leaving = range(min(wanted, before), max(wanted, before))
        peers = self._subject.peers()
        self._seen.told_to_end.update(p["pid"] for p in peers if p["slot"] in self._leaving)
        try:
            if action.kind is Kind.SCALE:
                self._subject.command("scale", peers=wanted)
            else:
                self._resize_by_signal(action, wanted)
            self._seen.done.append(action.kind)
        finally:
            self._leaving = ()
            ports = self._all_ports()
            self._load.add(ports)
            self._pace(self._rate_for(len(ports)))

    def _resize_to(self, peers: int) -> None:
        now_s = time.monotonic() - self._begun_s
        self._resize(Action(at_s=now_s, kind=Kind.SCALE, peers=peers))

    def _resize_by_signal(self, action: Action, wanted: int) -> None:
        last = max((event["number"] for event in self._subject.events(0)), default=0)
        refused: list[str] = []

        def is_over() -> bool:
            news = self._subject.events(last)
            refused.extend(event["why"] for event in news if event["event"] == "not scaled")
            return bool(refused) or len(self._all_ports()) == wanted

        self._subject.send(signal.SIGTTIN if action.kind is Kind.TTIN else signal.SIGTTOU)
        if not wait_for(is_over, COMMAND_TIMEOUT_S):
            raise ControlError(f"not {wanted} peers after {COMMAND_TIMEOUT_S:g} s")
        if refused:
            raise ControlError(f"not scaled: {refused[0]}")

    def _pace(self, rate: float) -> None:
        """And keep account of how much is to be sent."""
        now_s = time.monotonic()
        self._due_datagrams += self._rate * (now_s - self._paced_s)
        self._rate, self._paced_s = rate, now_s
        self._load.pace(rate)

    def _rate_for(self, peers: int) -> float:
        return self._settings.rate * peers / self._settings.peers

    def _restart(self, slot: int) -> None:
        self._subject.command("restart", slot=slot)

    def _beside(
        self,
        pool: ThreadPoolExecutor,
        what: str,
        do: Callable[[], None],
        kind: Kind | None = None,
    ) -> None:
        """``kind`` is noted when it is done. A command may be refused: the slot may be gone, and a
        successor may have been killed. But no command is answered "busy", or meets a defect."""

        def run() -> None:
            begun_s = time.monotonic()
            try:
                do()
            except (ControlError, NotRunningError) as error:
                why = str(error).partition("\n")[0]
                self._tell(f"{what} failed: {why}")
                took_s = time.monotonic() - begun_s
                if took_s >= COMMAND_TIMEOUT_S or any(each in why for each in NO_REFUSALS):
                    self._seen.unanswered.append(f"{what} ({why})")
            else:
                if kind is not None:
                    self._seen.done.append(kind)

        self._futures.append(pool.submit(run))

    # The end

    def _settle(self) -> None:
        self._tell("settling")
        for pid in self._stopped:
            self._subject.send_child(pid, signal.SIGCONT)
        until_s = time.monotonic() + COMMAND_TIMEOUT_S + STARTED_WITHIN_S
        for future in self._futures:
            while not future.done() and time.monotonic() < until_s:
                self._look()
                wait([future], LOOK_S)
            if future.done():
                future.result()
        unfinished = sum(not future.done() for future in self._futures)
        if unfinished:
            self._seen.unanswered.append(f"{unfinished} that still run")
        self._check(
            "every command is answered",
            not self._seen.unanswered,
            f"within {COMMAND_TIMEOUT_S:g} s, not: {', '.join(self._seen.unanswered) or 'none'}",
        )
        # What is queued may hold what a worker dies of.
        self._pace(0.0)
        recovered = wait_for(self._is_idle, ANSWERED_WITHIN_S)
        self._check(
            "every peer is ready again",
            recovered and self._seen.longest_away_s <= READY_WITHIN_S,
            f"{self._states()}; away for {self._seen.longest_away_s:.1f} s at most",
        )

    def _check_what_is_settled(self, descriptors: list[str]) -> None:
        self._pace(self._rate_for(len(self._all_ports())))
        self._check_commands()
        self._pace(self._rate)  # up to now
        report = self._load.finish(ANSWERED_WITHIN_S)
        self._lost = report.missing
        self._look()
        seen, peers = self._seen, self._subject.peers()
        self._invariants += checks.load(
            report, peers, ordered=not self._settings.coroutines, due=self._due_datagrams
        )
        self._check("no event is missed", not seen.missed_events, f"{seen.missed_events} missed")
        self._invariants += checks.deaths(
            seen.deaths,
            peers,
            killed=seen.killed,
            told_to_end=seen.told_to_end,
            asked_to_die=seen.done.count(Kind.DIE),
        )
        self._invariants.append(checks.records(self._subject, LEASE_TTL_S + 1.0))
        self._invariants.append(checks.processes(self._subject))
        if len(self._subject.peers()) != self._settings.peers:
            self._resize_to(self._settings.peers)
        self._invariants.append(checks.descriptors(self._subject, descriptors))

    def _check_commands(self) -> None:
        """That they still work; a reload is also answered behind everything that was asked before."""
        result = "done"
        try:
            if self._settings.kinds & {Kind.SCALE, Kind.TTIN, Kind.TTOU}:
                # All there are once more: so what each has lost can be read.
                self._resize_to(self._most_peers)
            self._subject.command("reload")
        except ControlError as error:
            result = str(error)
        self._check("scale and reload work afterwards", result == "done", result)

    def _stop(self) -> None:
        """With its queues full: they are served first."""
        self._pace(self._settings.rate)
        time.sleep(LOAD_BEFORE_STOP_S)
        self._pace(0.0)
        begun_s = time.monotonic()
        code: int | str = "still running"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._subject.send(signal.SIGTERM)
            code = self._subject.process.wait(STOPPED_WITHIN_S)
        took_s = time.monotonic() - begun_s
        self._tell(f"stopped: {code}")
        wait_for(lambda: self._load.report().missing == self._lost, checks.SETTLED_WITHIN_S)
        lost = self._load.report().missing - self._lost
        self._check(
            "it stops in order, and answers all first",
            (code, lost) == (0, 0),
            f"exit code {code} after {took_s:.1f} s, {lost} lost",
        )
        ports = range(self._subject.base_port, self._subject.port(self._most_peers))
        self._invariants.append(checks.nothing_left(self._subject, ports))
        self._invariants.append(checks.log(self._subject))

    # Facts

    def _why_no_answer(self, error: PeerdError) -> str:
        """A process that is killed closes its sockets a moment before it can be waited for."""
        wait_for(lambda: self._subject.process.poll() is not None, checks.SETTLED_WITHIN_S)
        code = self._subject.process.poll()
        return str(error) if code is None else f"exit code {code}"

    def _wait_for_the_start(self) -> None:
        def registered() -> bool:
            with contextlib.suppress(PeerdError):
                return all(peer["registered"] for peer in self._subject.peers())
            return self._subject.process.poll() is not None

        wait_for(registered, STARTED_WITHIN_S)
        if self._subject.process.poll() is not None or not self._all_ready():
            raise PeerdError(f"the supervisor has not started: {self._subject.last_words()}")

    def _settled_descriptors(self) -> list[str]:
        """Once the connections of the questions so far are closed."""
        found: list[list[str]] = []

        def same() -> bool:
            found.append(self._subject.descriptors())
            return len(found) > 3 and found[-1] == found[-2] == found[-3]

        wait_for(same, checks.SETTLED_WITHIN_S)
        return found[-1]

    def _all_ports(self) -> list[int]:
        return [peer["port"] for peer in self._subject.peers()]

    def _all_ready(self) -> bool:
        return all(peer["state"] == "ready" for peer in self._subject.peers())

    def _is_idle(self) -> bool:
        """All are ready and have nothing to do."""
        self._look()
        peers = self._subject.peers()
        return all(peer["state"] == "ready" and not peer["rx_queued_bytes"] for peer in peers)

    def _states(self) -> str:
        counts = Counter(peer["state"] for peer in self._subject.peers())
        return ", ".join(f"{count} {state}" for state, count in counts.items())

    def _tell(self, text: str) -> None:
        self._tell_of(time.monotonic() - self._begun_s, text)

    def _check(self, name: str, holds: bool, counted: str) -> None:
        self._invariants.append(Invariant(name, holds, counted))


def _with_time(action: Action) -> str:
    """When it was due: what is told has the time when it was done."""
    return f"{action}, due at {action.at_s:.2f}"
