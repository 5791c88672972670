"""The output of peerd status for a report, at common widths of terminals."""

import io
from typing import Any, Literal

import pytest
from rich.console import Console

from peerd.cli import status_view
from peerd.cli.text_output import UNLIMITED_WIDTH, print_columns


def peer(slot: int, **values: Any) -> dict[str, Any]:
    return {
        "slot": slot,
        "peer_id": f"localhost:{5001 + slot}",
        "pid": 1000 + slot,
        "state": "ready",
        "restarts": 0,
        "lost_in_flight": 0,
        "uptime_s": 3725.0,
        "heartbeat_age_s": 0.1,
        "registered": True,
        "conflict": None,
        "rx_messages": 1_000_000,
        "tx_messages": 999_999,
        "rx_dropped": 0,
        "decode_errors": 0,
        "handler_errors": 0,
        "tx_dropped": 0,
        "rss_bytes": 22 << 20,
        "cpu_percent": 1.5,
        "health": "ok",
        "health_for_s": 0.0,
        "summary": "ready",
        "last_exit": None,
        "next_start_in_s": None,
        "rx_queued_bytes": 0,
        "log_dropped": 0,
        "counters": {"unknown_magic": 0, "rx_truncated": 0},
        **values,
    }


def report(*peers: dict[str, Any], **supervisor: Any) -> dict[str, Any]:
    return {
        "supervisor": {
            "pid": 999,
            "state": "ready",
            "uptime_s": 3726.0,
            "version": "0.1.0",
            "configured_peers": len(peers),
            "log_dropped": 0,
            **supervisor,
        },
        "registry": {"state": "connected", "endpoint": "http://localhost:23790"},
        "peers": list(peers),
    }


KILLED = {
    "how": "killed by SIGKILL",
    "age_s": 12.3,
    "ready_for_s": 3000.0,
    "lost_in_flight": 3,
    "cause": "oom",
    "next": "restarted at once",
    "summary": "killed by SIGKILL (out of memory) after 3000.0 s of service",
}

KILLED_TEXT = (
    "slot 1: killed by SIGKILL (out of memory) after 3000.0 s of service, 12s ago; lost 3; "
    "next start in 47.0s"
)

PEERS = (
    peer(0),
    peer(1, health="idle", rx_queued_bytes=4096, restarts=1, last_exit=KILLED, uptime_s=12.0),
    peer(2, health="stuck", health_for_s=12.4, heartbeat_age_s=12.4),
)

GOLDEN = {
    60: """\
#  PEER            STATE      UP     RST       RX      TX
───────────────────────────────────────────────────────────
0  localhost:5001  ready      1h02m    0  1000000  999999
1  localhost:5002  ready      12.0s    1  1000000  999999
2  localhost:5003  stuck 12s  1h02m    0  1000000  999999
(left out: BEAT, QUEUE, DROP, LOST, ERR, REG, PID, LAST EXIT, MiB, CPU%; a wider terminal or --json shows all)
""",
    80: """\
#  PEER            STATE      UP     RST       RX      TX  BEAT   QUEUE  DROP
────────────────────────────────────────────────────────────────────────────────
0  localhost:5001  ready      1h02m    0  1000000  999999  0.1s       0     0
1  localhost:5002  ready      12.0s    1  1000000  999999  0.1s    4096     0
2  localhost:5003  stuck 12s  1h02m    0  1000000  999999  12.4s      0     0
(left out: LOST, ERR, REG, PID, LAST EXIT, MiB, CPU%; a wider terminal or --json shows all)
""",
}


def shown(document: dict[str, Any], width: int, *, colour: bool = False) -> str:
    text = io.StringIO()
    system: Literal["standard"] | None = "standard" if colour else None
    console = Console(file=text, width=width, force_terminal=colour, color_system=system)
    print_columns(status_view.columns(document), console)
    return text.getvalue()


def stripped(text: str) -> list[str]:
    return [line.rstrip("─ ") for line in text.splitlines()]


@pytest.mark.parametrize("width", [60, 80])
def test_the_table_at_the_widths_of_terminals(width: int) -> None:
    table = shown(report(*PEERS), width)
    assert stripped(table) == stripped(GOLDEN[width])
    assert all(len(line) <= width for line in table.splitlines() if not line.startswith("(left"))


@pytest.mark.parametrize("width", [200, UNLIMITED_WIDTH])
def test_a_wide_terminal_shows_every_column(width: int) -> None:
    table = shown(report(*PEERS), width)
    titles = "# PEER STATE UP RST RX TX BEAT QUEUE DROP LOST ERR REG PID LAST EXIT MiB CPU%"
    assert table.splitlines()[0].split() == titles.split()
    assert "left out" not in table
    assert len(table.splitlines()) == 2 + len(PEERS)


def test_colours_are_for_terminals() -> None:
    assert "\x1b[" not in shown(report(*PEERS), 200)
    coloured = shown(report(*PEERS), 200, colour=True)
    assert "\x1b[32mready" in coloured
    assert "\x1b[1;31mstuck 12s" in coloured


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "ready"),
        ({"health": None}, "ready"),
        ({"health": "idle", "heartbeat_age_s": 3.0}, "ready"),
        ({"health": "starved", "health_for_s": 3.0}, "starved 3s"),
        ({"health": "stopped", "health_for_s": 70.0}, "stopped 70s"),
        ({"state": "crashloop", "health": None, "heartbeat_age_s": 3.0}, "crashloop"),
    ],
)
def test_the_state_of_a_peer(values: dict[str, Any], text: str) -> None:
    assert status_view.state(peer(0, **values)) == text


def test_more_peers_than_configured() -> None:
    peers = [peer(slot) for slot in range(12)]
    head = status_view.head(report(*peers, configured_peers=8))
    assert head[1] == "peers 12 of 12 ready; configured 8, running 12"
    assert status_view.head(report(*peers, configured_peers=12))[1] == "peers 12 of 12 ready"


def test_problems_of_a_peer_are_listed_below() -> None:
    parked = peer(1, state="crashloop", last_exit=KILLED, next_start_in_s=47.0)
    taken = peer(2, conflict="held by another")
    assert status_view.notes(
        report(peer(0), parked, taken, peer(3, log_dropped=5), log_dropped=2)
    ) == [
        KILLED_TEXT,
        "slot 2: held by another",
        "log lines dropped because the log was not read: 7",
    ]


@pytest.mark.parametrize(
    ("cause", "brief"),
    [
        ("signal", "SIGKILL 12s ago"),
        ("oom", "SIGKILL (OOM) 12s ago"),
        ("stuck", "SIGKILL (stuck) 12s ago"),
        ("late", "SIGKILL (late) 12s ago"),
    ],
)
def test_why_a_worker_was_killed(cause: str, brief: str) -> None:
    dead = peer(0, state="backoff", last_exit={**KILLED, "cause": cause})
    assert column("LAST EXIT", dead) == [brief]


def test_unhandled_and_truncated_messages_are_shown() -> None:
    wrong = peer(0, decode_errors=1, counters={"unknown_magic": 7, "rx_truncated": 2})
    assert column("ERR", wrong) == [3]
    assert status_view.notes(report(wrong)) == ["slot 0: messages without a handler: 7"]


def column(title: str, *peers: dict[str, Any]) -> list[object]:
    (found,) = [each for each in status_view.columns(report(*peers)) if each.title == title]
    return list(found.cells)


def test_rates() -> None:
    rates = status_view.Rates()
    assert rates.after(report(peer(0)), 10.0) == {}
    later = report(peer(0, rx_messages=1_000_500, tx_messages=1_000_049), peer(1))
    assert rates.after(later, 10.5) == {0: (1000, 100)}
    # A new supervisor counts from zero.
    assert rates.after(report(peer(0, rx_messages=5), pid=1001), 11.0) == {}
    columns = {
        column.title: column.cells for column in status_view.columns(later, {0: (1000, 100)})
    }
    assert columns["RX/s"] == [1000, None]
    assert "RX" not in columns


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0s"), (59.94, "59.9s"), (61, "1m01s"), (3600, "1h00m"), (90_000, "1d01h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert status_view.duration(seconds) == text
