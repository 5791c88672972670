"""Completion, tried in real shells."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.command import peerd
from harness.eventually import eventually
from harness.supervised import Supervised
from harness.terminal import Terminal


def needs(shell: str) -> str:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"there is no {shell} here")
    return program


@pytest.fixture
def peerd_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a ``peerd`` that runs this source on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "peerd"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m peerd "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))  # where the shells look for their start-up files
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))


def offered(shell: str, line: str, folder: Path) -> list[str]:
    """The words that the shell offers with the cursor at the end of a line."""
    script = folder / f"peerd.{shell}"
    script.write_text(peerd("completion", shell).stdout)
    words = line.split(" ")
    if shell == "bash":
        quoted = " ".join(f"'{word}'" for word in words)
        code = (
            f"source {script}\nCOMP_WORDS=({quoted})\nCOMP_CWORD={len(words) - 1}\n"
            # compopt works only inside a completion.
            "compopt() { :; }\n_peerd_completion peerd\nprintf '%s\\n' \"${COMPREPLY[@]}\""
        )
        command = [needs(shell), "--norc", "-c", code]
    else:
        assert shell == "fish"
        command = [needs(shell), "--no-config", "-c", f"source {script}; complete -C '{line}'"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return [entry.partition("\t")[0] for entry in done.stdout.split("\n") if entry]


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_commands_and_options(shell: str, peerd_on_path: None, tmp_path: Path) -> None:
    assert {"reload", "restart"} <= set(offered(shell, "peerd re", tmp_path))
    assert "supervise" not in offered(shell, "peerd re", tmp_path)
    assert "--base-port" in offered(shell, "peerd supervise --ba", tmp_path)
    assert set(offered(shell, "peerd supervise --pin ", tmp_path)) == {"auto", "none"}
    assert offered(shell, "peerd restart ", tmp_path) == []  # there is no supervisor


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_slots_of_the_running_supervisor(
    shell: str, peerd_on_path: None, supervised: Supervised, tmp_path: Path
) -> None:
    running = supervised.start(peers=12).wait_ready()
    line = f"peerd restart --control {running.control} "
    assert offered(shell, line, tmp_path) == [str(slot) for slot in range(12)]
    assert offered(shell, f"{line}1", tmp_path) == ["1", "10", "11"]
    assert "11" in offered(shell, f"peerd logs --control {running.control} ", tmp_path)


def test_a_tab_in_zsh(peerd_on_path: None, supervised: Supervised, tmp_path: Path) -> None:
    """The completion of zsh works only in its line editor, so this presses the key."""
    program = needs("zsh")
    running = supervised.start(peers=1).wait_ready()
    script = tmp_path / "peerd.zsh"
    script.write_text(peerd("completion", "zsh").stdout)
    with Terminal([program, "-f", "-i"], columns=200) as terminal:
        terminal.type(
            f"autoload -U compinit; compinit -u -D; source {script}; echo is-$((1+1))\n".encode()
        )
        eventually(lambda: "is-2" in terminal.text)
        terminal.type(b"peerd superv\t")
        eventually(lambda: "supervise" in terminal.text)
        terminal.type(
            f"\x15peerd restart --control {running.control} \t && echo slot-$((2+1))\n".encode()
        )
        eventually(lambda: "slot-3" in terminal.text)
        assert "1 worker replaced" in terminal.text
        terminal.type(b"exit\n")
        terminal.wait()


def test_the_scripts_are_those_of_click() -> None:
    for shell in ("bash", "zsh", "fish"):
        done = peerd("completion", shell)
        assert done.returncode == 0
        assert "_PEERD_COMPLETE" in done.stdout
    assert peerd("completion", "csh").returncode == 2
    assert "bash" in peerd("completion", "--help").stdout
