"""Runs the tests for ``make``: first those that may run side by side, then those that need the CPUs alone.

    run_tests.py most [PYTEST ARGUMENT]...     without those marked slow
    run_tests.py all [PYTEST ARGUMENT]...      every test; what fails is run again, only to name the flakes
    run_tests.py timing [PYTEST ARGUMENT]...   those that need the CPUs alone, ten times in a row

Most tests wait most of the time, so several run on each CPU. The exit code is 0 only if every test passed
the first time. ``TEST_WORKERS`` is the number of those that run side by side; 0: one after the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
WORKERS = os.environ.get("TEST_WORKERS", "5")
TIMING_RUNS = 10
NO_TESTS = 5  # pytest's exit code


class Run(NamedTuple):
    title: str
    exit_code: int
    wall_s: float
    folders: dict[str, list[float]]
    """The seconds of each test of a folder, set-up included."""

    failed: list[str]

    @property
    def passed(self) -> bool:
        return self.exit_code in (0, NO_TESTS)


def main(mode: str, arguments: list[str]) -> int:
    if mode == "timing":
        return _report([_run(f"run {n + 1}", "alone", arguments) for n in range(TIMING_RUNS)])
    limit = "" if mode == "all" else " and not slow"
    side_by_side = ["-n", WORKERS, "--dist", "loadgroup", *arguments]
    runs = [
        _run("side by side", f"not alone{limit}", side_by_side),
        _run("alone", f"alone{limit}", arguments),
    ]
    exit_code = _report(runs)
    if mode == "all" and exit_code:
        _name_flakes([test for run in runs for test in run.failed])
    return exit_code


def _run(title: str, marks: str, arguments: list[str]) -> Run:
    print(f"\n== {title} ({marks})", flush=True)
    report = ROOT / "build" / "tests.xml"
    report.unlink(missing_ok=True)
    # Of this run only.
    cache = ROOT / "build" / "pytest-cache"
    (cache / "v" / "cache" / "lastfailed").unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", f"-ocache_dir={cache}"]
    began_s = time.monotonic()
    exit_code = subprocess.call([*command, "-m", marks, *arguments], cwd=ROOT)
    wall_s = time.monotonic() - began_s
    folders = defaultdict[str, list[float]](list)
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        folder = "/".join(case.get("classname", "").split(".")[:2])
        folders[folder].append(float(case.get("time", "0")))
    try:
        failed = sorted(json.loads((cache / "v" / "cache" / "lastfailed").read_text()))
    except FileNotFoundError:
        failed = []
    return Run(title, exit_code, wall_s, folders, failed)


def _report(runs: list[Run]) -> int:
    print("\n== where the time goes: seconds of tests (number of tests)")
    rows = {
        folder: [_cell(run.folders.get(folder, [])) for run in runs]
        for folder in sorted(set().union(*(run.folders for run in runs)))
    }
    rows["all"] = [_cell([*chain(*run.folders.values())]) for run in runs]
    rows["wall time"] = [f"{run.wall_s:.0f} s" for run in runs]
    rows["failed"] = [
        str(len(run.failed)) if run.failed or run.passed else "run broke off" for run in runs
    ]
    for name, cells in {"": [run.title for run in runs], **rows}.items():
        print(f"{name:<20}" + "".join(f"{cell:>16}" for cell in cells))
    for run in runs:
        for test in run.failed:
            print(f"FAILED {test} ({run.title})")
    return 0 if all(run.passed for run in runs) else 1


def _cell(seconds: list[float]) -> str:
    return f"{sum(seconds):.0f} ({len(seconds)})"


def _name_flakes(failed: list[str]) -> None:
    print(f"\n== {len(failed)} failed: again, each in a run of its own")
    for test in failed:
        again = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        verdict = "FLAKE, passes now" if again.returncode == 0 else "fails again"
        print(f"{verdict}: {test}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
