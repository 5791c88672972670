"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from peerd.settings import DEFAULT_ENDPOINT, DEFAULT_PREFIX

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
