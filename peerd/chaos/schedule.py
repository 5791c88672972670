"""What is done to a supervisor and when: a function of the seed and nothing else.

So a seed that found something finds it again, as far as a machine repeats itself: the schedule says
which slot is killed when, not what its worker is doing then.

The schedule keeps count of how many peers there are to be, so that its slots exist. One that does not at
that moment (a command before it takes its time) is left alone.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Collection
from dataclasses import dataclass

MEAN_GAP_S = 0.4
LAST_PART = 0.95
"""Of the time: what is done at its very end would only be repaired after it."""

SPARE_PEERS = 3
"""So many more than at the beginning there may be."""


class Kind(enum.StrEnum):
    KILL = "kill"
    SUCCESSOR = "successor"
    """Kill a worker's successor while it loads."""

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

ABOUT_A_SLOT = {Kind.KILL, Kind.SUCCESSOR, Kind.STOP, Kind.SPIN, Kind.DIE, Kind.RESTART}
LONGEST_S = {Kind.STOP: 3.0, Kind.ETCD_STOP: 4.0, Kind.ETCD_KILL: 3.0}


@dataclass(frozen=True, kw_only=True)
class Action:
    at_s: float
    """After the beginning of the load."""

    kind: Kind
    slot: int | None = None

    peers: int | None = None
    """What to scale to."""

    for_s: float | None = None
    """Until it is undone."""

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
    """In the order of time. ``peers``: how many there are at the beginning."""
    chance = random.Random(seed)
    chosen = [kind for kind in Kind if kind in kinds]
    weights = [WEIGHTS[kind] for kind in chosen]
    most, count, at_s = peers + SPARE_PEERS, peers, 0.0
    actions = []
    while (at_s := at_s + chance.expovariate(1 / MEAN_GAP_S)) < seconds * LAST_PART:
        (kind,) = chance.choices(chosen, weights)
        slot = chance.randrange(count)
        part, size = chance.random(), chance.randint(1, most)
        wanted = {Kind.SCALE: size, Kind.TTIN: count + 1, Kind.TTOU: count - 1}.get(kind, count)
        count = min(max(wanted, 1), most)
        actions.append(
            Action(
                at_s=at_s,
                kind=kind,
                slot=slot if kind in ABOUT_A_SLOT else None,
                peers=count if kind is Kind.SCALE else None,
                for_s=LONGEST_S[kind] * part if kind in LONGEST_S else None,
            )
        )
    return actions
