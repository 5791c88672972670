"""``peerd ping`` and ``peerd send``"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import click
import orjson

from peerd._envelope import Message
from peerd.address import address_of
from peerd.cli.options import EtcdLocation, json_option, registry_options, seconds_option
from peerd.clients.blocking import PeerClient
from peerd.clients.client_base import DEFAULT_VERSION, failures_named
from peerd.clients.endpoints import resolve
from peerd.errors import NoAnswerError
from peerd.registry.records import PeerRecord

TARGET_HELP = "TARGET is host:port, or a peer id to look up in etcd."


def _check_target(_ctx: click.Context, _parameter: click.Parameter, target: str) -> str:
    if not target or target.startswith(":"):
        raise click.BadParameter(f"{target!r}: write HOST:PORT, or a peer id")
    return target


target_argument = click.argument("target", callback=_check_target)
look_up_options = registry_options("The etcd in which to look up a peer id.")


@click.command(epilog=TARGET_HELP)
@target_argument
@click.option(
    "-c", "--count", type=click.IntRange(1), default=3, show_default=True, help="Number of pings."
)
@seconds_option("-i", "--interval", default=0.2, help="Seconds between two pings.")
@seconds_option("-t", "--timeout", default=1.0, help="Seconds to wait for each answer.")
@look_up_options
@json_option
def ping(
    target: str, count: int, interval: float, timeout: float, etcd: EtcdLocation, as_json: bool
) -> None:
    """Check that a peer answers PING with PONG, and measure round trips.

    The built-in app answers. An app of your own answers if it has a handler for PING that returns a Message
    with the magic code PONG and the same body.

    \b
    Exit codes:
      0    every ping was answered
      1    a ping was not answered
      69   etcd is needed to look up the peer id, and does not answer
    """
    times_ms: list[float] = []
    with _client(target, etcd) as client:
        address = client.locate(target)
        with failures_named(target, address):
            # Resolved once, because resolving a name is not part of a round trip.
            numeric = resolve(address).address
            known = PeerRecord(url=numeric.host, port=numeric.port, peer_id=str(address))
        for sequence in range(1, count + 1):
            if sequence > 1:
                time.sleep(interval)
            body = b"%d %d" % (sequence, time.monotonic_ns())
            started_ns = time.perf_counter_ns()
            try:
                client.request(known, "PING", body, timeout, is_answer=_pong_of(body))
            except NoAnswerError as error:
                if not as_json:
                    click.echo(f"{error} (seq={sequence})")
                continue
            times_ms.append((time.perf_counter_ns() - started_ns) / 1e6)
            if not as_json:
                click.echo(f"PONG from {address}: seq={sequence} time={times_ms[-1]:.3f} ms")
    summary = {"target": target, "address": str(address), "sent": count, "answered": len(times_ms)}
    if as_json:
        click.echo(orjson.dumps({**summary, "times_ms": times_ms}))
    else:
        spread = ""
        if times_ms:
            low, middle, high = min(times_ms), statistics.median(times_ms), max(times_ms)
            spread = f"; min {low:.3f}, median {middle:.3f}, max {high:.3f} ms"
        click.echo(f"{count} sent, {len(times_ms)} answered{spread}")
    if len(times_ms) < count:
        sys.exit(1)


@click.command(epilog=TARGET_HELP)
@target_argument
@click.argument("magic")
@click.argument("body", default="")
@click.option(
    "--version", default=DEFAULT_VERSION, show_default=True, help="Version of the message."
)
@seconds_option(
    "-t", "--timeout", default=1.0, help="Seconds to wait for a reply; 0 does not wait."
)
@look_up_options
@json_option
def send(
    target: str,
    magic: str,
    body: str,
    version: str,
    timeout: float,
    etcd: EtcdLocation,
    as_json: bool,
) -> None:
    """Send a message and print the body of its reply. With - as BODY, read it from standard input.

    \b
    Exit codes:
      0    a reply came (or --timeout is 0)
      1    no reply came in time
      69   etcd is needed to look up the peer id, and does not answer
    """
    payload = sys.stdin.buffer.read() if body == "-" else body.encode()
    for name, text in (("MAGIC", magic), ("--version", version)):
        if not text.isascii():
            raise click.BadParameter(f"{text!r} is not ASCII", param_hint=name)
    with _client(target, etcd) as client:
        address = client.locate(target)
        if timeout == 0:
            client.send(address, magic, payload, version=version)
            return
        reply = client.request(address, magic, payload, timeout, version=version)
    if as_json:
        text = reply.body.decode("utf-8", "backslashreplace")
        fields = {"magic": reply.magic, "version": reply.version, "body": text}
        click.echo(orjson.dumps({**fields, "sender": str(address)}))
    else:
        click.echo(reply.body)


class _Listing:
    """The peers that are in etcd at the time of each call."""

    def __init__(self, etcd: EtcdLocation) -> None:
        self._etcd = etcd

    def get(self, peer_id: str) -> PeerRecord | None:
        return next((record for record in self.nodes() if record.peer_id == peer_id), None)

    def nodes(self, *, partition_key: str | None = None) -> list[PeerRecord]:
        with self._etcd.open() as registry:
            return registry.nodes(partition_key=partition_key)


def _client(target: str, etcd: EtcdLocation) -> PeerClient:
    # An address needs no etcd.
    return PeerClient(None if address_of(target) else _Listing(etcd))


def _pong_of(body: bytes) -> Callable[[Message], bool]:
    return lambda reply: reply.magic == "PONG" and reply.body == body
