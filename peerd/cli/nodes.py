"""``peerd nodes``"""

from __future__ import annotations

import click
import orjson

from peerd.cli.options import etcd_option, json_option, prefix_option
from peerd.cli.table import print_table


@click.command()
@etcd_option()
@prefix_option
@json_option
def nodes(etcd: str, prefix: str, as_json: bool) -> None:
    """List the peers that are registered in etcd, FaasNet's included.

    Values under the prefix that are no peer record are left out and counted (on standard error).
    Exit code 69 when etcd does not answer.
    """
    from peerd.registry import Registry

    with Registry(etcd, prefix) as registry:
        listing = registry.scan()
    if as_json:
        rows = [record.as_dict() for record in listing.records]
        click.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2))
    elif listing.records:
        print_table(
            ("PEER", "URL", "PORT", "PROTOCOL", "PARTITION"),
            [
                (record.peer_id, record.url, record.port, record.protocol, record.partition_key)
                for record in listing.records
            ],
        )
    else:
        click.echo(f"no peers under {prefix}/ in {etcd}")
    if listing.skipped:
        click.echo(f"skipped under {prefix}/, no peer records: {listing.skipped}", err=True)
