"""The regimes: how datagrams are sent, which receivers are compared, and which figure matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

from regimes.latency import RATES, RATES_OF_MANY, Latency, measure_latency
from regimes.rates import (
    ECHO,
    ECHO_WINDOW,
    INTERLEAVED,
    PEERS,
    STREAM,
    THIN,
    THIN_RATE,
    RunSettings,
    Subject,
    Throughput,
    measure,
)
from regimes.receivers import (
    COUNTING,
    ECHOING,
    ON_MANY_SOCKETS,
    Receiver,
    with_lingers,
    without_offload,
)
from udp.envelope import SEGMENTS

Result: TypeAlias = Throughput | Latency
Figure = Literal["rate", "cpu", "round trip"]


@dataclass(frozen=True)
class Regime:
    title: str
    text: str
    figure: Figure  # The figure that matters
    receivers: dict[str, Receiver]
    measure: Callable[[RunSettings, Subject], Sequence[Result]]
    rates: Sequence[int] = ()  # The loads of a regime of round trips
    by_default: bool = True


def _only(receivers: dict[str, Receiver], names: str) -> dict[str, Receiver]:
    return {name: receivers[name] for name in names.split()}


def regimes(lingers_us: Sequence[int] = (0,)) -> dict[str, Regime]:
    """By name. ``lingers_us``: linger times of peerd to measure in addition to its default."""
    without_gro = without_offload(_only(COUNTING, "peerd peerd-batch peerd-async c rloop uvloop"))
    return {
        "stream": Regime(
            "Coalesced stream",
            f"one sender, {SEGMENTS} datagrams per send (UDP_SEGMENT), at full speed",
            "rate",
            COUNTING,
            partial(measure, STREAM),
        ),
        "plain-stream": Regime(
            "Stream without GRO",
            "the same, but peerd with --no-offload; the others never ask for UDP_GRO",
            "rate",
            without_gro,
            partial(measure, STREAM),
        ),
        "interleaved": Regime(
            f"{PEERS} peers on one core, {THIN_RATE:,}/s",
            f"{PEERS} sockets served on one CPU, plain sends to each in turn, evenly spaced: peerd with "
            "a process per socket, the others with one process",
            "cpu",
            with_lingers(ON_MANY_SOCKETS, lingers_us),
            partial(measure, THIN),
        ),
        "interleaved-full": Regime(
            f"{PEERS} peers on one core, full speed",
            "the same at full speed, one datagram per socket at a time",
            "cpu",
            with_lingers(ON_MANY_SOCKETS, lingers_us),
            partial(measure, INTERLEAVED),
        ),
        "echo-latency": Regime(
            "Echo round trips",
            "one client: one request at a time (closed), then at fixed rates; in microseconds",
            "round trip",
            # A peer with a core to itself does not linger, so the cost is measured on request only.
            with_lingers(
                _only(ECHOING, "peerd peerd-async c recvfrom rloop uvloop aiofastnet asyncio"),
                [us for us in lingers_us if us > 0],
            ),
            partial(measure_latency, 1, RATES),
            RATES,
        ),
        "echo-saturation": Regime(
            "Echo at saturation",
            f"one client, {SEGMENTS} requests per send, up to {ECHO_WINDOW:,} under way; replies/s",
            "rate",
            ECHOING,
            partial(measure, ECHO),
        ),
        "interleaved-latency": Regime(
            f"Echo round trips of {PEERS} peers on one core",
            f"{PEERS} sockets served on one CPU, one client sends to each in turn; in microseconds",
            "round trip",
            with_lingers(
                {
                    "peerd": replace(ECHOING["peerd"], title=ON_MANY_SOCKETS["peerd"].title),
                    **_only(ECHOING, "rloop uvloop"),
                },
                lingers_us,
            ),
            partial(measure_latency, PEERS, RATES_OF_MANY),
            RATES_OF_MANY,
            by_default=False,
        ),
    }


def present(regime: Regime) -> Regime:
    """Leave out the receivers that are not installed."""
    receivers = {name: each for name, each in regime.receivers.items() if each.available}
    return replace(regime, receivers=receivers)
