"""Options that several commands share."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peerd.address import Address, address_of
from peerd.errors import PeerdError, SettingsError
from peerd.settings import DEFAULT_ENDPOINT, DEFAULT_PREFIX, EtcdAccess

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

PASSWORD_VARIABLE = "PEERD_ETCD_PASSWORD"

COMPLETION_TIMEOUT_S = 0.5
"""Who pressed TAB waits no longer for a supervisor that is stopped."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``: did you mean 'x'``, or nothing when nothing known is like it."""
    import difflib

    close = difflib.get_close_matches(word, list(known), 1)
    return f": did you mean {close[0]!r}?" if close else ""


class Seconds(click.FloatRange):
    """A number of seconds; nan and inf are floats to Python, and no time to wait."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return float(seconds)


def integer(name: str, least: int, most: int | None = None) -> click.IntRange:
    """Errors call it ``name``."""
    kind = click.IntRange(least, most)
    kind.name = name
    return kind


# Generic in newer versions of click only.
class _HostPort(click.ParamType):  # type: ignore[type-arg]
    name = "host:port"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Address:
        if isinstance(value, Address):  # out of a file, and read by now
            return value
        try:
            address = address_of(value)
        except SettingsError as error:
            self.fail(str(error), param, ctx)
        if address is None:
            self.fail(f"{value!r}: write HOST:PORT, such as localhost:9464", param, ctx)
        return address


class _Size(click.ParamType):  # type: ignore[type-arg]
    name = "size"

    _TEXT = re.compile(r"(\d{1,18}(?:\.\d{1,3})?)([KMGT]?)", re.ASCII)
    _UNITS = " KMGT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = self._TEXT.fullmatch(str(value).upper().removesuffix("IB").removesuffix("B"))
        if match is None:
            self.fail(f"{value!r}: write bytes, or a size such as 64M or 1G", param, ctx)
        number, unit = match.groups()
        return (
            round(float(number) * 1024 ** self._UNITS.index(unit)) if unit else int(float(number))
        )


SECONDS = Seconds(min=0)
POSITIVE_SECONDS = Seconds(min=0, min_open=True)
HOST_PORT = _HostPort()
SIZE = _Size()
"""Bytes; K, M, G and T are powers of 1024."""

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def etcd_option(
    default: str | None = DEFAULT_ENDPOINT, help: str = "The etcd to ask."
) -> Decorator:
    return click.option(
        "--etcd",
        metavar="URL[,URL...]",
        envvar="PEERD_ETCD",
        default=default,
        show_default=default is not None,
        help=help,
    )


_FILE = click.Path(path_type=Path)


def access_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Everything that etcd may ask of us, as one ``access``."""

    @functools.wraps(command)
    def with_access(
        *args: Any,
        etcd_user: str | None,
        etcd_password_file: Path | None,
        etcd_ca: Path | None,
        etcd_cert: Path | None,
        etcd_key: Path | None,
        **others: Any,
    ) -> Any:
        access = EtcdAccess(
            user=etcd_user,
            password=_password(etcd_user, etcd_password_file),
            ca_file=etcd_ca,
            cert_file=etcd_cert,
            key_file=etcd_key,
        )
        return command(*args, access=access, **others)

    for option in reversed(
        (
            click.option("--etcd-user", envvar="PEERD_ETCD_USER", help="Log in to etcd as this."),
            click.option(
                "--etcd-password-file",
                type=_FILE,
                metavar="FILE",
                envvar="PEERD_ETCD_PASSWORD_FILE",
                help=f"Its password is the first line here, or in the environment's {PASSWORD_VARIABLE}.",
            ),
            click.option(
                "--etcd-ca",
                type=_FILE,
                metavar="FILE",
                envvar="PEERD_ETCD_CA",
                help="Who signed the certificate of an https etcd (PEM), if not one that this machine "
                "trusts.",
            ),
            click.option(
                "--etcd-cert",
                type=_FILE,
                metavar="FILE",
                envvar="PEERD_ETCD_CERT",
                help="Our own certificate, where etcd asks for one (PEM).",
            ),
            click.option(
                "--etcd-key",
                type=_FILE,
                metavar="FILE",
                envvar="PEERD_ETCD_KEY",
                help="The key of --etcd-cert (PEM).",
            ),
        )
    ):
        with_access = option(with_access)
    return with_access


def _password(user: str | None, file: Path | None) -> str | None:
    """Never from the command line, which everybody on the machine can read."""
    if file is not None:
        try:
            return file.read_text().partition("\n")[0].removesuffix("\r")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            flag = "etcd-password-file"
            raise SettingsError(f"--{flag} {file}: {reason}", flag) from None
    # Without a user it may be there for another program.
    return None if user is None else os.environ.get(PASSWORD_VARIABLE)


prefix_option: Decorator = click.option(
    "--prefix",
    envvar="PEERD_PREFIX",
    default=DEFAULT_PREFIX,
    show_default=True,
    help="Keys are PREFIX/peer-id; 'eventmesh' is FaasNet's.",
)

control_option: Decorator = click.option(
    "--control",
    "path",
    type=click.Path(path_type=Path),
    envvar="PEERD_CONTROL",
    help="The supervisor's control socket, if there are several or it is not in the usual place, "
    "$XDG_RUNTIME_DIR/peerd/ (else /run/peerd/ for root, /tmp/peerd-UID/ for others).",
)

json_option: Decorator = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, for scripts."
)


def _complete_slot(
    ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The slots of the running supervisor; none, and no word, when none answers soon."""
    from click.shell_completion import CompletionItem

    from peerd import control

    try:
        path = ctx.params.get("path") or control.find_running()
        report = control.request(path, "status", timeout_s=COMPLETION_TIMEOUT_S)
        return [
            CompletionItem(str(peer["slot"]), help=f"{peer['peer_id']} {peer['state']}")
            for peer in report["peers"]
            if str(peer["slot"]).startswith(incomplete)
        ]
    except (PeerdError, OSError, LookupError, TypeError):
        return []


def slot_argument(*, required: bool = True) -> Decorator:
    """The number of a slot, which the shell completes."""
    return click.argument(
        "slot", type=integer("slot number", 0), required=required, shell_complete=_complete_slot
    )
