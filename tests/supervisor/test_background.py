"""A supervisor in the background of a terminal that stops background processes that write (stty tostop)."""

import signal

import psutil

from harness.eventually import eventually
from harness.supervised import Supervised, is_gone, send_signal
from harness.supervisor_requests import pids


def test_log_lines_from_the_background_stop_no_process(supervised: Supervised) -> None:
    # -m: with job control, so the job has its own process group.
    through = ["bash", "-mc", 'stty tostop; "$@" > /dev/null & wait', "bash"]
    running = supervised.start(peers=2, through=through, on_terminal=True).wait_registered()
    supervisor = psutil.Process(running.status()["supervisor"]["pid"])
    tree = [supervisor, *supervisor.children(recursive=True)]
    assert "registered" in eventually(lambda: running.err)
    send_signal(pids(running)[0], signal.SIGKILL)
    eventually(
        lambda: (
            [(peer["state"], peer["restarts"]) for peer in running.status()["peers"]]
            == [("ready", 1), ("ready", 0)]
        )
    )
    assert "killed by SIGKILL" in running.err
    supervisor.terminate()
    assert running.terminal
    running.terminal.wait()
    assert all(is_gone(process.pid) for process in tree)
    assert "stopped, in" in running.err
