"""A supervisor in the background of a terminal that stops background processes that write (stty tostop)."""

from __future__ import annotations

import os
import shlex
import signal
import sys

import psutil

from harness.eventually import eventually
from harness.ports import free_ports
from harness.supervised import Supervised, is_gone, send_signal
from harness.terminal import Terminal
from peerd import control


def test_log_lines_from_the_background_stop_no_process(supervised: Supervised) -> None:
    path = supervised.folder / "control"
    command = [sys.executable, "-m", "peerd", "supervise", "--peers=2", "--prefix=background"]
    command += [f"--base-port={free_ports(2)}", f"--etcd={supervised.etcd}", f"--control={path}"]
    # -m: with job control, so the job has its own process group.
    script = f"stty tostop; {shlex.join(command)} > {os.devnull} & wait"
    with Terminal(["bash", "-mc", script]) as terminal:

        def status() -> dict[str, object]:
            report = control.request(path, "status")
            assert isinstance(report, dict)
            return report

        def peers() -> list[dict[str, object]]:
            found = status()["peers"]
            assert isinstance(found, list)
            return found

        eventually(lambda: all(peer["registered"] for peer in peers()))
        supervisor = psutil.Process(status()["supervisor"]["pid"])  # type: ignore[index]
        tree = [supervisor, *supervisor.children(recursive=True)]
        assert "registered" in eventually(lambda: terminal.text)
        send_signal(int(str(peers()[0]["pid"])), signal.SIGKILL)
        eventually(
            lambda: [(p["state"], p["restarts"]) for p in peers()] == [("ready", 1), ("ready", 0)]
        )
        assert "killed by SIGKILL" in terminal.text
        supervisor.terminate()
        terminal.wait()
        assert all(is_gone(process.pid) for process in tree)
        assert "stopped, in" in terminal.text
