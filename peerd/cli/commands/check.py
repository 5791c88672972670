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
from peerd.cli.app_probe import FoundApp, probe
from peerd.cli.options import json_option
from peerd.cli.setting_options import (
    LaunchOptions,
    Setting,
    SupervisorCommand,
    supervisor_options,
)
from peerd.cli.table import print_table
from peerd.cli.wording import counted, ports
from peerd.errors import (
    AppLoadError,
    BindError,
    ControlError,
    NotRunningError,
    RegistryError,
    RegistryUnavailableError,
)
from peerd.settings import DEFAULT_ENDPOINT, RegistrySettings, SupervisorSettings

EX_CANTCREAT = 73
EX_CONFIG = 78


@dataclass(frozen=True)
class Problem:
    exit_code: int
    text: str


@dataclass
class _Findings:
    problems: list[Problem] = field(default_factory=list)
    """What would keep 'supervise' from running."""

    warnings: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """One problem does not hide another."""
        try:
            yield
        except BindError as error:
            self.problems.append(Problem(EX_CANTCREAT, str(error)))
        except AppLoadError as error:
            self.problems.append(Problem(EX_CONFIG, str(error)))


@dataclass(frozen=True, kw_only=True)
class _Registry:
    endpoint: str
    prefix: str
    records: int | None
    """None: no answer."""

    starts_etcd: bool
    """'supervise' would start one."""

    def __str__(self) -> str:
        keys = f"keys {self.prefix}/..."
        if self.starts_etcd:
            return f"an etcd would be started at {self.endpoint}, with throw-away data; {keys}"
        answer = "no answer" if self.records is None else f"answers, records: {self.records}"
        return f"etcd at {self.endpoint} ({answer}); {keys}"


@click.command(cls=SupervisorCommand)
@supervisor_options
@json_option
@click.pass_context
def check(
    ctx: click.Context, settings: SupervisorSettings, launch: LaunchOptions, as_json: bool
) -> None:
    """Try what 'peerd supervise' would run with the same options, and say what it is.

    The settings are validated, the ports bound and released, the app is imported in a process of its
    own, and etcd is asked; nothing is changed. Exit code 0 when 'supervise' would run, 73 when
    something cannot be bound, 78 for a bad app or file, 2 for other settings. An etcd that does not
    answer is a warning, since peers serve without it.
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
        would_run = not findings.problems
        _print(settings, launch, app, registry, changed, would_run=would_run)
        for warning in findings.warnings:
            click.echo(f"peerd check: warning: {warning}", err=True)
        for problem in findings.problems:
            click.echo(f"peerd check: {problem.text}", err=True)
    if findings.problems:
        sys.exit(findings.problems[0].exit_code)


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
            then = "be registered later" if is_away else "not be registered until that is mended"
            findings.warnings.append(f"{error}; the peers would serve, and {then}")
    elif embedded_etcd.find_etcd() is None:
        findings.warnings.append(
            f"nobody listens at {DEFAULT_ENDPOINT}; the peers would serve, and be registered once "
            f"somebody does. {embedded_etcd.HOW_TO_GET_ETCD}"
        )
    else:
        starts = True
    return _Registry(
        endpoint=settings.endpoint, prefix=settings.prefix, records=records, starts_etcd=starts
    )


def _ask_control_socket(launch: LaunchOptions, findings: _Findings) -> None:
    from peerd import control

    try:
        report = control.request(launch.control_path, "status", timeout_s=1.0)
    except NotRunningError:
        if trouble := _trouble_with_place(launch.control_path):
            findings.warnings.append(f"no 'peerd status' with this control socket: {trouble}")
        return
    except ControlError as error:
        findings.warnings.append(f"no 'peerd status' with this control socket: {error}")
        return
    findings.warnings.append(
        f"supervisor pid {report['supervisor']['pid']} answers at {launch.control_path}: one more there "
        "would run without 'peerd status'"
    )


def _trouble_with_place(path: Path) -> str:
    """Why no socket can be made there; nothing when one can. The folder is made, those above it are not."""
    if path.exists() and not path.is_socket():
        return f"{path} is something else than a socket"
    folder = path.parent if path.parent.exists() else path.parent.parent
    if not folder.is_dir():
        return f"{folder} is no folder"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} is not ours to write to"


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
        f"{settings.host}, {ports(settings)}\n"
        f"  app       {_describe(settings.app, app)}\n"
        f"  registry  {registry}\n"
        f"  control   {launch.control_path}\n"
        f"  metrics   {metrics}\n"
    )
    if changed:
        print_table(
            ("SETTING", "VALUE", "FROM"),
            [(setting.name, setting.value, setting.origin) for setting in changed],
        )
    else:
        click.echo("every setting has its default")


def _describe(name: str | None, app: FoundApp | None) -> str:
    if app is None:
        return f"{name} cannot be loaded"
    codes = [
        *app.handlers,
        *(f"{magic} (async)" for magic in app.coroutine_handlers),
        *(f"{magic} (batch)" for magic in app.batch_handlers),
    ]
    return f"{name or 'built in'}: {', '.join(codes) or 'answers nothing: it has no handler'}"


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
            "problems": [asdict(problem) for problem in findings.problems],
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
