"""``peerd nodes``"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

import click
import orjson

from peerd.address import Address
from peerd.cli import logging_setup
from peerd.cli.options import access_options, etcd_option, json_option, prefix_option
from peerd.cli.text_output import print_table
from peerd.settings import EtcdAccess

if TYPE_CHECKING:
    from peerd.registry import PeerRecord, Registry


@click.command()
@etcd_option()
@access_options
@prefix_option
@click.option("--partition-key", metavar="KEY", help="List only peers with this partition key.")
@click.option("--protocol", help="List only peers with this protocol.")
@click.option(
    "--watch", is_flag=True, help="Print a line for each peer and for each change, until Ctrl-C."
)
@json_option
def nodes(
    etcd: str,
    access: EtcdAccess,
    prefix: str,
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
    from peerd.registry import Registry

    def wanted(record: PeerRecord) -> bool:
        return partition_key in (None, record.partition_key) and protocol in (None, record.protocol)

    with Registry(etcd, prefix, access=access) as registry:
        if watch:
            _print_events(registry, wanted, as_json)
        else:
            _print_listing(registry, wanted, as_json, f"{prefix}/", etcd)


def _print_listing(
    registry: Registry,
    wanted: Callable[[PeerRecord], bool],
    as_json: bool,
    folder: str,
    etcd: str,
) -> None:
    listing = registry.scan()
    records = [record for record in listing.records if wanted(record)]
    if as_json:
        rows = [record.as_dict() for record in records]
        click.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2))
    elif records:
        print_table(
            ("PEER", "URL", "PORT", "PROTOCOL", "PARTITION"),
            [
                (record.peer_id, record.url, record.port, record.protocol, record.partition_key)
                for record in records
            ],
        )
    else:
        such = "such " if listing.records else ""
        click.echo(f"no {such}peers below {folder} in {etcd}")
    if listing.skipped:
        click.echo(
            f"skipped values below {folder} that are not peer records: {listing.skipped}", err=True
        )


def _print_events(registry: Registry, wanted: Callable[[PeerRecord], bool], as_json: bool) -> None:
    logging_setup.configure("info")  # logs when etcd goes away and comes back
    logging_setup.name_process("nodes")
    for event in registry.watch():
        if not wanted(event.record):
            continue
        kind = type(event).__name__.lower()
        if as_json:
            row = {"event": kind, "revision": event.revision, **event.record.as_dict()}
            click.echo(orjson.dumps(row))
        else:
            record = event.record
            time = datetime.now().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
            address = Address(record.url, record.port)
            partition = "" if record.partition_key is None else f"  {record.partition_key}"
            click.echo(
                f"{time}  {kind:7}  {record.peer_id}  {address}  {record.protocol}{partition}"
            )
