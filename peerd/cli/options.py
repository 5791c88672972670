"""Options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import click

from peerd.settings import DEFAULT_ENDPOINT, DEFAULT_PREFIX


class _Seconds(click.FloatRange):
    """A number of seconds; nan and inf are floats to Python, and no time to wait."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return float(seconds)


SECONDS = _Seconds(min=0)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def etcd_option(
    default: str | None = DEFAULT_ENDPOINT, help: str = "The etcd to ask."
) -> Decorator:
    return click.option(
        "--etcd",
        metavar="URL",
        envvar="PEERD_ETCD",
        default=default,
        show_default=default is not None,
        help=help,
    )


prefix_option: Decorator = click.option(
    "--prefix",
    envvar="PEERD_PREFIX",
    default=DEFAULT_PREFIX,
    show_default=True,
    help="Keys are PREFIX/peer-id; 'eventmesh' is FaasNet's.",
)

json_option: Decorator = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, for scripts."
)
