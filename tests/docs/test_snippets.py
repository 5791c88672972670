"""Runs the code blocks of README.md and docs/ as printed, but for ports and the endpoint of etcd.

A page is one test. Its blocks run in order, in one folder, with the 8 peers of ``make run`` beside them:

    python   a program; if its first line is ``# NAME.py``, it is also saved under this name
    toml     a file, named in its first line
    console  ``$`` commands, whose standard output must match what follows them, up to numbers and spaces;
             ``...`` stands for any lines; a supervisor runs until the end of the page
    text     not code

A comment before a block changes that: ``<!-- not run: REASON -->``, or ``<!-- endless -->`` for a program
that is stopped once it has printed a line.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.command import started
from harness.eventually import eventually
from harness.ports import free_ports
from peerd import control
from peerd.registry.embedded_etcd import EmbeddedEtcd
from peerd.settings import DEFAULT_ENDPOINT

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (.*?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PORTS = {5001: 10, 5101: 1, 6001: 4, 6101: 2, 6201: 8, 7001: 1}
"""How many ports from each of these on the pages use."""

NOT_RUN = {"docs/operation.md": ["needs systemd and root"]}


@dataclass(frozen=True)
class Block:
    place: str
    comment: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(f"{page.name}:{text.count(chr(10), 0, found.start(2)) + 1}", *found.groups(""))
        for found in BLOCK.finditer(text)
    ]


class World:
    """An etcd, and what ``make run`` starts, on ports that are free."""

    def __init__(self, etcd: str, folder: Path) -> None:
        self.etcd = etcd
        self.folder = folder
        self.ports: dict[int, int] = {}
        for documented, count in PORTS.items():
            first = free_ports(count)
            self.ports |= {documented + number: first + number for number in range(count)}
        self.runtime = folder / "runtime"
        self.runtime.mkdir()
        self.venv = Path(sys.prefix)
        self.environment = {
            **os.environ,
            "PATH": f"{self.venv / 'bin'}:{os.environ['PATH']}",
            "PEERD_ETCD": etcd,
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(folder),
            "XDG_RUNTIME_DIR": str(self.runtime),
        }

    def on_free_ports(self, text: str) -> str:
        text = text.replace(DEFAULT_ENDPOINT, self.etcd)
        return re.sub(r"\b\d{4}\b", lambda port: str(self.ports.get(int(port[0]), port[0])), text)

    def make_run(self) -> list[str]:
        """The command, with the ports changed in the arguments that the Makefile gives."""
        arguments = re.search(r"^ARGS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments is not None
        make = ["make", "-C", str(ROOT), "-o", f"{self.venv}/.run", "run", f"VENV={self.venv}"]
        return [*make, f"ARGS={self.on_free_ports(arguments[1])}"]

    def wait_ready(self, base_port: int) -> None:
        path = self.runtime / "peerd" / f"{base_port}.sock"

        def peers() -> list[dict[str, object]]:
            return list(control.request(path, "status")["peers"])

        eventually(path.exists, within_s=30)
        eventually(lambda: all(peer["registered"] for peer in peers()), within_s=30)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with EmbeddedEtcd() as etcd:
        world = World(etcd.endpoint, tmp_path_factory.mktemp("snippets"))
        command = world.make_run()
        options = {"env": world.environment, "stdout": subprocess.DEVNULL, "process_group": 0}
        with started(command, **options) as make:
            world.wait_ready(world.ports[5001])
            yield world
            os.killpg(make.pid, signal.SIGINT)
            make.wait()


class Page:
    def __init__(self, world: World, folder: Path, until_the_end: ExitStack) -> None:
        self.world = world
        self.folder = folder
        self._until_the_end = until_the_end
        (folder / ".venv").symlink_to(world.venv)
        shutil.copytree(ROOT / "examples", folder / "examples")
        for example in folder.glob("examples/*.py"):
            example.write_text(world.on_free_ports(example.read_text()))

    def run(self, block: Block) -> None:
        text = self.world.on_free_ports(block.text)
        if block.language == "console":
            for command in text.removeprefix("$ ").split("\n$ "):
                self._run_command(block, *command.split("\n", 1))
            return
        name = re.match(r"# (\w+\.(py|toml))\n", text)
        file = self.folder / (name[1] if name else "snippet.py")
        file.write_text(text)
        if block.comment == "endless":
            with self._start(f"python {file}") as process:
                assert process.stdout is not None
                assert process.stdout.readline(), block.place
        elif block.language == "python":
            self._output_of(f"python {file}", block)

    def _run_command(self, block: Block, command: str, expected: str = "") -> None:
        if command == "make run":
            return  # runs
        if command.startswith("peerd supervise"):
            process = self._until_the_end.enter_context(self._start(f"exec {command}"))
            self._until_the_end.callback(process.wait)
            self._until_the_end.callback(process.terminate)
            port = re.search(r"--base-port (\d+)", command)
            assert port is not None
            self.world.wait_ready(int(port[1]))
            return
        shown = self._output_of(command, block)
        assert re.fullmatch(pattern(expected), normalized(shown)), (
            f"{block.place}: {command}\n{shown}\n\nexpected:\n{expected}"
        )

    def _output_of(self, command: str, block: Block) -> str:
        with self._start(command, stderr=subprocess.PIPE) as process:
            out, err = process.communicate(timeout=60)
        assert process.returncode == 0, f"{block.place}: {command}\n{out}\n{err}"
        return str(out)

    def _start(self, command: str, **options: int) -> AbstractContextManager[subprocess.Popen[str]]:
        return started(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.world.environment,
            text=True,
            stdout=subprocess.PIPE,
            **options,
        )


def normalized(text: str) -> str:
    lines = [line for line in text.splitlines() if not line.endswith(" PEERD_ETCD")]
    lines = [re.sub(r"\d+(\.\d+)?", "0", re.sub(r"─+", "─", line)) for line in lines]
    return "".join(" ".join(line.split()) + "\n" for line in lines)


def pattern(expected: str) -> str:
    lines = normalized(expected).splitlines(keepends=True)
    return "".join("(?:.*\n)*?" if line == "...\n" else re.escape(line) for line in lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page: Path, world: World, tmp_path: Path) -> None:
    todo = [
        block
        for block in blocks(page)
        if block.language != "text" and not block.comment.startswith("not run: ")
    ]
    with ExitStack() as until_the_end:
        here = Page(world, tmp_path, until_the_end)
        for block in todo:
            here.run(block)


def test_blocks_that_do_not_run_are_known() -> None:
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("python", "console", "toml", "text"), block.place
            if block.comment.startswith("not run: "):
                reason = block.comment.removeprefix("not run: ")
                found.setdefault(str(page.relative_to(ROOT)), []).append(reason)
    assert found == NOT_RUN
