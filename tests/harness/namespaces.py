"""Hosts on virtual links, each a network namespace, and sockets in them that this process uses.

    server --- <link> --- host behind it

A link is a veth pair; its name is the interface on either side.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import socket
import subprocess
from contextlib import ExitStack

import pytest

from harness.cluster_network import why_no_networks

CLONE_NEWNET = 0x40000000
_NUMBERS = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


class Host:
    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, command: str) -> None:
        """A command within the host, such as ``tc qdisc add ...``."""
        subprocess.run(
            ["ip", "netns", "exec", self.name, *command.split()], check=True, capture_output=True
        )

    def ip(self, command: str) -> None:
        subprocess.run(["ip", "-n", self.name, *command.split()], check=True, capture_output=True)

    def socket(
        self, address: str = "", port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> socket.socket:
        """A UDP socket of this host, bound to ``address`` unless that is empty."""
        with open("/proc/thread-self/ns/net") as here, open(f"/run/netns/{self.name}") as there:
            _enter(there.fileno())
            try:
                sock = socket.socket(family, socket.SOCK_DGRAM)
                if address == "::":
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                if address:
                    sock.bind((address, port))
            finally:
                _enter(here.fileno())
        sock.settimeout(5)
        return sock


class Hosts:
    """For a ``with`` block: a server, and a host behind each link; skips where none can be made.

    Link number n (from 0) has 10.(77+n).0.0/24 and fd(77+n)::/64: 1 is the server, 2 the host.
    """

    def __init__(self, *links: str) -> None:
        self._links = links
        self._made = ExitStack()
        self.server: Host
        self.behind: dict[str, Host] = {}

    def __enter__(self) -> Hosts:
        if reason := why_no_networks():
            pytest.skip(reason)
        with self._made as undo:
            self.server = self._host()
            for number, link in enumerate(self._links, 77):
                other = self.behind[link] = self._host()
                self.server.ip(f"link add {link} type veth peer name {link} netns {other.name}")
                for end, host in enumerate((self.server, other), 1):
                    host.ip(f"addr add 10.{number}.0.{end}/24 dev {link}")
                    host.ip(f"addr add fd{number}::{end}/64 dev {link} nodad")
                    host.ip(f"link set {link} up")
            self._made = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._made.close()

    def _host(self) -> Host:
        # ClusterNetwork removes namespaces of this form that a killed run has left.
        host = Host(f"peerd-{os.getpid()}-host{next(_NUMBERS)}")
        subprocess.run(["ip", "netns", "add", host.name], check=True, capture_output=True)
        self._made.callback(
            subprocess.run, ["ip", "netns", "del", host.name], check=True, capture_output=True
        )
        host.ip("link set lo up")
        return host


def _enter(namespace: int) -> None:
    """Of this thread; its sockets stay where they were made."""
    if _libc.setns(namespace, CLONE_NEWNET) < 0:
        raise OSError(ctypes.get_errno(), "setns")
