"""The checks of a chaos run find each way to break a guarantee, and the printed command repeats a run."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

import pytest

from peerd_chaos import checks
from peerd_chaos.accounts import Count, LoadReport
from peerd_chaos.chaos_apps import DIE_CODE
from peerd_chaos.chaos_command import _command_line, chaos
from peerd_chaos.schedule import ChaosSettings, Kind

PEER = {
    "slot": 0,
    "port": 5001,
    "lost_in_flight": 3,
    "rx_dropped": 2,
    "lost_unread": 1,
    "decode_errors": 0,
    "handler_errors": 0,
    "tx_dropped": 0,
}
COUNT = Count(client=0, port=5001, sent=100, missing=6)
REPORT = LoadReport((COUNT,), dropped=0, foreign=0, finished=True)

KILLED, STOPPED, REPLACED, BY_ITSELF = 11, 12, 13, 14


def died(pid: int, how: str, cause: str, lost: int = 0) -> dict[str, Any]:
    return {"pid": pid, "how": how, "cause": cause, "lost_in_flight": lost}


OF_A_KILL = died(KILLED, "killed by SIGKILL", "signal", 2)
OF_DIE = died(BY_ITSELF, f"exit code {DIE_CODE}", "exit", 1)


UNASKED = "only killed workers have died"
UNACCOUNTED = "the certificates account for the whole loss"


def broken(invariants: Sequence[checks.Invariant]) -> list[str]:
    return [invariant.name for invariant in invariants if not invariant.holds]


@pytest.mark.parametrize(
    ("count", "report", "peer", "names"),
    [
        ({}, {}, {}, []),
        ({"missing": 7}, {}, {}, ["the reported loss is the real loss"]),
        ({}, {}, {"lost_in_flight": 4}, ["the reported loss is the real loss"]),
        ({"doubled": 1}, {}, {}, ["nothing is doubled"]),
        ({"out_of_order": 1}, {}, {}, ["nothing is out of order"]),
        ({}, {"dropped": 1}, {}, ["every datagram is answered or lost"]),
        ({}, {"foreign": 1}, {}, ["every datagram is answered or lost"]),
        ({}, {"finished": False}, {}, ["every datagram is answered or lost"]),
        ({}, {}, {"decode_errors": 1}, ["no datagram is an error"]),
        ({}, {}, {"handler_errors": 1}, ["no datagram is an error"]),
        ({}, {}, {"tx_dropped": 1}, ["no datagram is an error"]),
        ({"sent": 49}, {}, {}, ["there was a load"]),
    ],
)
def test_each_defect_of_a_load_is_found(
    count: dict[str, Any], report: dict[str, Any], peer: dict[str, int], names: list[str]
) -> None:
    counts = (dataclasses.replace(COUNT, **count),)
    doctored = dataclasses.replace(REPORT, counts=counts, **report)
    assert broken(checks.load(doctored, [PEER | peer], ordered=True, due=100)) == names


def test_an_empty_load_is_no_load() -> None:
    nothing = dataclasses.replace(REPORT, counts=())
    assert broken(checks.load(nothing, [], ordered=True, due=0)) == ["there was a load"]


def test_reports_of_two_peers_do_not_offset_each_other() -> None:
    """One peer reports too much, the other as much too little."""
    peers = [PEER | {"lost_in_flight": 4}, PEER | {"slot": 1, "port": 5002, "lost_in_flight": 2}]
    report = dataclasses.replace(REPORT, counts=(COUNT, dataclasses.replace(COUNT, port=5002)))
    assert broken(checks.load(report, peers, ordered=True, due=100)) == [
        "the reported loss is the real loss"
    ]


def test_coroutines_may_answer_in_another_order() -> None:
    report = dataclasses.replace(REPORT, counts=(dataclasses.replace(COUNT, out_of_order=1),))
    assert broken(checks.load(report, [PEER], ordered=False, due=100)) == []


@pytest.mark.parametrize(
    ("events", "names"),
    [
        ([OF_A_KILL, OF_DIE], []),
        ([OF_A_KILL, OF_DIE, died(REPLACED, "exit code 0", "exit")], []),
        ([OF_A_KILL, OF_DIE, died(STOPPED, "exit code 0", "exit")], [UNASKED]),
        ([OF_A_KILL, OF_DIE, died(STOPPED, "killed by SIGKILL", "stuck")], [UNASKED]),
        ([OF_A_KILL, OF_DIE, died(STOPPED, "killed by SIGKILL", "signal")], [UNASKED]),
        ([OF_A_KILL | {"cause": "stuck"}, OF_DIE], [UNASKED]),
        ([OF_A_KILL, OF_DIE, OF_DIE | {"lost_in_flight": 0}], [UNASKED]),
        ([OF_A_KILL, OF_DIE, died(99, "exit code 1", "exit")], [UNASKED]),
        ([OF_DIE], ["each kill has a certificate", UNACCOUNTED]),
        ([OF_A_KILL | {"lost_in_flight": 1}, OF_DIE], [UNACCOUNTED]),
    ],
)
def test_each_defect_of_the_certificates_is_found(
    events: list[dict[str, Any]], names: list[str]
) -> None:
    found = checks.deaths(
        events, [PEER], killed={KILLED, REPLACED}, may_have_exited={REPLACED}, asked_to_die=1
    )
    assert broken(found) == names


@pytest.mark.parametrize(
    "settings",
    [
        ChaosSettings(seed=0),
        ChaosSettings(seed=2**40, seconds=0.1, peers=64, rate=12345.678, coroutines=True),
        ChaosSettings(seed=7, seconds=1234567.0, kinds=frozenset({Kind.KILL, Kind.ETCD_STOP})),
        ChaosSettings(seed=7, rate=1e6 / 3, kinds=frozenset({Kind.TTIN}), coroutines=True),
    ],
)
def test_the_printed_command_repeats_the_run(settings: ChaosSettings) -> None:
    command, name, *args = shlex.split(_command_line(settings))
    assert (command, name) == ("peerd", "chaos")
    read = chaos.make_context("chaos", args).params
    names = ("seed", "seconds", "peers", "rate", "coroutines", "kinds")
    again = ChaosSettings(**{name: read[name] for name in names})
    assert again == settings
