"""``peerd chaos``: peerd.cli imports this module when the command is used."""

from __future__ import annotations

import dataclasses
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click
import orjson

from peerd.cli.option_types import SECONDS
from peerd.cli.options import json_option
from peerd.cli.text_output import print_table
from peerd.settings import MAX_PEERS
from peerd_chaos.schedule import Kind

if TYPE_CHECKING:
    from peerd_chaos.drive import ChaosReport, ChaosSettings

DEFAULT_SECONDS = 20.0
DEFAULT_PEERS = 4
DEFAULT_RATE = 4000.0
KINDS = ", ".join(Kind)


class _Kinds(click.ParamType):  # type: ignore[type-arg]
    name = "kinds"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> frozenset[Kind]:
        if isinstance(value, frozenset):
            return value
        names = {name.strip() for name in str(value).split(",")}
        if unknown := names - set(Kind):
            self.fail(
                f"unknown actions: {', '.join(sorted(unknown))}; known actions: {KINDS}", param, ctx
            )
        return frozenset(Kind(name) for name in names)


@click.command()
@click.option(
    "--seconds",
    type=SECONDS,
    default=DEFAULT_SECONDS,
    show_default=True,
    help="Duration of the faults.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), help="Repeat the run of this seed.  [default: random]"
)
@click.option(
    "--peers",
    type=click.IntRange(1, MAX_PEERS),
    default=DEFAULT_PEERS,
    show_default=True,
    help="Peers at the beginning.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=1),
    default=DEFAULT_RATE,
    show_default=True,
    help="Datagrams per second to all peers.",
)
@click.option(
    "--actions",
    "kinds",
    type=_Kinds(),
    default=frozenset(Kind),
    metavar="KIND[,KIND...]",
    help=f"Only these faults, of {KINDS}.",
)
@click.option("--coroutines", is_flag=True, help="Use coroutines as handlers.")
@click.option("--keep", is_flag=True, help="Keep the supervisor's log in any case.")
@click.option(
    "--log-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the log in this directory.  [default: a new one, if the log is kept]",
)
@json_option
def chaos(
    seconds: float,
    seed: int | None,
    peers: int,
    rate: float,
    kinds: frozenset[Kind],
    coroutines: bool,
    keep: bool,
    log_dir: Path | None,
    as_json: bool,
) -> None:
    """Inject faults into a supervisor under load and verify its guarantees.

    The command starts a supervisor and an etcd. Workers and the registrar are killed, stopped and
    replaced, peers are added and removed, etcd stops and dies, at random times that the seed decides.
    Afterwards every peer must be ready again, every loss must be reported, and nothing may be left over.
    Otherwise the supervisor's log is kept.

    \b
    Exit codes:
      0    every guarantee holds
      1    a guarantee does not hold
    """
    # Not imported at the top, so that --help is fast.
    from peerd_chaos.drive import ChaosSettings, run

    settings = ChaosSettings(
        seed=random.randrange(1 << 32) if seed is None else seed,
        seconds=seconds,
        peers=peers,
        rate=rate,
        coroutines=coroutines,
        kinds=kinds,
    )
    click.echo(f"repeat with: {_command_line(settings)}", err=True)
    if log_dir is None:
        folder = Path(tempfile.mkdtemp(prefix="peerd-chaos-"))
    else:
        folder = log_dir / f"seed-{settings.seed}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise click.BadParameter(
                f"cannot make {folder}: {error.strerror}", param_hint="--log-dir"
            ) from None
    broken = True
    try:
        report = run(settings, folder, _print_progress)
        broken = bool(report.broken)
    finally:
        if broken or keep or log_dir is not None:
            click.echo(f"the supervisor's log is {folder / 'err'}", err=True)
        else:
            shutil.rmtree(folder)
    _show(report, as_json)
    if broken:
        for row in report.broken:
            click.echo(f"peerd chaos: seed {report.seed}: {row.name}: {row.counted}", err=True)
        sys.exit(1)


def _print_progress(at_s: float, text: str) -> None:
    click.echo(f"{at_s:7.2f}  {text}", err=True)


def _show(report: ChaosReport, as_json: bool) -> None:
    if as_json:
        document = {"holds": not report.broken, **dataclasses.asdict(report)}
        click.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2))
        return
    print_table(
        ("INVARIANT", "HOLDS", "COUNTED"),
        [(row.name, "yes" if row.holds else "NO", row.counted) for row in report.invariants],
    )


def _command_line(settings: ChaosSettings) -> str:
    """The command that repeats this run."""
    words = [f"peerd chaos --seed {settings.seed} --seconds {_exact(settings.seconds)}"]
    words.append(f"--peers {settings.peers} --rate {_exact(settings.rate)}")
    if settings.coroutines:
        words.append("--coroutines")
    if settings.kinds != frozenset(Kind):
        words.append(f"--actions {','.join(kind for kind in Kind if kind in settings.kinds)}")
    return " ".join(words)


def _exact(number: float) -> str:
    """A text that reads as the same number."""
    return str(int(number)) if number.is_integer() else repr(number)
