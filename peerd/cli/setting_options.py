"""The options of ``peerd supervise``, for every command that takes them.

One source for each setting: its flag, its environment variables and its key in ``peerd.toml`` have one
name. ``--base-port`` is ``PEERD_SUPERVISE_BASE_PORT``, or else ``PEERD_BASE_PORT``, or else ``base-port``
in the file.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
from click.core import ParameterSource

from peerd import control
from peerd.cli.config_file import BadConfigError, read_config
from peerd.cli.options import (
    HOST_PORT,
    PASSWORD_VARIABLE,
    POSITIVE_SECONDS,
    SIZE,
    Seconds,
    access_options,
    etcd_option,
    prefix_option,
)
from peerd.errors import SettingsError
from peerd.settings import (
    DEFAULT_ENDPOINT,
    MIN_AGE_S,
    DatagramSettings,
    EtcdAccess,
    OnCrashloop,
    RegistrySettings,
    SupervisorSettings,
    default_linger_us,
)
from peerd.supervisor.pinning import cpu_count

SECTIONS = {
    "Peers": ("peers", "base-port", "host", "advertise", "app"),
    "Registry": (
        "etcd",
        "prefix",
        "partition-key",
        "ttl",
        "etcd-user",
        "etcd-password-file",
        "etcd-ca",
        "etcd-cert",
        "etcd-key",
    ),
    "Datagrams": ("offload", "linger", "recv-buffer"),
    "Workers": (
        "pin",
        "boot-timeout",
        "stuck-timeout",
        "drain-timeout",
        "stop-timeout",
        "on-crashloop",
        "max-age",
        "max-rss",
    ),
    "Operation": ("control", "metrics", "log-level", "log-format", "config"),
}
"""How --help groups the flags. What is not here is no setting (--json)."""

SPECIFIC, GENERAL = "PEERD_SUPERVISE_", "PEERD_"

LIKENESS = 0.8
"""From which on a variable is taken for a misspelt one. Others that begin with PEERD_ are not ours to
judge: an app's own, and those that Kubernetes sets for a service called peerd (PEERD_PORT_5001_UDP)."""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What the supervisor is not told, but the command that starts it."""

    etcd_is_named: bool
    """By --etcd. Otherwise one may be started at the default endpoint."""

    control_path: Path
    log_level: str
    log_format: str


class Setting(NamedTuple):
    name: str
    """The flag without its dashes."""

    value: str
    origin: str
    """``--peers``, ``PEERD_PEERS`` or the path of the file."""


class SupervisorCommand(click.Command):
    """A command with the options of ``peerd supervise``; use with ``supervisor_options``."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        for flag, parameter in self.settings.items():
            name = flag.upper().replace("-", "_")
            parameter.envvar = [f"{SPECIFIC}{name}", f"{GENERAL}{name}"]
            assert isinstance(parameter, click.Option)
            parameter.allow_from_autoenv = False  # check would also read PEERD_CHECK_PEERS

    @property
    def settings(self) -> dict[str, click.Parameter]:
        """By flag without the dashes."""
        found = {parameter.opts[0].removeprefix("--"): parameter for parameter in self.params}
        return {flag: found[flag] for flags in SECTIONS.values() for flag in flags}

    def changed_settings(self, ctx: click.Context) -> list[Setting]:
        """Those that do not have their default, with where they come from."""
        return [
            Setting(flag, _as_text(ctx.params[str(parameter.name)]), origin)
            for flag, parameter in self.settings.items()
            if (origin := self._origin(ctx, parameter)) is not None
        ]

    def misspelt_variables(self) -> list[str]:
        """A line for each environment variable that looks like a setting and is none."""
        known = {
            str(name) for parameter in self.settings.values() for name in parameter.envvar or ()
        }
        unknown = {name for name in os.environ if name.startswith(GENERAL)} - known
        return [
            f"{name} is no setting: {_meant(name, known)}"
            for name in sorted(unknown - {PASSWORD_VARIABLE})
            if name.startswith(SPECIFIC) or _meant(name, known)
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.BadParameter as error:
            if error.param is None or not self._is_from_environment(ctx, error.param):
                raise
            # One of the words that click takes for a boolean is the empty one.
            message = error.message.rstrip(".").replace(": , ", ": ")
            text = f"{message} (from {self._origin(ctx, error.param)})"
            raise click.BadParameter(text, ctx, error.param) from None

    def invoke(self, ctx: click.Context) -> Any:
        with self.errors_traced(ctx):
            return super().invoke(ctx)

    @contextlib.contextmanager
    def errors_traced(self, ctx: click.Context) -> Iterator[None]:
        """A SettingsError then says where the values come from, and is a BadConfigError for a file's."""
        try:
            yield
        except SettingsError as error:
            raise self._traced(ctx, error) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        settings = self.settings
        others = [
            parameter for parameter in self.get_params(ctx) if parameter not in settings.values()
        ]
        groups = [(title, [settings[flag] for flag in flags]) for title, flags in SECTIONS.items()]
        for title, parameters in (*groups, ("Other", others)):
            with formatter.section(title):
                records = [parameter.get_help_record(ctx) for parameter in parameters]
                formatter.write_dl([record for record in records if record is not None])

    def _origin(self, ctx: click.Context, parameter: click.Parameter) -> str | None:
        """None for a default."""
        source = ctx.get_parameter_source(str(parameter.name))
        if source is ParameterSource.COMMANDLINE:
            return parameter.opts[0]
        if self._is_from_environment(ctx, parameter):
            names = [str(name) for name in parameter.envvar or ()]
            return next((name for name in names if os.environ.get(name)), "the environment")
        if source is ParameterSource.DEFAULT_MAP:
            return str(ctx.params["config"])
        return None

    def _is_from_environment(self, ctx: click.Context, parameter: click.Parameter) -> bool:
        source = ctx.get_parameter_source(str(parameter.name))
        return source is ParameterSource.ENVIRONMENT

    def _traced(self, ctx: click.Context, error: SettingsError) -> Exception:
        settings, origins, from_file = self.settings, [], False
        for flag in filter(settings.__contains__, error.flags):
            origin = self._origin(ctx, settings[flag])
            if origin is not None and not origin.startswith("--"):
                origins.append(f"{flag} is from {origin}")
                from_file |= origin == str(ctx.params["config"])
        if not origins:
            return error
        text = f"{error} ({', '.join(origins)})"
        return BadConfigError(text) if from_file else SettingsError(text, *error.flags)


def supervisor_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Every option of ``peerd supervise``, as ``settings: SupervisorSettings`` and
    ``launch: LaunchOptions``."""

    @access_options
    @functools.wraps(command)
    def with_settings(*, access: EtcdAccess, **values: Any) -> Any:
        this = click.get_current_context().command
        assert isinstance(this, SupervisorCommand)
        settings = settings_of(values, access)
        launch = LaunchOptions(
            etcd_is_named=values["etcd"] is not None,
            control_path=values["control_path"] or control.default_path(settings.base_port),
            log_level=values["log_level"],
            log_format=values["log_format"],
        )
        own = {str(parameter.name) for parameter in this.settings.values()}
        others = {name: value for name, value in values.items() if name not in own}
        return command(settings=settings, launch=launch, **others)

    for option in _options():
        with_settings = option(with_settings)
    return with_settings


def settings_of(values: Mapping[str, Any], access: EtcdAccess) -> SupervisorSettings:
    """Of what was read for the options, by the names of their parameters. Raises SettingsError."""
    peers, linger, etcd = values["peers"], values["linger"], values["etcd"]
    return SupervisorSettings(
        peers=peers,
        base_port=values["base_port"],
        host=values["host"],
        advertise=values["advertise"],
        app=values["app"],
        partition_key=values["partition_key"],
        registry=RegistrySettings(
            endpoint=DEFAULT_ENDPOINT if etcd is None else etcd,
            access=access,
            prefix=values["prefix"],
            lease_ttl_s=values["ttl"],
        ),
        datagrams=DatagramSettings(
            offload=values["offload"],
            linger_us=default_linger_us(peers, cpu_count()) if linger is None else linger,
        ),
        recv_buffer_bytes=values["recv_buffer"],
        pin=values["pin"] == "auto",
        boot_timeout_s=values["boot_timeout"],
        stuck_timeout_s=values["stuck_timeout"],
        drain_timeout_s=values["drain_timeout"],
        stop_timeout_s=values["stop_timeout"],
        on_crashloop=OnCrashloop(values["on_crashloop"]),
        max_age_s=values["max_age"],
        max_rss_bytes=values["max_rss"],
        metrics=values["metrics"],
    )


def _options() -> Sequence[Callable[[Callable[..., Any]], Callable[..., Any]]]:
    return (
        click.option(
            "--peers",
            type=int,
            default=SupervisorSettings.peers,
            show_default=True,
            help="How many.",
        ),
        click.option(
            "--base-port",
            type=int,
            default=SupervisorSettings.base_port,
            show_default=True,
            help="Peer i serves UDP port BASE-PORT + i.",
        ),
        click.option(
            "--host",
            default=SupervisorSettings.host,
            show_default=True,
            help="The address to bind; 0.0.0.0 for all.",
        ),
        click.option(
            "--advertise", metavar="HOST", help="The host name in the records, if not --host."
        ),
        click.option(
            "--app", metavar="MODULE:ATTR", help="Your peerd.App. Without it: PING and ECHO."
        ),
        etcd_option(
            default=None,
            help=f"The etcd to register in. Without it: {DEFAULT_ENDPOINT}, and one is started there, "
            "with throw-away data, if nobody listens.",
        ),
        prefix_option,
        click.option(
            "--partition-key", metavar="KEY", help="What the records carry as PartitionKey."
        ),
        click.option(
            "--ttl",
            type=int,
            default=RegistrySettings.lease_ttl_s,
            show_default=True,
            help="Lease of the records, in seconds.",
        ),
        click.option(
            "--offload/--no-offload",
            default=DatagramSettings.offload,
            show_default=True,
            help="Let the kernel join datagrams of one size (UDP_GRO, UDP_SEGMENT).",
        ),
        click.option(
            "--linger",
            type=int,
            metavar="MICROSECONDS",
            help="Wait for more after a short batch, where it pays: less CPU time, a later answer. 0 for "
            "never.  [default: 0 when each peer has a core, else 50 for each peer on a core, at most 400]",
        ),
        click.option(
            "--recv-buffer",
            type=SIZE,
            default=SupervisorSettings.recv_buffer_bytes,
            show_default=True,
            help="Kernel receive buffer of each peer: bytes, or 4M.",
        ),
        click.option(
            "--pin",
            type=click.Choice(["auto", "none"]),
            default="none",
            show_default=True,
            help="auto: a CPU for each worker, of those that this process may use, in turn.",
        ),
        click.option(
            "--boot-timeout",
            type=POSITIVE_SECONDS,
            default=SupervisorSettings.boot_timeout_s,
            show_default=True,
            help="Seconds in which a worker must have loaded the app.",
        ),
        click.option(
            "--stuck-timeout",
            type=POSITIVE_SECONDS,
            default=SupervisorSettings.stuck_timeout_s,
            show_default=True,
            help="Seconds after which a worker whose handler does not return is killed and replaced.",
        ),
        click.option(
            "--drain-timeout",
            type=POSITIVE_SECONDS,
            default=SupervisorSettings.drain_timeout_s,
            show_default=True,
            help="Seconds for which a stopping worker serves what its queue still holds.",
        ),
        click.option(
            "--stop-timeout",
            type=POSITIVE_SECONDS,
            default=SupervisorSettings.stop_timeout_s,
            show_default=True,
            help="Hard end of a stop, in seconds.",
        ),
        click.option(
            "--on-crashloop",
            type=click.Choice([choice.value for choice in OnCrashloop]),
            default=SupervisorSettings.on_crashloop.value,
            show_default=True,
            help="When a worker has died too often: retry it once a minute, or stop all and exit with 70.",
        ),
        click.option(
            "--max-age",
            type=Seconds(min=MIN_AGE_S),
            metavar="SECONDS",
            help="Replace a worker that has been ready for so long, losing nothing.",
        ),
        click.option(
            "--max-rss",
            type=SIZE,
            metavar="SIZE",
            help="Replace a worker whose resident memory is above this (bytes, or 256M, 1G), losing "
            "nothing.",
        ),
        click.option(
            "--control",
            "control_path",
            type=click.Path(path_type=Path),
            help="Path of the control socket.  [default: BASE-PORT.sock in $XDG_RUNTIME_DIR/peerd/, else in "
            "/run/peerd/ for root, in /tmp/peerd-UID/ for others]",
        ),
        click.option(
            "--metrics",
            type=HOST_PORT,
            metavar="HOST:PORT",
            help="Serve /metrics (Prometheus text), /healthz/live and /healthz/ready here, over HTTP, to "
            "whoever reaches it.",
        ),
        click.option(
            "--log-level",
            type=click.Choice(["debug", "info", "warning", "error"]),
            default="info",
            show_default=True,
            help="What is logged, on standard error.",
        ),
        click.option(
            "--log-format",
            type=click.Choice(["auto", "text", "json"]),
            default="auto",
            show_default=True,
            help="auto: text on a terminal, else JSON lines.",
        ),
        click.option(
            "--config",
            type=click.Path(path_type=Path),
            is_eager=True,
            callback=_read_config,
            help="A TOML file with these options: peers = 8.",
        ),
    )


def _read_config(ctx: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    """The file gives defaults: flags and environment variables win."""
    if path is not None:
        assert isinstance(ctx.command, SupervisorCommand)
        settings = {flag: p for flag, p in ctx.command.settings.items() if flag != "config"}
        ctx.default_map = {**(ctx.default_map or {}), **read_config(path, settings, ctx)}
    return path


def _meant(name: str, known: Iterable[str]) -> str:
    """What an unknown variable is taken for; nothing for a general one that is like none of ours."""
    import difflib

    is_specific = name.startswith(SPECIFIC)
    prefix = SPECIFIC if is_specific else GENERAL
    # Without what all of them begin with, which would make all of them alike.
    endings = [
        other.removeprefix(prefix) for other in known if other.startswith(SPECIFIC) == is_specific
    ]
    close = difflib.get_close_matches(name.removeprefix(prefix), endings, 1, LIKENESS)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    return "'peerd supervise --help' names them" if is_specific else ""


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
