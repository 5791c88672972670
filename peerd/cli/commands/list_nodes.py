"""``peerd nodes``"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from operator import attrgetter
from typing import TYPE_CHECKING

import click
import orjson

from peerd.address import Address
from peerd.cli import logging_setup
from peerd.cli.options import EtcdLocation, json_option, registry_options
from peerd.cli.text_output import print_table, time_text

if TYPE_CHECKING:
    from peerd.registry import PeerRecord


@click.command()
@registry_options("The etcd to ask: URLs of its members, https for TLS.")
@click.option("--partition-key", metavar="KEY", help="List only peers with this partition key.")
@click.option("--protocol", help="List only peers with this protocol.")
@click.option(
    "--watch", is_flag=True, help="Print a line for each peer and for each change, until Ctrl-C."
)
@json_option
def nodes(
    etcd: EtcdLocation,
    partition_key: str | None,
    protocol: str | None,
    watch: bool,
    as_json: bool,
) -> None:
    """List the peers that are registered in etcd, FaasNet's included.

    Values below the prefix that are not peer records are skipped; their number goes to standard error. With
    --watch, an etcd that does not answer is waited for, and no event is missed.

    \b
    Exit codes:
      0    done
      69   etcd does not answer (without --watch)
    """

    def wanted(record: PeerRecord) -> bool:
        return partition_key in (None, record.partition_key) and protocol in (None, record.protocol)

    if watch:
        _print_events(etcd, wanted, as_json)
    else:
        _print_listing(etcd, wanted, as_json)


def _print_listing(etcd: EtcdLocation, wanted: Callable[[PeerRecord], bool], as_json: bool) -> None:
    folder = f"{etcd.prefix}/"
    with etcd.open() as registry:
        listing = registry.scan()
    records = [record for record in listing.records if wanted(record)]
    if as_json:
        rows = [record.as_dict() for record in records]
        click.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2))
    elif records:
        fields = attrgetter("peer_id", "url", "port", "protocol", "partition_key")
        print_table(("PEER", "URL", "PORT", "PROTOCOL", "PARTITION"), map(fields, records))
    else:
        such = "such " if listing.records else ""
        click.echo(f"no {such}peers below {folder} in {etcd.endpoint}")
    if listing.skipped:
        click.echo(
            f"skipped values below {folder} that are not peer records: {listing.skipped}", err=True
        )


def _print_events(etcd: EtcdLocation, wanted: Callable[[PeerRecord], bool], as_json: bool) -> None:
    logging_setup.configure("info")  # logs when etcd goes away and comes back
    logging_setup.name_process("nodes")
    with etcd.open() as registry:
        for event in registry.watch():
            record, kind = event.record, type(event).__name__.lower()
            if not wanted(record):
                continue
            if as_json:
                row = {"event": kind, "revision": event.revision, **record.as_dict()}
                click.echo(orjson.dumps(row))
                continue
            time, address = time_text(datetime.now()), Address(record.url, record.port)
            partition = "" if record.partition_key is None else f"  {record.partition_key}"
            click.echo(
                f"{time}  {kind:7}  {record.peer_id}  {address}  {record.protocol}{partition}"
            )
