"""The options of ``peerd supervise``, for every command that takes them.

A setting has one name: ``--base-port`` is ``PEERD_SUPERVISE_BASE_PORT`` or ``PEERD_BASE_PORT`` in the
environment and ``base-port`` in ``peerd.toml``.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
from click.core import ParameterSource

from peerd import control
from peerd.cli.config_file import BadConfigError, read_config
from peerd.cli.field_options import FieldOption, add_options, settings_from
from peerd.cli.options import PASSWORD_VARIABLE, access_from
from peerd.errors import SettingsError
from peerd.settings import EtcdAccess, SupervisorSettings, default_linger_us, setting
from peerd.supervisor.pinning import cpu_count

SPECIFIC, GENERAL = "PEERD_SUPERVISE_", "PEERD_"

LIKENESS = 0.8
"""Similarity from which a variable counts as a misspelt setting. Other variables that begin with PEERD_ may
belong to an app, or come from Kubernetes for a service called peerd (PEERD_PORT_5001_UDP)."""


_operation = functools.partial(setting, "Operation")


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Options of the command that starts a supervisor, beside the settings of the supervisor itself."""

    etcd_is_named: bool
    """Whether --etcd was given. Otherwise an etcd may be started at the default endpoint."""

    control_path: Path = _operation(
        "control",
        "Path of the control socket.  [default: BASE-PORT.sock in $XDG_RUNTIME_DIR/peerd/; without "
        "XDG_RUNTIME_DIR, in /run/peerd/ for root and in /tmp/peerd-UID/ for other users]",
    )
    log_level: Literal["debug", "info", "warning", "error"] = _operation(
        "log-level", "Lowest level to log. The log goes to standard error.", "info"
    )
    log_format: Literal["auto", "text", "json"] = _operation(
        "log-format", "auto: text on a terminal, else JSON lines.", "auto"
    )


class Setting(NamedTuple):
    name: str  # The flag without its dashes
    value: str
    origin: str  # ``--peers``, ``PEERD_PEERS`` or the path of the file


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
    def settings(self) -> dict[str, FieldOption]:
        """The options that are settings (unlike --json), by flag without the dashes."""
        return {p.opts[0].removeprefix("--"): p for p in self.params if isinstance(p, FieldOption)}

    def changed_settings(self, ctx: click.Context) -> list[Setting]:
        """The settings that were given, and where each comes from."""
        return [
            Setting(flag, _as_text(ctx.params[str(parameter.name)]), origin)
            for flag, parameter in self.settings.items()
            if (origin := self._origin(ctx, parameter)) is not None
        ]

    def misspelt_variables(self) -> list[str]:
        """A line for each environment variable that looks like a setting but is not one."""
        known = {
            str(name) for parameter in self.settings.values() for name in parameter.envvar or ()
        }
        unknown = {name for name in os.environ if name.startswith(GENERAL)} - known
        return [
            f"{name} is not a setting: {_meant(name, known)}"
            for name in sorted(unknown - {PASSWORD_VARIABLE})
            if name.startswith(SPECIFIC) or _meant(name, known)
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.BadParameter as error:
            if error.param is None or not self._is_from_environment(ctx, error.param):
                raise
            # click lists the empty string among the words for a boolean.
            message = error.message.rstrip(".").replace(": , ", ": ")
            text = f"{message} (from {self._origin(ctx, error.param)})"
            raise click.BadParameter(text, ctx, error.param) from None

    def invoke(self, ctx: click.Context) -> Any:
        with self.errors_traced(ctx):
            return super().invoke(ctx)

    @contextlib.contextmanager
    def errors_traced(self, ctx: click.Context) -> Iterator[None]:
        """Add the origin of the values to a SettingsError; if a file is one, make it a BadConfigError."""
        try:
            yield
        except SettingsError as error:
            raise self._traced(ctx, error) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            section = parameter.section if isinstance(parameter, FieldOption) else "Other"
            if record := parameter.get_help_record(ctx):
                sections.setdefault(section, []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)

    def _origin(self, ctx: click.Context, parameter: click.Parameter) -> str | None:
        """None for a default value."""
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

    @functools.wraps(command)
    def with_settings(**values: Any) -> Any:
        ctx = click.get_current_context()
        assert isinstance(ctx.command, SupervisorCommand)
        settings = settings_of(ctx, access_from(values))
        launch = settings_from(
            LaunchOptions,
            values,
            etcd_is_named=is_given(ctx, "etcd"),
            control_path=values["control"] or control.default_path(settings.base_port),
        )
        own = {parameter.name for parameter in ctx.command.settings.values()}
        others = {name: value for name, value in values.items() if name not in own}
        return command(settings=settings, launch=launch, **others)

    config = click.option(
        "--config",
        cls=FieldOption,
        section="Operation",
        type=click.Path(path_type=Path),
        is_eager=True,
        callback=_read_config,
        help="A TOML file with these options, such as: peers = 8",
    )
    return add_options(add_options(config(with_settings), LaunchOptions), SupervisorSettings)


def settings_of(ctx: click.Context, access: EtcdAccess) -> SupervisorSettings:
    """From the parsed options of a SupervisorCommand. Raises SettingsError."""
    values = dict(ctx.params)
    if not is_given(ctx, "linger"):
        values["linger"] = default_linger_us(values["peers"], cpu_count())
    return settings_from(SupervisorSettings, values, access=access)


def is_given(ctx: click.Context, name: str) -> bool:
    """Whether an option has its value from a flag, a variable or a file."""
    return ctx.get_parameter_source(name) is not ParameterSource.DEFAULT


def _read_config(ctx: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    """Use the values of the file as defaults, so that flags and environment variables win."""
    if path is not None:
        assert isinstance(ctx.command, SupervisorCommand)
        settings = {flag: p for flag, p in ctx.command.settings.items() if flag != "config"}
        ctx.default_map = {**(ctx.default_map or {}), **read_config(path, settings, ctx)}
    return path


def _meant(name: str, known: Iterable[str]) -> str:
    """A suggestion for an unknown variable; empty if it begins with PEERD_ but resembles no setting."""
    import difflib

    is_specific = name.startswith(SPECIFIC)
    prefix = SPECIFIC if is_specific else GENERAL
    # Compared without the common prefix, which would make all of them similar.
    endings = [
        other.removeprefix(prefix) for other in known if other.startswith(SPECIFIC) == is_specific
    ]
    close = difflib.get_close_matches(name.removeprefix(prefix), endings, 1, LIKENESS)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    return "'peerd supervise --help' names them" if is_specific else ""


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
