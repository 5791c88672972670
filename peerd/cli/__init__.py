"""The command line: the only part that prints, configures logging or exits.

A command is a module that is imported when it runs, so that ``--help`` is quick and ``peerd ping`` does not
import the client of etcd. An error becomes one line on standard error and an exit code here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, NoReturn

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
    (RegistryUnavailableError, os.EX_UNAVAILABLE),
    (BindError, os.EX_CANTCREAT),
    (AppLoadError, os.EX_CONFIG),
    (SettingsError, 2),
    (PeerdError, 1),
)

COMMANDS = {
    "supervise": (".supervise", "Run peers: one worker process for each UDP port."),
    "check": (".check", "Validate a configuration without starting anything."),
    "nodes": (".list_nodes", "List the peers that are registered in etcd."),
    "ping": (".ping_and_send", "Check that a peer answers, and measure round trips."),
    "send": (".ping_and_send", "Send a message to a peer and print its reply."),
    "status": (".show_status", "Show the state of a running supervisor and its peers."),
    "wait": (".manage", "Wait until all peers are ready."),
    "events": (".show_entries", "Show deaths, replacements and other events of a supervisor."),
    "logs": (".show_entries", "Show the last lines that the workers printed or logged."),
    "reload": (".manage", "Replace all workers, one at a time, without losing datagrams."),
    "restart": (".manage", "Replace the worker of one slot without losing datagrams."),
    "scale": (".manage", "Change the number of peers while they run."),
    "stop": (".manage", "Stop a supervisor gracefully and wait until it has exited."),
    "systemd-unit": (".print_systemd_unit", "Print a systemd unit that runs peers."),
    "etcd": (".run_etcd", "Run an etcd for trials, in the foreground."),
    "chaos": (
        "peerd_chaos.chaos_command",
        "Inject faults into a supervisor under load and verify its guarantees.",
    ),
    "completion": (".print_completion", "Print a shell completion script for peerd."),
}
"""The module of each command (".name" is in peerd.cli.commands) and its summary."""


def exit_code_of(error: PeerdError) -> int:
    return next(code for kind, code in EXIT_CODES if isinstance(error, kind))


@contextlib.contextmanager
def _closed_pipe_is_sigpipe() -> Iterator[None]:
    """Exit with 141 when the reader of our output has gone (peerd nodes | head -1). click exits with 1."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.exceptions.Exit(128 + signal.SIGPIPE) from None


def _add_variables(name: str, command: click.Command) -> None:
    """Give each option a variable of its command, named after the flag, before those that commands share.

    click would derive the name from the parameter (PEERD_RELOAD_TIMEOUT_S).
    """
    for option in command.params:
        if isinstance(option, click.Option) and option.allow_from_autoenv:
            flag = next(flag for flag in option.opts if flag.startswith("--"))
            own = f"peerd_{name}{flag.removeprefix('-')}".replace("-", "_").upper()
            others = option.envvar or ()
            option.envvar = [own, *([others] if isinstance(others, str) else others)]
            option.allow_from_autoenv = False


class LazyGroup(click.Group):
    """Has the names and summaries of its commands, and imports a command when it is used."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _closed_pipe_is_sigpipe():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _closed_pipe_is_sigpipe():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0], "peerd.cli.commands")
        command = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        _add_variables(cmd_name, command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            hint = did_you_mean(args[0], COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
            ctx.fail(f"there is no command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The names and summaries from the table; click would import every command for its summary."""
        from click.shell_completion import CompletionItem

        names = [name for name in COMMANDS if name.startswith(incomplete)]
        found = [CompletionItem(name, help=COMMANDS[name][1]) for name in names]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="peerd", message="%(prog)s %(version)s")
def cli() -> None:
    """UDP peers that stay up, are found through etcd and keep pace with the kernel.

    \b
    peerd supervise --peers 8 --base-port 5001   run eight peers
    peerd nodes                                  list them, from etcd
    peerd ping localhost:5003                    measure round trips to one

    Every option has an environment variable: PEERD_RELOAD_TIMEOUT is --timeout of 'peerd reload'. PEERD_ETCD
    (with PEERD_ETCD_USER and so on), PEERD_PREFIX and PEERD_CONTROL are for all commands.

    \b
    Exit codes:
      0      done
      1      failed: the message says why
      2      bad usage
      3      no supervisor runs
      69     etcd does not answer
      70     a worker died too often
      73     a port cannot be bound
      78     bad configuration or app
      128+n  ended by signal n
    """


def main() -> NoReturn:
    """The console script."""
    _open_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A record may contain characters that the encoding of the terminal lacks.
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
        code = exit_code_of(error)
    except OSError as error:
        # Errors that no command expects, such as a full disk or no free descriptor.
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        code = 1
    sys.exit(code)


def _open_standard_streams() -> None:
    """Open the streams that a shell has closed (>&-); otherwise a socket could get the number of a stream."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is fd
            os.set_inheritable(opened, True)
            stream: IO[str] = open(opened, "w" if fd else "r", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def _fail(message: str, command: str = "peerd") -> None:
    click.echo(f"{command}: {message}", err=True)
