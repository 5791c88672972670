"""A network namespace for each member of a cluster, with a link to clients and one to its peers.

    test's namespace --- "clients" bridge --- member 0, 1, 2
                          "peers" bridge  --- member 0, 1, 2

A link that is down silently drops all packets, like a pulled cable: no connection is reset or closed. Both
bridges are in a namespace of their own, so that deleting the namespaces removes everything.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Iterable
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from harness.ports import MAX_WORKERS, WORKER

_NUMBERS = itertools.count()
_SUBNETS = 256 // MAX_WORKERS
"""The number of subnets of each xdist worker, so that no two use the same addresses."""


@cache
def why_no_networks() -> str:
    """Why network namespaces cannot be created here; empty if they can."""
    name = f"peerd-{os.getpid()}-probe"
    try:
        _ip("netns", "add", name)
    except OSError:
        return "network namespaces need the program ip: apt-get install iproute2"
    except subprocess.CalledProcessError as error:
        return f"network namespaces need root and CAP_SYS_ADMIN: {error.stderr.strip()}"
    try:
        _ip("-n", name, "link", "add", "probe", "type", "bridge")
    except subprocess.CalledProcessError as error:
        return f"no bridge can be made: {error.stderr.strip()}"
    finally:
        _ip("netns", "del", name)
    return ""


class ClusterNetwork:
    """For a ``with`` block around the block of the cluster."""

    def __init__(self, members: int) -> None:
        number = next(_NUMBERS)
        self._name = f"peerd-{os.getpid()}-{number}"
        self._members = members
        self._hub = f"{self._name}-hub"
        self._link = f"pd{os.getpid()}n{number}"  # at most 15 characters
        # 198.18.0.0/15 is reserved for benchmarks of networks, so it is in use nowhere.
        self._subnet = WORKER * _SUBNETS + number % _SUBNETS

    def namespace(self, number: int) -> str:
        return f"{self._name}-{number}"

    def client_host(self, number: int) -> str:
        return f"198.18.{self._subnet}.{10 + number}"

    def peer_host(self, number: int) -> str:
        return f"198.19.{self._subnet}.{10 + number}"

    def set_links(self, number: int, state: str, kinds: Iterable[str]) -> None:
        """``state``: up or down. ``kinds``: clients, peers or both."""
        for kind in kinds:
            _ip("-n", self._hub, "link", "set", f"{kind}{number}", state)

    def __enter__(self) -> ClusterNetwork:
        _remove_abandoned_namespaces()
        with ExitStack() as self._made:
            self._make()
            self._made = self._made.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._made.close()

    def _make(self) -> None:
        self._add_namespace(self._hub)
        for kind in ("clients", "peers"):
            _ip("-n", self._hub, "link", "add", kind, "type", "bridge")
            _ip("-n", self._hub, "link", "set", kind, "up")
        for number in range(self._members):
            self._add_namespace(self.namespace(number))
            self._connect(number, "clients", self.client_host(number))
            self._connect(number, "peers", self.peer_host(number))
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "test", "netns", self._hub)
        # Deleting the hub would remove it too, but only some time later.
        self._made.callback(_ip, "link", "del", self._link)
        _ip("-n", self._hub, "link", "set", "test", "master", "clients", "up")
        _ip("addr", "add", f"198.18.{self._subnet}.1/24", "dev", self._link)
        _ip("link", "set", self._link, "up")

    def _add_namespace(self, name: str) -> None:
        _ip("netns", "add", name)
        self._made.callback(_ip, "netns", "del", name)
        _ip("-n", name, "link", "set", "lo", "up")

    def _connect(self, number: int, kind: str, host: str) -> None:
        member, end = self.namespace(number), f"{kind}{number}"
        link = ["link", "add", kind, "netns", member, "type", "veth"]
        _ip(*link, "peer", "name", end, "netns", self._hub)
        _ip("-n", member, "addr", "add", f"{host}/24", "dev", kind)
        _ip("-n", member, "link", "set", kind, "up")
        _ip("-n", self._hub, "link", "set", end, "master", kind, "up")


def _remove_abandoned_namespaces() -> None:
    """Namespaces outlive the process that created them; their names contain its pid."""
    for path in Path("/run/netns").glob("peerd-*"):
        match = re.match(r"peerd-(\d+)-", path.name)
        if match and not Path("/proc", match[1]).exists():
            subprocess.run(["ip", "netns", "del", path.name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
