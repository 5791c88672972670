"""A chaos run: disturb a supervisor under load, let it settle, and check its guarantees.

The guarantees are about the end, when the disturbances are over: every peer ready again, every loss
reported, nothing left over. The load shows that the peers serve meanwhile.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from peerd.errors import ControlError, NotRunningError
from peerd.registry.embedded_etcd import EmbeddedEtcd
from peerd.supervisor.restart import RestartPolicy
from peerd_chaos import checks
from peerd_chaos.checks import Invariant
from peerd_chaos.disturber import Disturber, OnProgress
from peerd_chaos.load import Load
from peerd_chaos.schedule import ChaosSettings, Kind, schedule
from peerd_chaos.subject import COMMAND_TIMEOUT_S, START_TIMEOUT_S, Subject, wait_for

LEASE_TTL_S = 4
RECV_BUFFER_BYTES = 64 * 1024 * 1024
"""Room for the datagrams of a parked slot: at 1,000 per second, more than a minute."""

POLICY = RestartPolicy()
MAX_UNREADY_S = POLICY.max_delay_s * (1 + POLICY.jitter) + 5.0
"""The longest delay of a restart, and a start."""

STOP_TIMEOUT_S = 9.0  # --stop-timeout and the time to report it
ANSWER_TIMEOUT_S = 60.0
LOAD_BEFORE_STOP_S = 0.3


@dataclass(frozen=True)
class ChaosReport:
    seed: int
    done: dict[str, int]  # How often each kind of action was done
    invariants: tuple[Invariant, ...]

    @property
    def broken(self) -> list[Invariant]:
        return [invariant for invariant in self.invariants if not invariant.holds]


def run(settings: ChaosSettings, folder: Path, on_progress: OnProgress) -> ChaosReport:
    """``folder`` is empty, and keeps the supervisor's output.

    Raises RegistryUnavailableError if no etcd can be started, and PeerdError if the supervisor does
    not start.
    """
    with contextlib.ExitStack() as opened:
        etcd_thread = opened.enter_context(ThreadPoolExecutor(1))
        etcd = EmbeddedEtcd()
        etcd_thread.submit(etcd.start).result()
        opened.callback(lambda: etcd_thread.submit(etcd.stop).result())
        subject = Subject(
            folder,
            etcd.endpoint,
            app=f"peerd_chaos.chaos_apps:{'coroutines' if settings.coroutines else 'app'}",
            peers=settings.peers,
            max_peers=settings.max_peers,
            arguments=[f"--ttl={LEASE_TTL_S}", f"--recv-buffer={RECV_BUFFER_BYTES}"],
        )
        opened.callback(subject.kill)
        subject.wait_started()
        disturber = Disturber(
            subject=subject,
            load=opened.enter_context(Load(subject.ports(), rate=settings.rate)),
            etcd=etcd,
            etcd_thread=etcd_thread,
            settings=settings,
            on_progress=on_progress,
        )
        return _Run(opened.enter_context(disturber)).run()


class _Run:
    """The phases of a run, and what is checked at the end of each."""

    def __init__(self, disturber: Disturber) -> None:
        self._disturber = disturber
        self._settings = disturber.settings
        self._subject = disturber.subject
        self._load = disturber.load
        self._record = disturber.record
        self._invariants: list[Invariant] = []
        self._lost = 0  # Datagrams lost before the stop

    def run(self) -> ChaosReport:
        settings, done = self._settings, list[Kind]()
        try:
            descriptors = self._subject.settled_descriptors()
            actions = schedule(settings.seed, settings.seconds, settings.peers, settings.kinds)
            self._disturber.run(actions, settings.seconds)
            self._settle()
            done = self._record.done.copy()  # the actions that follow are not part of the schedule
            self._check_settled(descriptors)
        except (ControlError, NotRunningError) as error:
            code = self._subject.exit_code()
            why = str(error) if code is None else f"exit code {code}"
            self._check("the supervisor lives and answers", False, why)
        except BaseException:
            self._subject.kill()  # so that no command waits for its answer
            raise
        self._stop()
        counts = {str(kind): count for kind, count in Counter(done).items()}
        return ChaosReport(settings.seed, counts, tuple(self._invariants))

    def _settle(self) -> None:
        self._disturber.settle(COMMAND_TIMEOUT_S + START_TIMEOUT_S)
        failed = self._record.failed_commands
        self._check(
            "every command is answered",
            not failed,
            f"within {COMMAND_TIMEOUT_S:g} s, except: {', '.join(failed) or 'none'}",
        )
        # A queued datagram may still kill a worker.
        self._load.pace(0.0)
        is_recovered = wait_for(self._is_idle, ANSWER_TIMEOUT_S)
        states = Counter(peer["state"] for peer in self._subject.peers())
        longest_s = self._record.longest_unready_s
        self._check(
            "every peer is ready again",
            is_recovered and longest_s <= MAX_UNREADY_S,
            f"{', '.join(f'{count} {state}' for state, count in states.items())}; "
            f"not ready for {longest_s:.1f} s at most",
        )

    def _is_idle(self) -> bool:
        self._disturber.update()
        peers = self._subject.peers()
        return all(peer["state"] == "ready" and not peer["rx_queued_bytes"] for peer in peers)

    def _check_settled(self, descriptors: list[str]) -> None:
        self._disturber.pace_for(len(self._subject.ports()))
        self._check_commands()
        due = self._load.due
        report = self._load.finish(ANSWER_TIMEOUT_S)
        self._lost = report.missing
        self._disturber.update()
        record, peers = self._record, self._subject.peers()
        ordered = not self._settings.coroutines
        self._invariants += checks.load(report, peers, ordered=ordered, due=due)
        missed = record.missed_events
        self._check("no event is missed", not missed, f"{missed} missed")
        self._invariants += checks.deaths(
            record.deaths,
            peers,
            killed=record.killed,
            may_have_exited=record.may_have_exited,
            asked_to_die=record.done.count(Kind.DIE),
        )
        self._invariants += [
            checks.records(self._subject, LEASE_TTL_S + 1.0),
            checks.processes(self._subject),
        ]
        if len(self._subject.peers()) != self._settings.peers:
            self._disturber.resize_to(self._settings.peers)
        self._invariants.append(checks.descriptors(self._subject, descriptors))

    def _check_commands(self) -> None:
        """A reload is answered after every earlier command."""
        result = "done"
        try:
            if self._settings.kinds & {Kind.SCALE, Kind.TTIN, Kind.TTOU}:
                # With every slot in use, the loss of each can be read.
                self._disturber.resize_to(self._settings.max_peers)
            self._subject.command("reload")
        except ControlError as error:
            result = str(error)
        self._check("scale and reload work afterwards", result == "done", result)

    def _stop(self) -> None:
        """Stop with full queues, which must be served first."""
        self._load.pace(self._settings.rate)
        time.sleep(LOAD_BEFORE_STOP_S)
        self._load.pace(0.0)
        begun_s = time.monotonic()
        code: int | str = "still running"
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._subject.terminate(STOP_TIMEOUT_S)
        took_s = time.monotonic() - begun_s
        self._disturber.report(f"stopped: {code}")
        wait_for(lambda: self._load.report().missing == self._lost, checks.SETTLE_TIMEOUT_S)
        lost = self._load.report().missing - self._lost
        self._check(
            "it stops in order and answers everything first",
            (code, lost) == (0, 0),
            f"exit code {code} after {took_s:.1f} s, {lost} lost",
        )
        ports = range(self._subject.base_port, self._subject.port(self._settings.max_peers))
        self._invariants += [checks.nothing_left(self._subject, ports), checks.log(self._subject)]

    def _check(self, name: str, holds: bool, counted: str) -> None:
        self._invariants.append(Invariant(name, holds, counted))
