"""The verdict on one claim of the project: a bound, and the figure that was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    claim: str
    bound: str
    measured: str
    holds: bool


def at_most(claim: str, measured: float | None, bound: float, unit: str = "") -> Iterator[Verdict]:
    """No verdict for None: nothing was measured."""
    if measured is not None:
        yield Verdict(claim, f"<= {bound:.2f}{unit}", f"{measured:.2f}{unit}", measured <= bound)


def at_least(claim: str, measured: float | None, bound: float, unit: str = "") -> Iterator[Verdict]:
    if measured is not None:
        yield Verdict(claim, f">= {bound:.2f}{unit}", f"{measured:.2f}{unit}", measured >= bound)


def equal(claim: str, measured: object, expected: object) -> Iterator[Verdict]:
    yield Verdict(claim, str(expected), str(measured), measured == expected)


def failed(claim: str, why: str) -> Iterator[Verdict]:
    """For a measurement that failed, or that cannot be judged."""
    yield Verdict(claim, "", why, False)
