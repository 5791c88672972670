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
from string import Template

import click

from peerd.cli.text_output import counted
from peerd.settings import ANONYMOUS, DEFAULT_ENDPOINT, SupervisorSettings

FIRST_UNPRIVILEGED_PORT = 1024

TEMPLATE = Path(__file__).with_name("peerd.service.in")

SPARE_DESCRIPTORS = 64
"""Room in systemd's store for peers that 'peerd scale' adds. A full store rejects even updates."""

STOP_MARGIN_S = 5  # Time after the hard end of a stop until the last process is reaped
HOMES = (Path("/home"), Path("/root"), Path("/run/user"))  # Folders that ProtectHome= hides
PRIVATE = (Path("/tmp"), Path("/var/tmp"))  # Folders that PrivateTmp= replaces
ABOUT_EMBEDDED_ETCD = (
    f"# Without --etcd the peers register at {DEFAULT_ENDPOINT}, and if nothing listens there, peerd starts\n"
    "# an etcd with throw-away data. In production, pass your own etcd.\n"
)

PLAIN_WORD = re.compile(r"[\w./:,=@+-]+", re.ASCII)
"""Words that need no quotes in a unit (systemd.syntax(7))."""


@dataclass(frozen=True)
class _Service:
    """The parts of the options that shape the unit."""

    command: list[str]
    environment: dict[str, str]
    settings: SupervisorSettings
    files: list[Path]  # Files that the service reads, except those of the app
    control_path: Path | None
    has_embedded_etcd: bool
    has_etcd_password: bool
    """Whether etcd needs a password from the environment, which the unit must not contain."""


@click.command(name="systemd-unit", context_settings={"ignore_unknown_options": True})
@click.option(
    "--user", metavar="NAME", help="User to run as.  [default: systemd creates one at each start]"
)
@click.option(
    "--working-directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
    help="Folder in which --app and files are looked up.  [default: this folder, if there are any]",
)
@click.argument(
    "options", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS OF 'peerd supervise']"
)
@click.pass_context
def systemd_unit(
    ctx: click.Context, user: str | None, working_directory: Path | None, options: tuple[str, ...]
) -> None:
    """Print a hardened systemd unit that runs 'peerd supervise' with these options.

    The options are validated now, and PEERD_* variables that are set become part of the unit. With this unit,
    'systemctl reload' does what 'peerd reload' does, and 'systemctl restart' keeps the ports and what is
    queued in them.

    \b
    Example:
      peerd systemd-unit -- --peers 8 --base-port 5001 --app chat:app > peerd.service
      sudo cp peerd.service /etc/systemd/system/ && sudo systemctl enable --now peerd

    \b
    Exit codes:
      0    done
      2    bad option
      78   bad file
    """
    service = _service(ctx, options)
    if working_directory is None and (service.settings.app or service.files):
        working_directory = Path.cwd()
    # The interpreter of a venv may be in a home directory, as those of pyenv and uv are.
    interpreter = Path(sys.executable).resolve()
    read = [Path(service.command[0]), interpreter, *service.files]
    if working_directory is not None:
        read.append(working_directory)
    for path in dict.fromkeys(map(Path.resolve, read)) if user is None else ():
        if not _is_public(path):
            click.echo(
                f"peerd: {path} is not readable for all users, and the unit runs as a user that systemd "
                "creates at each start: change its mode, move it, or give --user",
                err=True,
            )
    if service.control_path is not None and _is_below(service.control_path, PRIVATE):
        click.echo(
            f"peerd: --control {service.control_path} would be in the service's own /tmp "
            "(PrivateTmp=yes), where 'peerd status' does not see it: choose a path elsewhere, below /run",
            err=True,
        )
    click.echo(_unit(service, user, working_directory, read))


def _service(ctx: click.Context, options: tuple[str, ...]) -> _Service:
    """Raises the errors of 'peerd supervise' for these options: click's errors, SettingsError."""
    # Imported here so that --help stays quick: this imports the supervisor.
    from peerd.cli.commands.supervise import supervise
    from peerd.cli.setting_options import SupervisorCommand, is_given, settings_of

    parsed = supervise.make_context("supervise", list(options), parent=ctx.find_root())
    assert isinstance(supervise, SupervisorCommand)
    for line in supervise.misspelt_variables():
        click.echo(f"peerd: {line}", err=True)
    with supervise.errors_traced(parsed):
        # The service reads credentials itself, possibly as another user.
        settings = settings_of(parsed, ANONYMOUS)
    value = parsed.params
    files = ("config", "etcd_password_file", "etcd_ca", "etcd_cert", "etcd_key")
    return _Service(
        command=[*_this_peerd(), "supervise", *options],
        environment={
            each.origin: os.environ[each.origin]
            for each in supervise.changed_settings(parsed)
            if each.origin in os.environ
        },
        settings=settings,
        files=[Path(value[name]).absolute() for name in files if value[name] is not None],
        control_path=value["control"],
        has_embedded_etcd=not is_given(parsed, "etcd"),
        has_etcd_password=value["etcd_user"] is not None and not value["etcd_password_file"],
    )


def _this_peerd() -> list[str]:
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return [sys.executable, "-m", "peerd"]
    return [os.path.abspath(shutil.which(program) or program)]


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
    settings, command = service.settings, list(service.command)
    program = command[: len(_this_peerd())]
    # 'peerd status' of root looks there.
    control_path = service.control_path or Path(f"/run/peerd/{settings.base_port}.sock")
    if service.control_path is None:
        command.append(f"--control={control_path}")
    writable = "" if control_path.parent == Path("/run/peerd") else str(control_path.parent)
    in_home = any(_is_below(path, HOMES) for path in [*read, Path(sys.base_prefix)])
    unit = Template(TEMPLATE.read_text()).substitute(
        description=f"{counted(settings.peers, 'peer')} on {settings.port_range}",
        reload=_words([*program, "reload", f"--control={control_path}"]),
        about_etcd=ABOUT_EMBEDDED_ETCD if service.has_embedded_etcd else "",
        start=_words(command),
        working_directory=_line("WorkingDirectory", str(working_directory or "")),
        environment=_environment(service),
        stop_s=math.ceil(settings.stop_timeout_s) + STOP_MARGIN_S,
        descriptors=settings.peers + SPARE_DESCRIPTORS,
        user=f"User={user}" if user else "DynamicUser=yes",
        recv_buffer=settings.recv_buffer_bytes,
        capability="CAP_NET_BIND_SERVICE" if settings.base_port < FIRST_UNPRIVILEGED_PORT else "",
        writable=_line("ReadWritePaths", writable),
        protect_home="read-only" if in_home else "yes",
    )
    return unit.rstrip()


def _line(name: str, path: str) -> str:
    return f"{name}={_value(path)}\n" if path else ""


def _environment(service: _Service) -> str:
    pairs = (f"{name}={value}" for name, value in service.environment.items())
    text = "".join(f"Environment={_word(pair, dollar='$')}\n" for pair in pairs)
    if service.has_etcd_password:
        text += "# With PEERD_ETCD_PASSWORD=..., readable for root only.\n"
        text += "EnvironmentFile=/etc/peerd.env\n"
    return text


def _words(words: Iterable[str]) -> str:
    return " ".join(_word(word) for word in words)


def _word(text: str, dollar: str = "$$") -> str:
    """One word of a command, with specifiers, variables and quotes escaped."""
    escaped = _value(text).replace("$", dollar)
    if PLAIN_WORD.fullmatch(escaped):
        return escaped
    escaped = escaped.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _value(text: str) -> str:
    return text.replace("%", "%%")
