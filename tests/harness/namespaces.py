"""Hosts on virtual links, each a network namespace, and sockets in them that this process uses.

    server --- <link> --- host behind it

A link is a veth pair; its name is the interface on either side.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import socket
import subprocess
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

CLONE_NEWNET = 0x40000000
_NUMBERS = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


@cache
def why_no_networks() -> str:
    """Why network namespaces cannot be created here; empty if they can."""
    name = f"peerd-{os.getpid()}-probe"
    try:
        ip(f"netns add {name}")
    except OSError:
        return "network namespaces need the program ip: apt-get install iproute2"
    except subprocess.CalledProcessError as error:
        return f"network namespaces need root and CAP_SYS_ADMIN: {error.stderr.strip()}"
    try:
        ip(f"-n {name} link add probe type bridge")
    except subprocess.CalledProcessError as error:
        return f"no bridge can be made: {error.stderr.strip()}"
    finally:
        ip(f"netns del {name}")
    return ""


class Host:
    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, command: str) -> None:
        """A command within the host, such as ``tc qdisc add ...``."""
        ip(f"netns exec {self.name} {command}")

    def ip(self, command: str) -> None:
        ip(f"-n {self.name} {command}")

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
            self.server = new_host(undo)
            for number, link in enumerate(self._links, 77):
                other = self.behind[link] = new_host(undo)
                self.server.ip(f"link add {link} type veth peer name {link} netns {other.name}")
                for end, host in enumerate((self.server, other), 1):
                    host.ip(f"addr add 10.{number}.0.{end}/24 dev {link}")
                    host.ip(f"addr add fd{number}::{end}/64 dev {link} nodad")
                    host.ip(f"link set {link} up")
            self._made = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._made.close()


def new_host(made: ExitStack) -> Host:
    """A namespace with nothing but loopback, which ``made`` removes."""
    _remove_abandoned_namespaces()
    host = Host(f"peerd-{os.getpid()}-{next(_NUMBERS)}")
    ip(f"netns add {host.name}")
    made.callback(ip, f"netns del {host.name}")
    host.ip("link set lo up")
    return host


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)


@cache
def _remove_abandoned_namespaces() -> None:
    """Namespaces outlive the process that created them; their names contain its pid."""
    for path in Path("/run/netns").glob("peerd-*"):
        match = re.match(r"peerd-(\d+)-", path.name)
        if match and not Path("/proc", match[1]).exists():
            subprocess.run(["ip", "netns", "del", path.name], capture_output=True, check=False)


def _enter(namespace: int) -> None:
    """Of this thread; its sockets stay where they were made."""
    if _libc.setns(namespace, CLONE_NEWNET) < 0:
        raise OSError(ctypes.get_errno(), "setns")
