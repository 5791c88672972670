"""The command line: the only place that prints, configures logging or exits.

Commands are modules that are imported when they run, so that ``--help`` is quick and ``peerd ping``
does not pay for etcd. Errors become one line on standard error and an exit code here.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import TYPE_CHECKING, NoReturn

import click

from peerd import __version__
from peerd.cli.options import did_you_mean
from peerd.errors import (
    AppLoadError,
    BindError,
    NotRunningError,
    PeerdError,
    RegistryUnavailableError,
    SettingsError,
)

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

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
    "check": ("peerd.cli.check", "Try what 'supervise' would run, and say what it is."),
    "nodes": ("peerd.cli.nodes", "List the peers that are registered in etcd."),
    "ping": ("peerd.cli.messages", "See whether a peer answers, and how fast."),
    "send": ("peerd.cli.messages", "Send one message to a peer and print its reply."),
    "status": ("peerd.cli.status", "Show what a running supervisor and its peers do."),
    "wait": ("peerd.cli.manage", "Wait until all peers are ready."),
    "events": ("peerd.cli.events", "Show what has happened to the processes of a supervisor."),
    "logs": ("peerd.cli.show_logs", "Show the last lines that the workers have written."),
    "reload": ("peerd.cli.manage", "Replace all workers, one at a time, losing nothing."),
    "restart": ("peerd.cli.manage", "Replace the worker of one slot, losing nothing."),
    "scale": ("peerd.cli.manage", "Change the number of peers while they run, losing nothing."),
    "stop": ("peerd.cli.manage", "Stop a supervisor in order, and wait for it."),
    "systemd-unit": ("peerd.cli.systemd_unit", "Print a unit for systemd that runs peers."),
    "etcd": ("peerd.cli.etcd", "Run an etcd for trials, in the foreground."),
    "chaos": ("peerd.cli.chaos", "Do harm to a supervisor under load, and check what it promises."),
    "completion": ("peerd.cli.completion", "Print what makes a shell complete peerd's commands."),
}


class LazyGroup(click.Group):
    """Knows the names and summaries of its commands, and imports a command when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            hint = did_you_mean(args[0], COMMANDS) or f"; there are {', '.join(COMMANDS)}"
            ctx.fail(f"there is no command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The names and summaries, where click would import every command for its summary."""
        from click.shell_completion import CompletionItem

        return [
            *(
                CompletionItem(name, help=summary)
                for name, (_, summary) in COMMANDS.items()
                if name.startswith(incomplete)
            ),
            *click.Command.shell_complete(self, ctx, incomplete),
        ]


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

    Every option can also be set by the environment (PEERD_PEERS=8; PEERD_ETCD, PEERD_PREFIX and
    PEERD_CONTROL for all commands). 'peerd completion --help' says how TAB completes them.

    \b
    Exit codes: 0 done, 1 failed, 2 usage, 3 not running, 69 etcd unreachable,
    70 crash loop, 73 cannot bind, 78 bad configuration or app, 128+n ended by signal n.
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
