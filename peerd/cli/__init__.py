"""The command line: the only place that prints, configures logging or exits.

Commands are modules that are imported when they run, so that ``--help`` is quick and ``peerd ping``
does not pay for etcd. Errors become one line on standard error and an exit code here.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import NoReturn

import click

from peerd import __version__
from peerd.errors import (
    AppLoadError,
    BindError,
    NotRunningError,
    PeerdError,
    RegistryUnavailableError,
    SettingsError,
)

EXIT_CODES: tuple[tuple[type[PeerdError], int], ...] = (
    (NotRunningError, 3),
    (RegistryUnavailableError, 69),
    (BindError, 73),
    (AppLoadError, 78),
    (SettingsError, 2),
    (PeerdError, 1),
)

COMMANDS = {
    "supervise": ("peerd.cli.supervise", "Run peers: one worker process for each UDP port."),
    "nodes": ("peerd.cli.nodes", "List the peers that are registered in etcd."),
    "ping": ("peerd.cli.messages", "See whether a peer answers, and how fast."),
    "send": ("peerd.cli.messages", "Send one message to a peer and print its reply."),
    "status": ("peerd.cli.status", "Show what a running supervisor and its peers do."),
    "events": ("peerd.cli.events", "Show what has happened to the processes of a supervisor."),
    "logs": ("peerd.cli.show_logs", "Show the last lines that the workers have written."),
    "reload": ("peerd.cli.manage", "Replace all workers, one at a time, losing nothing."),
    "restart": ("peerd.cli.manage", "Replace the worker of one slot, losing nothing."),
    "stop": ("peerd.cli.manage", "Stop a supervisor in order, and wait for it."),
    "systemd-unit": ("peerd.cli.systemd_unit", "Print a unit for systemd that runs peers."),
    "etcd": ("peerd.cli.etcd", "Run an etcd for trials, in the foreground."),
    "chaos": ("peerd.cli.chaos", "Do harm to a supervisor under load, and check what it promises."),
}


class LazyGroup(click.Group):
    """Knows the names and summaries of its commands, and imports a command when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(
            importlib.import_module(COMMANDS[cmd_name][0]), cmd_name.replace("-", "_")
        )
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"there is no command {args[0]!r}; there are {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "PEERD"},
)
@click.version_option(__version__, prog_name="peerd", message="%(prog)s %(version)s")
def cli() -> None:
    """UDP peers that stay up, are found through etcd and keep pace with the kernel.

    \b
    peerd supervise --peers 8 --base-port 5001   run eight peers
    peerd nodes                                  see them, out of etcd
    peerd ping localhost:5003                    talk to one

    Every option can also be set by the environment (PEERD_SUPERVISE_PEERS=8; PEERD_ETCD and
    PEERD_PREFIX for all commands).

    \b
    Exit codes: 0 done, 1 failed, 2 usage, 3 not running, 69 etcd unreachable,
    70 internal error, 73 cannot bind, 78 bad configuration or app, 128+n ended by signal n.
    """


def main() -> NoReturn:
    """The console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A record may hold what the terminal's encoding has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = cli.main(prog_name="peerd", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = 2
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "peerd"
        _fail(f"{error.format_message()} ('{command} --help' explains)", command)
        code = 2
    except click.ClickException as error:
        _fail(error.format_message())
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except PeerdError as error:
        _fail(str(error))
        code = next(code for kind, code in EXIT_CODES if isinstance(error, kind))
    except BrokenPipeError:
        # Whoever read our output has seen enough (peerd nodes | head -1).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        # Whatever the commands do not expect: no space for the output, no descriptor left.
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        code = 1
    sys.exit(code)


def _fail(message: str, command: str = "peerd") -> None:
    click.echo(f"{command}: {message}", err=True)
