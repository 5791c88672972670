"""Options that several commands share."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from peerd.cli.field_options import add_options, flags_of, settings_from
from peerd.cli.option_types import SECONDS, integer
from peerd.errors import PeerdError, SettingsError
from peerd.settings import DEFAULT_ENDPOINT, EtcdAccess, RegistrySettings

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from peerd.registry import Registry

PASSWORD_VARIABLE = "PEERD_ETCD_PASSWORD"

COMPLETION_TIMEOUT_S = 0.5  # How long TAB waits for a supervisor, which may be stopped


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``: did you mean 'x'``, or an empty string if nothing known is similar."""
    import difflib

    close = difflib.get_close_matches(word, list(known), 1)
    return f": did you mean {close[0]!r}?" if close else ""


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class EtcdLocation(NamedTuple):
    endpoint: str
    prefix: str
    access: EtcdAccess

    def open(self) -> Registry:
        from peerd.registry import Registry

        return Registry(self.endpoint, self.prefix, access=self.access)


def registry_options(help: str) -> Decorator:
    """--etcd, whose help this is, its credentials, and --prefix, as one keyword argument ``etcd``."""
    etcd_option = click.option(
        "--etcd",
        metavar="URL[,URL...]",
        envvar="PEERD_ETCD",
        default=DEFAULT_ENDPOINT,
        show_default=True,
        help=help,
    )

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_location(*, etcd: str, prefix: str, **values: Any) -> Any:
            given = {
                name: values.pop(name) for name in (flag.parameter for flag in flags_of(EtcdAccess))
            }
            return command(etcd=EtcdLocation(etcd, prefix, access_from(given)), **values)

        with_prefix = add_options(with_location, RegistrySettings, only=("prefix",))
        return etcd_option(add_options(with_prefix, EtcdAccess))

    return decorate


def access_from(values: Mapping[str, Any]) -> EtcdAccess:
    """From the values of the options of EtcdAccess. Raises SettingsError."""
    file: Path | None = values["etcd_password_file"]
    # Never from the command line, which every user of the machine can read. Without a user, the variable may
    # be meant for another program.
    password = None if values["etcd_user"] is None else os.environ.get(PASSWORD_VARIABLE)
    if file is not None:
        try:
            password = file.read_text().partition("\n")[0].removesuffix("\r")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            flag = "etcd-password-file"
            raise SettingsError(f"--{flag} {file}: {reason}", flag) from None
    return settings_from(EtcdAccess, values, password=password)


def seconds_option(*names: str, default: float, help: str) -> Decorator:
    return click.option(*names, type=SECONDS, default=default, show_default=True, help=help)


control_option: Decorator = click.option(
    "--control",
    "path",
    type=click.Path(path_type=Path),
    envvar="PEERD_CONTROL",
    help="Control socket of the supervisor; needed if several supervisors run, or if the socket is not in "
    "$XDG_RUNTIME_DIR/peerd/. Without XDG_RUNTIME_DIR, that is /run/peerd/ for root and /tmp/peerd-UID/ "
    "for other users.",
)

json_option: Decorator = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, for scripts."
)


def _complete_slot(
    ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The slots of the running supervisor; none if no supervisor answers in time."""
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
    """The number of a slot. The shell completes it."""
    return click.argument(
        "slot", type=integer("slot number", 0), required=required, shell_complete=_complete_slot
    )
