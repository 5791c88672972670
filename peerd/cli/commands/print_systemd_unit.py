"""``peerd systemd-unit``: text for /etc/systemd/system, for the options that follow ``peerd supervise``."""

from __future__ import annotations

import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click
from click.core import ParameterSource

from peerd.cli.wording import counted, ports
from peerd.settings import ANONYMOUS, DEFAULT_ENDPOINT, SupervisorSettings

FIRST_UNPRIVILEGED_PORT = 1024

SPARE_DESCRIPTORS = 64
"""In systemd's store: peers that come by ``peerd scale``. One that is full refuses even what it has."""

STOP_MARGIN_S = 5
"""What a stop at its hard end may take on top, until the last process is reaped."""

HOMES = (Path("/home"), Path("/root"), Path("/run/user"))
"""What ProtectHome= hides."""

PRIVATE = (Path("/tmp"), Path("/var/tmp"))
"""What PrivateTmp= replaces."""

OWN_ETCD = (
    f"# Without --etcd the peers register at {DEFAULT_ENDPOINT}, and if nobody is there, peerd starts",
    "# an etcd with throw-away data: in production, name yours.",
)

PLAIN_WORD = re.compile(r"[\w./:,=@+-]+", re.ASCII)
"""What needs no quotes in a unit (systemd.syntax(7))."""


@dataclass(frozen=True)
class _Service:
    """What of the options shapes the unit."""

    command: list[str]
    environment: dict[str, str]
    settings: SupervisorSettings
    files: list[Path]
    """What it reads, but for the app."""

    control_path: Path | None
    has_own_etcd: bool
    has_etcd_password: bool
    """By the environment only, which the unit must not show."""


@click.command(name="systemd-unit", context_settings={"ignore_unknown_options": True})
@click.option("--user", metavar="NAME", help="Run as this user.  [default: one made at each start]")
@click.option(
    "--working-directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
    help="Where --app and files are looked for.  [default: this directory, if there are any]",
)
@click.argument(
    "options", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS OF 'peerd supervise']"
)
@click.pass_context
def systemd_unit(
    ctx: click.Context, user: str | None, working_directory: Path | None, options: tuple[str, ...]
) -> None:
    """Print a hardened systemd unit that runs 'peerd supervise' with these options.

    The options are checked now, and PEERD_* variables that are set become part of the unit. With it,
    'systemctl reload' is peerd reload, and 'systemctl restart' keeps the ports and what is queued in
    them.

    \b
    Example
      peerd systemd-unit -- --peers 8 --base-port 5001 --app chat:app > peerd.service
      sudo cp peerd.service /etc/systemd/system/ && sudo systemctl enable --now peerd
    """
    service = _service(ctx, options)
    if working_directory is None and (service.settings.app or service.files):
        working_directory = Path.cwd()
    # The interpreter of a venv is often elsewhere: pyenv's and uv's are in a home.
    interpreter = Path(sys.executable).resolve()
    read = [Path(service.command[0]), interpreter, *service.files]
    if working_directory is not None:
        read.append(working_directory)
    for path in dict.fromkeys(map(Path.resolve, read)) if user is None else ():
        if not _is_public(path):
            click.echo(
                f"peerd: {path} is not for everybody to read, and the unit runs as a user that is made "
                "at each start: change its mode, move it, or give --user",
                err=True,
            )
    if service.control_path is not None and _is_below(service.control_path, PRIVATE):
        click.echo(
            f"peerd: --control {service.control_path} would be in the service's own /tmp "
            "(PrivateTmp=yes), where no 'peerd status' sees it: choose a path elsewhere, below /run",
            err=True,
        )
    click.echo(_unit(service, user, working_directory, read))


def _service(ctx: click.Context, options: tuple[str, ...]) -> _Service:
    """Raises what 'peerd supervise' would for these options: click's errors, SettingsError."""
    # Here, since it brings the supervisor with it, and --help should be quick.
    from peerd.cli.commands.supervise import supervise
    from peerd.cli.setting_options import SupervisorCommand, is_given, settings_of

    parsed = supervise.make_context("supervise", list(options), parent=ctx.find_root())
    assert isinstance(supervise, SupervisorCommand)
    for line in supervise.misspelt_variables():
        click.echo(f"peerd: {line}", err=True)
    with supervise.errors_traced(parsed):
        # Logins and certificates are the service's to read, which may be another user.
        settings = settings_of(parsed, ANONYMOUS)
    value = parsed.params
    files = ("config", "etcd_password_file", "etcd_ca", "etcd_cert", "etcd_key")
    return _Service(
        command=[*_this_peerd(), "supervise", *options],
        environment=_variables(parsed),
        settings=settings,
        files=[Path(value[name]).absolute() for name in files if value[name] is not None],
        control_path=value["control"],
        has_own_etcd=not is_given(parsed, "etcd"),
        has_etcd_password=value["etcd_user"] is not None and not value["etcd_password_file"],
    )


def _this_peerd() -> list[str]:
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return [sys.executable, "-m", "peerd"]
    return [os.path.abspath(shutil.which(program) or program)]


def _variables(parsed: click.Context) -> dict[str, str]:
    """Those of this environment that the options have been read from."""
    found = {}
    for parameter in parsed.command.params:
        name = parameter.name or ""
        if parsed.get_parameter_source(name) is not ParameterSource.ENVIRONMENT:
            continue
        for variable in parameter.envvar or ():
            if os.environ.get(variable):
                found[variable] = os.environ[variable]
                break
    return found


def _is_below(path: Path, folders: Iterable[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _is_public(path: Path) -> bool:
    path = path.resolve()
    try:
        return bool(path.stat().st_mode & stat.S_IROTH) and all(
            parent.stat().st_mode & stat.S_IXOTH for parent in path.parents
        )
    except OSError:
        return False


def _unit(
    service: _Service, user: str | None, working_directory: Path | None, read: list[Path]
) -> str:
    settings = service.settings
    command = list(service.command)
    writable = []
    if service.control_path is None:
        # Where 'peerd status' looks for it when root asks.
        command.append(f"--control=/run/peerd/{settings.base_port}.sock")
    elif service.control_path.parent != Path("/run/peerd"):
        writable.append(service.control_path.parent)
    program = command[: len(_this_peerd())]
    in_home = any(_is_below(path, HOMES) for path in [*read, Path(sys.base_prefix)])
    capability = "CAP_NET_BIND_SERVICE" if settings.base_port < FIRST_UNPRIVILEGED_PORT else ""
    lines = [
        "# Made by 'peerd systemd-unit'. Save it as /etc/systemd/system/peerd.service, then:",
        "#   systemctl daemon-reload && systemctl enable --now peerd",
        "",
        "[Unit]",
        f"Description=peerd: {counted(settings.peers, 'peer')} on {ports(settings)}",
        "Wants=network-online.target",
        "After=network-online.target",
        "# Before systemd 254, which waits longer after each failure (RestartSteps=).",
        "StartLimitIntervalSec=60",
        "StartLimitBurst=20",
        "",
        "[Service]",
        "# systemd before 253 ignores the second line, with a warning. There, take these two instead:",
        "#   Type=notify",
        f"#   ExecReload={_words([*program, 'reload', f'--control={_control(service)}'])}",
        "Type=notify",
        "Type=notify-reload",
        *(OWN_ETCD if service.has_own_etcd else ()),
        f"ExecStart={_words(command)}",
        *_where(working_directory),
        *_environment(service),
        "# Ready is when all peers are. One that never is must not end the others.",
        "TimeoutStartSec=infinity",
        "# Pinged while the supervisor and at least half of the ready peers get on.",
        "WatchdogSec=30",
        "",
        "# Not after wrong usage (2), settings or app (78): these do not go away by themselves. A port",
        "# that is in use (73) may.",
        "Restart=on-failure",
        "RestartPreventExitStatus=2 78",
        "# Ended by an interrupt.",
        "SuccessExitStatus=130",
        "RestartSec=250ms",
        "RestartSteps=8",
        "RestartMaxDelaySec=15",
        "",
        "# SIGTERM to the supervisor alone, which stops its workers in order, within --stop-timeout.",
        "KillMode=mixed",
        f"TimeoutStopSec={math.ceil(settings.stop_timeout_s) + STOP_MARGIN_S}",
        "",
        "# The peers' sockets: a restart, and a supervisor that dies, keep the ports and what is queued.",
        f"FileDescriptorStoreMax={settings.peers + SPARE_DESCRIPTORS}",
        "# 'systemctl stop' gives the ports back. With this (systemd 254) it keeps them: what is sent",
        "# meanwhile waits, and nobody is told that nobody is there.",
        "#   FileDescriptorStorePreserve=yes",
        "LimitNOFILE=65536",
        "",
        "# A second unit needs a directory of its own: the first to stop removes it.",
        "RuntimeDirectory=peerd",
        f"User={user}" if user else "DynamicUser=yes",
        "UMask=0077",
        "",
        "NoNewPrivileges=yes",
        "# Receive buffers above net.core.rmem_max would need CAP_NET_ADMIN, which may do far more than",
        f"# that: rather 'sysctl -w net.core.rmem_max={settings.recv_buffer_bytes}'.",
        f"CapabilityBoundingSet={capability}",
        f"AmbientCapabilities={capability}",
        "ProtectSystem=strict",
        *[f"ReadWritePaths={_value(str(path))}" for path in writable],
        f"ProtectHome={'read-only' if in_home else 'yes'}",
        "PrivateTmp=yes",
        "PrivateDevices=yes",
        "ProtectClock=yes",
        "ProtectControlGroups=yes",
        "ProtectHostname=yes",
        "ProtectKernelLogs=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelTunables=yes",
        "ProtectProc=invisible",
        "RestrictNamespaces=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "LockPersonality=yes",
        "RemoveIPC=yes",
        "# AF_NETLINK: how a name's addresses are put in order (getaddrinfo), and etcd's interfaces.",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
        "SystemCallArchitectures=native",
        "SystemCallFilter=@system-service",
        "SystemCallErrorNumber=EPERM",
        "# peerd and gRPC run with this. An app that compiles as it runs (numba, torch) does not.",
        "MemoryDenyWriteExecute=yes",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return "\n".join(lines)


def _control(service: _Service) -> str:
    return str(service.control_path or f"/run/peerd/{service.settings.base_port}.sock")


def _where(working_directory: Path | None) -> list[str]:
    return [f"WorkingDirectory={_value(str(working_directory))}"] if working_directory else []


def _environment(service: _Service) -> list[str]:
    lines = [
        f"Environment={_word(f'{name}={value}', dollar='$')}"
        for name, value in service.environment.items()
    ]
    if service.has_etcd_password:
        lines += [
            "# With PEERD_ETCD_PASSWORD=..., readable for root alone.",
            "EnvironmentFile=/etc/peerd.env",
        ]
    return lines


def _words(words: Iterable[str]) -> str:
    return " ".join(_word(word) for word in words)


def _word(text: str, dollar: str = "$$") -> str:
    """One word of a command: neither specifiers nor variables nor quotes mean anything in it."""
    escaped = _value(text).replace("$", dollar)
    if PLAIN_WORD.fullmatch(escaped):
        return escaped
    escaped = escaped.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _value(text: str) -> str:
    return text.replace("%", "%%")
