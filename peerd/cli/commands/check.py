"""``peerd check``"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import orjson

from peerd import __version__
from peerd.cli import exit_code_of
from peerd.cli.app_probe import FoundApp, probe
from peerd.cli.options import json_option
from peerd.cli.setting_options import (
    LaunchOptions,
    Setting,
    SupervisorCommand,
    supervisor_options,
)
from peerd.cli.text_output import counted, print_table
from peerd.errors import (
    AppLoadError,
    BindError,
    ControlError,
    NotRunningError,
    PeerdError,
    RegistryError,
    RegistryUnavailableError,
)
from peerd.settings import DEFAULT_ENDPOINT, RegistrySettings, SupervisorSettings


@dataclass
class _Findings:
    problems: list[PeerdError] = field(default_factory=list)
    """Reasons why 'peerd supervise' would not run."""

    warnings: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Record an error and continue, so that one problem does not hide another."""
        try:
            yield
        except (BindError, AppLoadError) as error:
            self.problems.append(error)


@dataclass(frozen=True, kw_only=True)
class _Registry:
    endpoint: str
    prefix: str
    records: int | None  # None if etcd does not answer
    starts_etcd: bool  # Whether 'peerd supervise' would start an etcd

    def __str__(self) -> str:
        keys = f"keys {self.prefix}/..."
        if self.starts_etcd:
            return f"peerd would start an etcd at {self.endpoint}, with throw-away data; {keys}"
        answer = "no answer" if self.records is None else f"answers, records: {self.records}"
        return f"etcd at {self.endpoint} ({answer}); {keys}"


@click.command(cls=SupervisorCommand)
@supervisor_options
@json_option
@click.pass_context
def check(
    ctx: click.Context, settings: SupervisorSettings, launch: LaunchOptions, as_json: bool
) -> None:
    """Validate the options of 'peerd supervise' without starting anything, and print what would run.

    Validates the settings, binds and releases the ports, imports the app in a process of its own, and asks
    etcd. Prints what would run, and which settings come from a flag, a variable or the file. An etcd that
    does not answer is a warning, because peers serve without it.

    \b
    Exit codes:
      0    'peerd supervise' would run
      2    bad option
      73   a port cannot be bound
      78   bad file, or the app cannot be loaded
    """
    from peerd.cli.commands.supervise import raise_descriptor_limit

    assert isinstance(ctx.command, SupervisorCommand)
    findings = _Findings(warnings=ctx.command.misspelt_variables())
    raise_descriptor_limit(settings.peers)
    _try_sockets(settings, findings)
    app = None
    with findings.collecting():
        app = probe(settings.app, settings.boot_timeout_s)
    registry = _ask_etcd(settings.registry, launch.etcd_is_named, findings)
    _ask_control_socket(launch, findings)
    changed = ctx.command.changed_settings(ctx)
    if as_json:
        click.echo(_as_json(settings, launch, app, registry, changed, findings))
    else:
        _print(settings, launch, app, registry, changed, would_run=not findings.problems)
        for text in (*(f"warning: {text}" for text in findings.warnings), *findings.problems):
            click.echo(f"peerd check: {text}", err=True)
    if findings.problems:
        sys.exit(exit_code_of(findings.problems[0]))


def _try_sockets(settings: SupervisorSettings, findings: _Findings) -> None:
    from peerd.supervisor.sockets import bind_all, listen

    with findings.collecting():
        for sock in bind_all(
            settings.host, settings.base_port, settings.peers, settings.recv_buffer_bytes
        ):
            sock.close()
    if settings.metrics is not None:
        with findings.collecting():
            listen(settings.metrics, "--metrics").close()


def _ask_etcd(settings: RegistrySettings, is_named: bool, findings: _Findings) -> _Registry:
    from peerd.registry import embedded_etcd

    records, starts = None, False
    if is_named or embedded_etcd.is_listening(DEFAULT_ENDPOINT):
        from peerd.registry import Registry

        try:
            with Registry(settings.endpoint, settings.prefix, access=settings.access) as registry:
                records = len(registry.nodes())
        except RegistryError as error:
            is_away = isinstance(error, RegistryUnavailableError)
            then = "register later" if is_away else "not register until this is corrected"
            findings.warnings.append(f"{error}; the peers would serve, and {then}")
    elif embedded_etcd.find_etcd() is None:
        findings.warnings.append(
            f"no etcd listens at {DEFAULT_ENDPOINT}; the peers would serve, and register once one does. "
            f"{embedded_etcd.HOW_TO_GET_ETCD}"
        )
    else:
        starts = True
    return _Registry(
        endpoint=settings.endpoint, prefix=settings.prefix, records=records, starts_etcd=starts
    )


def _ask_control_socket(launch: LaunchOptions, findings: _Findings) -> None:
    from peerd import control

    trouble = ""
    try:
        report = control.request(launch.control_path, "status", timeout_s=1.0)
        findings.warnings.append(
            f"supervisor pid {report['supervisor']['pid']} answers at {launch.control_path}: 'peerd status' "
            "would not reach a second supervisor there"
        )
    except NotRunningError:
        trouble = _trouble_with_place(launch.control_path)
    except ControlError as error:
        trouble = str(error)
    if trouble:
        findings.warnings.append(
            f"'peerd status' would not work with this control socket: {trouble}"
        )


def _trouble_with_place(path: Path) -> str:
    """Why no socket can be created there, or an empty string. Only the last folder would be created."""
    if path.exists() and not path.is_socket():
        return f"{path} exists and is not a socket"
    folder = path.parent if path.parent.exists() else path.parent.parent
    if not folder.is_dir():
        return f"{folder} is not a folder"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} is not writable"


def _print(
    settings: SupervisorSettings,
    launch: LaunchOptions,
    app: FoundApp | None,
    registry: _Registry,
    changed: list[Setting],
    *,
    would_run: bool,
) -> None:
    would = "would" if would_run else "would not"
    metrics = f"http://{settings.metrics}/metrics" if settings.metrics else "none"
    click.echo(
        f"peerd {__version__}, supervise {would} run: {counted(settings.peers, 'peer')} on "
        f"{settings.host}, {settings.port_range}\n"
        f"  app       {_describe(settings.app, app)}\n"
        f"  registry  {registry}\n"
        f"  control   {launch.control_path}\n"
        f"  metrics   {metrics}\n"
    )
    if changed:
        print_table(("SETTING", "VALUE", "FROM"), changed)
    else:
        click.echo("every setting has its default value")


def _describe(name: str | None, app: FoundApp | None) -> str:
    if app is None:
        return f"{name} cannot be loaded"
    codes = [
        *app.handlers,
        *(f"{magic} (async)" for magic in app.coroutine_handlers),
        *(f"{magic} (batch)" for magic in app.batch_handlers),
    ]
    return f"{name or 'built-in'}: {', '.join(codes) or 'answers nothing: it has no handler'}"


def _as_json(
    settings: SupervisorSettings,
    launch: LaunchOptions,
    app: FoundApp | None,
    registry: _Registry,
    changed: list[Setting],
    findings: _Findings,
) -> bytes:
    return orjson.dumps(
        {
            "ok": not findings.problems,
            "problems": [
                {"exit_code": exit_code_of(problem), "text": str(problem)}
                for problem in findings.problems
            ],
            "warnings": findings.warnings,
            "peers": [
                {"slot": slot, "peer_id": settings.peer_id(slot), "port": settings.base_port + slot}
                for slot in range(settings.peers)
            ],
            "host": settings.host,
            "app": None if app is None else {"name": settings.app, **asdict(app)},
            "registry": asdict(registry),
            "control": str(launch.control_path),
            "metrics": str(settings.metrics) if settings.metrics else None,
            "settings": [setting._asdict() for setting in changed],
        },
        option=orjson.OPT_INDENT_2,
    )
