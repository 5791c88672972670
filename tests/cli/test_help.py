"""The help of every command, and what it must not import so that it stays quick."""

import subprocess
import sys

import pytest

from harness.command import peerd
from peerd.cli import COMMANDS, cli
from peerd.cli.field_options import FieldOption, flags_of
from peerd.cli.setting_options import LaunchOptions, SupervisorCommand
from peerd.settings import SupervisorSettings

SLOW = ("rich", "psutil", "grpc", "etcd3", "asyncio", "tomllib", "difflib")
"""Modules that would make --help slow: importing each takes 10 ms or more, or imports others that do."""

PROGRAM = f"""
import sys
from peerd.cli import cli
try:
    cli.main([*sys.argv[1:], "--help"], prog_name="peerd", standalone_mode=False)
finally:
    print([name for name in {SLOW!r} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_slow(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: peerd {command}".rstrip())
    assert done.stderr == "[]\n"


def test_help_lists_every_command_with_its_summary() -> None:
    text = peerd("--help").stdout
    for name, (_, summary) in COMMANDS.items():
        assert name in text
        assert summary.split()[0] in text


@pytest.mark.parametrize("name", ["supervise", "check"])
def test_help_groups_the_settings_in_sections(name: str) -> None:
    command = cli.get_command(cli.make_context("peerd", [name]), name)
    assert isinstance(command, SupervisorCommand)
    flags = [flag.name for kind in (SupervisorSettings, LaunchOptions) for flag in flags_of(kind)]
    assert list(command.settings) == [*flags, "config"]
    assert {p.opts[0] for p in command.params if not isinstance(p, FieldOption)} <= {"--json"}
    text = peerd(name, "--help").stdout
    for section in ("Peers", "Registry", "Datagrams", "Workers", "Operation"):
        assert text.count(f"{section}:\n") == 1
    assert all(f"--{flag} " in text or f"--{flag}\n" in text for flag in flags)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["supervice"], "did you mean 'supervise'?"),
        (["xyz"], "the commands are supervise, check"),
        (["supervise", "--peer=8"], "--peers"),
        (["status", "--jsn"], "--json"),
    ],
)
def test_a_misspelt_word_gets_a_suggestion(args: list[str], text: str) -> None:
    shown = peerd(*args)
    assert shown.returncode == 2
    assert text in shown.stderr
    assert len(shown.stderr.splitlines()) == 1
