"""A network namespace for each member of a cluster, with a link to clients and one to its peers.

    test's namespace --- "clients" bridge --- member 0, 1, 2
                          "peers" bridge  --- member 0, 1, 2

A link that is down silently drops all packets, like a pulled cable: no connection is reset or closed. Both
bridges are in a namespace of their own, so that deleting the namespaces removes everything.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from contextlib import ExitStack

from harness.namespaces import Host, ip, new_host
from harness.ports import MAX_WORKERS, WORKER

_NUMBERS = itertools.count()
_SUBNETS = 256 // MAX_WORKERS
"""The number of subnets of each xdist worker, so that no two use the same addresses."""


class ClusterNetwork:
    """For a ``with`` block around the block of the cluster."""

    def __init__(self, size: int) -> None:
        number = next(_NUMBERS)
        self._size = size
        self._link = f"pd{os.getpid()}n{number}"  # at most 15 characters
        # 198.18.0.0/15 is reserved for benchmarks of networks, so it is in use nowhere.
        self._subnet = WORKER * _SUBNETS + number % _SUBNETS
        self._hub: Host
        self._members: list[Host] = []

    def namespace(self, number: int) -> str:
        return self._members[number].name

    def client_host(self, number: int) -> str:
        return f"198.18.{self._subnet}.{10 + number}"

    def peer_host(self, number: int) -> str:
        return f"198.19.{self._subnet}.{10 + number}"

    def set_links(self, number: int, state: str, kinds: Iterable[str]) -> None:
        """``state``: up or down. ``kinds``: clients, peers or both."""
        for kind in kinds:
            self._hub.ip(f"link set {kind}{number} {state}")

    def __enter__(self) -> ClusterNetwork:
        with ExitStack() as self._made:
            self._hub = hub = new_host(self._made)
            for kind in ("clients", "peers"):
                hub.ip(f"link add {kind} type bridge")
                hub.ip(f"link set {kind} up")
            for number in range(self._size):
                member = new_host(self._made)
                self._members.append(member)
                hosts = {"clients": self.client_host(number), "peers": self.peer_host(number)}
                for kind, host in hosts.items():
                    end = f"{kind}{number}"
                    hub.ip(f"link add {end} type veth peer name {kind} netns {member.name}")
                    member.ip(f"addr add {host}/24 dev {kind}")
                    member.ip(f"link set {kind} up")
                    hub.ip(f"link set {end} master {kind} up")
            ip(f"link add {self._link} type veth peer name test netns {hub.name}")
            # Deleting the hub would remove it too, but only some time later.
            self._made.callback(ip, f"link del {self._link}")
            hub.ip("link set test master clients up")
            ip(f"addr add 198.18.{self._subnet}.1/24 dev {self._link}")
            ip(f"link set {self._link} up")
            self._made = self._made.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._made.close()
