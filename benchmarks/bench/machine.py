"""The machine and the versions that the figures depend on, for the tables and the JSON file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

import peerd
from bench.noise import QUIET


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    virtual: bool
    kernel: str
    versions: dict[str, str]
    setup: str
    busy_before: float
    """Share of all CPUs that others used in the second before the first measurement."""

    def __str__(self) -> str:
        kind = "virtual machine" if self.virtual else "no hypervisor seen"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"machine   {self.cpu}, {self.cores} CPUs, {kind}, Linux {self.kernel}",
            f"versions  {versions}",
        ]
        if self.setup:
            lines.append(f"set-up    {self.setup}")
        if self.busy_before > QUIET:
            lines.append(
                f"WARNING   the machine was {self.busy_before:.0%} busy before the start: "
                "stop other programs and run this again"
            )
        return "\n".join(lines)


def describe_machine(versions: Mapping[str, str], setup: str = "") -> Machine:
    """Print it as well. Takes a second. ``versions``: of the packages that are compared with peerd."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    machine = Machine(
        cpu=_cpu_model(cpuinfo),
        cores=os.cpu_count() or 1,
        virtual=" hypervisor" in cpuinfo,
        kernel=platform.release(),
        versions={
            platform.python_implementation(): platform.python_version(),
            "peerd": peerd.__version__,
            **versions,
        },
        setup=setup,
        busy_before=psutil.cpu_percent(interval=1.0) / 100,
    )
    print(machine, flush=True)
    return machine


def package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model(cpuinfo: str) -> str:
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()


@dataclass(frozen=True)
class Cpus:
    """The CPU of the receiver and the CPU of the sender; None: no pinning."""

    receiver: int | None
    sender: int | None

    def __str__(self) -> str:
        if self.receiver is None:
            return "NOT pinned: this process may use 1 CPU only, which receiver and sender share"
        return f"receiver pinned to cpu{self.receiver}, sender to cpu{self.sender}"

    def pin_sender(self) -> None:
        """This process and the senders, which inherit its CPU."""
        if self.sender is not None:
            os.sched_setaffinity(0, {self.sender})

    def pin_receiver(self, pid: int) -> None:
        if self.receiver is not None:
            os.sched_setaffinity(pid, {self.receiver})


def choose_cpus() -> Cpus:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        return Cpus(None, None)
    receiver, *others = allowed
    # Two threads of one core share its execution units: prefer another core.
    siblings = _cpu_list(f"/sys/devices/system/cpu/cpu{receiver}/topology/thread_siblings_list")
    return Cpus(receiver, next((cpu for cpu in others if cpu not in siblings), others[0]))


def _cpu_list(path: str) -> set[int]:
    """The CPUs of a kernel list such as ``0-1,8``; none if there is no such file."""
    cpus: set[int] = set()
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return cpus
    for part in text.split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus
