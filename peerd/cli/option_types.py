"""Parameter types: seconds, sizes, addresses and bounded integers."""

from __future__ import annotations

import math
import re
from typing import Any

import click

from peerd.address import Address, address_of
from peerd.errors import SettingsError


class Seconds(click.FloatRange):
    """A finite number of seconds: click would accept nan and inf."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        return float(seconds)


def integer(name: str, least: int, most: int | None = None) -> click.IntRange:
    """An integer that error messages call ``name``."""
    kind = click.IntRange(least, most)
    kind.name = name
    return kind


# Generic in newer versions of click only.
class _HostPort(click.ParamType):  # type: ignore[type-arg]
    name = "host:port"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Address:
        if isinstance(value, Address):  # read from a file and already converted
            return value
        try:
            address = address_of(value)
        except SettingsError as error:
            self.fail(str(error), param, ctx)
        if address is None:
            self.fail(f"{value!r}: write HOST:PORT, such as localhost:9464", param, ctx)
        return address


class _Size(click.ParamType):  # type: ignore[type-arg]
    name = "size"

    _TEXT = re.compile(r"(\d{1,18}(?:\.\d{1,3})?)([KMGT]?)", re.ASCII)
    _UNITS = " KMGT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = self._TEXT.fullmatch(str(value).upper().removesuffix("IB").removesuffix("B"))
        if match is None:
            self.fail(f"{value!r}: write bytes, or a size such as 64M or 1G", param, ctx)
        number, unit = match.groups()
        return (
            round(float(number) * 1024 ** self._UNITS.index(unit)) if unit else int(float(number))
        )


SECONDS = Seconds(min=0)
POSITIVE_SECONDS = Seconds(min=0, min_open=True)
HOST_PORT = _HostPort()
SIZE = _Size()  # Bytes; K, M, G and T are powers of 1024
