"""The lines and columns of ``peerd status``, from a report of the supervisor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peerd.cli.text_output import Column

Report = dict[str, Any]
Peer = dict[str, Any]

HEALTHY = (None, "ok", "idle")

COLOURS = {
    "ready": "green",
    "stopped": "dim",
    **dict.fromkeys(("starting", "stopping", "starved"), "yellow"),
    **dict.fromkeys(("late", "full", "unread", "backoff"), "red"),
    **dict.fromkeys(("crashloop", "stuck"), "bold red"),
}

# Why a worker died, if its exit code or signal does not say it.
CAUSES = {"oom": "OOM", "stuck": "stuck", "late": "late"}


class Rates:
    """Messages per second, from one report to the next."""

    def __init__(self) -> None:
        self._pid = 0
        self._at_s = 0.0
        self._messages: dict[int, tuple[int, int]] = {}

    def after(self, report: Report, now_s: float) -> dict[int, tuple[int, int]]:
        """(received, sent) by slot, for slots that the previous report of the same supervisor has, too."""
        messages = {
            peer["slot"]: (peer["rx_messages"], peer["tx_messages"]) for peer in report["peers"]
        }
        pid, passed_s = report["supervisor"]["pid"], now_s - self._at_s
        rates = {}
        if pid == self._pid and passed_s > 0:
            for slot in messages.keys() & self._messages.keys():
                now, then = messages[slot], self._messages[slot]
                rx, tx = (round((new - old) / passed_s) for new, old in zip(now, then, strict=True))
                rates[slot] = rx, tx
        self._pid, self._at_s, self._messages = pid, now_s, messages
        return rates


def head(report: Report) -> list[str]:
    supervisor, registry, peers = report["supervisor"], report["registry"], report["peers"]
    ready = sum(is_fine(peer) for peer in peers)
    configured, scaled = supervisor["configured_peers"], ""
    if configured != len(peers):
        scaled = f"; configured {configured}, running {len(peers)}"
    up = duration(supervisor["uptime_s"])
    return [
        f"supervisor pid {supervisor['pid']}, {supervisor['state']}, up {up}, peerd {supervisor['version']}",
        f"peers {ready} of {len(peers)} ready{scaled}",
        f"registry {registry['state']}, etcd at {registry['endpoint']}",
    ]


def columns(report: Report, rates: Mapping[int, tuple[int, int]] | None = None) -> list[Column]:
    """The most important columns first. With ``rates``, messages are per second."""
    peers = report["peers"]
    if rates is None:
        traffic = [
            Column("RX", [peer["rx_messages"] for peer in peers]),
            Column("TX", [peer["tx_messages"] for peer in peers]),
        ]
    else:
        seen = [rates.get(peer["slot"], (None, None)) for peer in peers]
        traffic = [Column("RX/s", [rx for rx, _ in seen]), Column("TX/s", [tx for _, tx in seen])]
    ages = [peer["heartbeat_age_s"] for peer in peers]
    errors = [
        peer["counters"]["rx_truncated"] + peer["decode_errors"] + peer["handler_errors"]
        for peer in peers
    ]
    return [
        Column("#", [peer["slot"] for peer in peers]),
        Column("PEER", [peer["peer_id"] for peer in peers]),
        Column(
            "STATE", [state(peer) for peer in peers], lambda text: COLOURS.get(text.split()[0], "")
        ),
        Column("UP", [duration(peer["uptime_s"]) for peer in peers]),
        Column("RST", [peer["restarts"] for peer in peers]),
        *traffic,
        Column("BEAT", [age if age is None else duration(age) for age in ages]),
        Column("QUEUE", [peer["rx_queued_bytes"] for peer in peers]),
        Column("DROP", [peer["rx_dropped"] + peer["tx_dropped"] for peer in peers]),
        Column("LOST", [peer["lost_in_flight"] for peer in peers]),
        Column("ERR", errors),
        Column("REG", ["yes" if peer["registered"] else "no" for peer in peers]),
        Column("PID", [peer["pid"] for peer in peers]),
        Column("LAST EXIT", [_last_exit(peer) for peer in peers]),
        Column("MiB", [round(peer["rss_bytes"] / 2**20, 1) for peer in peers]),
        Column("CPU%", [peer["cpu_percent"] for peer in peers]),
    ]


def notes(report: Report) -> list[str]:
    """Explanations below the table: conflicts, deaths, messages without a handler, dropped log lines."""
    lines = []
    for peer in report["peers"]:
        if peer["conflict"]:
            lines.append(f"slot {peer['slot']}: {peer['conflict']}")
        if peer["state"] == "ready" and not is_fine(peer):
            lines.append(f"slot {peer['slot']}: {peer['summary']}")
        if peer["last_exit"] is not None and peer["state"] != "ready":
            lines.append(f"slot {peer['slot']}: {_explain(peer, peer['last_exit'])}")
        if unhandled := peer["counters"]["unknown_magic"]:
            lines.append(f"slot {peer['slot']}: messages without a handler: {unhandled}")
    dropped = sum(process["log_dropped"] for process in (report["supervisor"], *report["peers"]))
    if dropped:
        lines.append(f"log lines dropped because the log was not read: {dropped}")
    return lines


def is_fine(peer: Peer) -> bool:
    return state(peer) == "ready"


def state(peer: Peer) -> str:
    """Such as ``starting`` or ``ready``; ``late 7s`` when it is ready and not healthy."""
    if peer["state"] != "ready" or peer["health"] in HEALTHY:
        return str(peer["state"])
    return f"{peer['health']} {peer['health_for_s'] or 0:.0f}s"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def _ago(seconds: float) -> str:
    return f"{int(seconds)}s ago" if seconds < 60 else f"{duration(seconds)} ago"


def _last_exit(peer: Peer) -> str | None:
    end = peer["last_exit"]
    if end is None:
        return None
    how = str(end["how"]).removeprefix("killed by ")
    cause = f" ({CAUSES[end['cause']]})" if end["cause"] in CAUSES else ""
    return f"{how}{cause} {_ago(end['age_s'])}"


def _explain(peer: Peer, end: Mapping[str, Any]) -> str:
    parts = [f"{end['summary']}, {_ago(end['age_s'])}"]
    if end["lost_in_flight"]:
        parts.append(f"lost {end['lost_in_flight']}")
    if peer["next_start_in_s"] is not None:
        parts.append(f"next start in {duration(peer['next_start_in_s'])}")
    return "; ".join(parts)
