"""The actions of a run and their times: a function of the seed and nothing else.

So a seed that found a defect probably finds it again. The schedule says which slot is killed when, but not
what its worker is doing at that time.

The schedule tracks the intended number of peers, so its slots exist. An action on a slot that does not
exist at that moment, because an earlier command is slow, has no effect.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Collection
from dataclasses import dataclass

MEAN_GAP_S = 0.4
ACTIVE_SHARE = 0.95  # Of the run; the supervisor could not recover from an action at its very end
SPARE_PEERS = 3  # How many peers a run may add to those of the beginning


class Kind(enum.StrEnum):
    KILL = "kill"
    SUCCESSOR = "successor"  # Kill a worker's successor while it loads
    STOP = "stop"
    SPIN = "spin"
    DIE = "die"
    RESTART = "restart"
    HUP = "hup"
    SCALE = "scale"
    TTIN = "ttin"
    TTOU = "ttou"
    REGISTRAR = "registrar"
    ETCD_STOP = "etcd-stop"
    ETCD_KILL = "etcd-kill"


WEIGHTS = {
    Kind.KILL: 8,
    Kind.SUCCESSOR: 2,
    Kind.STOP: 4,
    Kind.SPIN: 1,
    Kind.DIE: 2,
    Kind.RESTART: 4,
    Kind.HUP: 2,
    Kind.SCALE: 2,
    Kind.TTIN: 2,
    Kind.TTOU: 2,
    Kind.REGISTRAR: 2,
    Kind.ETCD_STOP: 1,
    Kind.ETCD_KILL: 1,
}

SLOT_KINDS = {Kind.KILL, Kind.SUCCESSOR, Kind.STOP, Kind.SPIN, Kind.DIE, Kind.RESTART}
MAX_DURATION_S = {Kind.STOP: 3.0, Kind.ETCD_STOP: 4.0, Kind.ETCD_KILL: 3.0}


@dataclass(frozen=True, kw_only=True)
class ChaosSettings:
    seed: int
    seconds: float = 20.0
    peers: int = 4
    rate: float = 4000.0
    """Datagrams per second to all peers at the beginning; the rate per peer stays the same."""

    coroutines: bool = False
    """Handlers are coroutines, many at a time: a peer then does not guarantee the order of its answers."""

    kinds: frozenset[Kind] = frozenset(Kind)

    @property
    def max_peers(self) -> int:
        return self.peers + SPARE_PEERS


@dataclass(frozen=True, kw_only=True)
class Action:
    at_s: float  # Seconds after the beginning of the load
    kind: Kind
    slot: int | None = None

    peers: int | None = None  # The number of peers to scale to
    for_s: float | None = None  # Seconds until it is undone

    def __str__(self) -> str:
        text = str(self.kind)
        if self.slot is not None:
            text += f" slot {self.slot}"
        if self.peers is not None:
            text += f" to {self.peers} peers"
        if self.for_s is not None:
            text += f" for {self.for_s:.2f} s"
        return text


def schedule(
    seed: int, seconds: float, peers: int, kinds: Collection[Kind] = tuple(Kind)
) -> list[Action]:
    """The actions in order of time. ``peers``: the number of peers at the beginning."""
    chance = random.Random(seed)
    chosen = [kind for kind in Kind if kind in kinds]
    weights = [WEIGHTS[kind] for kind in chosen]
    most, count, at_s = peers + SPARE_PEERS, peers, 0.0
    actions = []
    while (at_s := at_s + chance.expovariate(1 / MEAN_GAP_S)) < seconds * ACTIVE_SHARE:
        (kind,) = chance.choices(chosen, weights)
        slot = chance.randrange(count)
        part, size = chance.random(), chance.randint(1, most)
        wanted = {Kind.SCALE: size, Kind.TTIN: count + 1, Kind.TTOU: count - 1}.get(kind, count)
        count = min(max(wanted, 1), most)
        actions.append(
            Action(
                at_s=at_s,
                kind=kind,
                slot=slot if kind in SLOT_KINDS else None,
                peers=count if kind is Kind.SCALE else None,
                for_s=MAX_DURATION_S[kind] * part if kind in MAX_DURATION_S else None,
            )
        )
    return actions
