"""What the figures depend on: printed above the table and kept in the JSON file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

import peerd
from noise import QUIET

COMPARED = ("uvloop", "rloop", "aiofastnet")


@dataclass(frozen=True)
class Cpus:
    """Which CPU the receiver has and which the load generator; None: no pinning."""

    receiver: int | None
    sender: int | None


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    virtual: bool
    kernel: str
    python: str
    peerd: str
    packages: dict[str, str]
    pinning: str
    receive_buffer_bytes: int
    busy_before: float
    """Share of all CPUs that others used in the second before the first measurement."""

    def __str__(self) -> str:
        kind = "virtual machine" if self.virtual else "no hypervisor seen"
        buffer = (
            f"receive buffer {self.receive_buffer_bytes / 2**20:.0f} MiB with the kernel's overhead"
        )
        packages = ", ".join(f"{name} {version}" for name, version in self.packages.items())
        lines = [
            f"machine   {self.cpu}, {self.cores} CPUs, {kind}, Linux {self.kernel}",
            f"versions  {self.python}, peerd {self.peerd}, {packages}",
            f"set-up    {self.pinning}; {buffer}",
        ]
        if self.busy_before > QUIET:
            lines.append(
                f"WARNING   the machine was {self.busy_before:.0%} busy before the start: "
                "stop the rest and run this again"
            )
        return "\n".join(lines)


def look_at_machine(cpus: Cpus, receive_buffer_bytes: int) -> Machine:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    return Machine(
        cpu=cpu_model(cpuinfo),
        cores=os.cpu_count() or 1,
        virtual=" hypervisor" in cpuinfo,
        kernel=platform.release(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        peerd=peerd.__version__,
        packages={name: package_version(name) for name in COMPARED},
        pinning=pinning_text(cpus),
        receive_buffer_bytes=receive_buffer_bytes,
        busy_before=psutil.cpu_percent(interval=1.0) / 100,
    )


def choose_cpus() -> Cpus:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        return Cpus(None, None)
    receiver, *others = allowed
    # Two threads of one core share its execution units: take another core where there is one.
    siblings = cpu_list(f"/sys/devices/system/cpu/cpu{receiver}/topology/thread_siblings_list")
    return Cpus(receiver, next((cpu for cpu in others if cpu not in siblings), others[0]))


def pinning_text(cpus: Cpus) -> str:
    if cpus.receiver is None:
        return "NOT pinned: this process may use 1 CPU only, which receiver and sender share"
    return f"receiver pinned to cpu{cpus.receiver}, sender to cpu{cpus.sender}"


def cpu_list(path: str) -> set[int]:
    """The CPUs of a kernel list such as ``0-1,8``; none when the file is not there."""
    cpus: set[int] = set()
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return cpus
    for part in text.split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def cpu_model(cpuinfo: str) -> str:
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()


def package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
