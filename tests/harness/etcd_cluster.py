"""Three members of etcd, on loopback or each in a network namespace where it can be cut off."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from harness.cluster_network import ClusterNetwork
from harness.etcd_gateway import Gateway, GatewayError
from harness.etcd_process import EtcdProcess
from harness.eventually import eventually

SIZE = 3
_ASK_TIMEOUT_S = 0.5


class EtcdCluster:
    """A cluster for a ``with`` block, which begins when all members serve."""

    def __init__(self, binary: Path, folder: Path, network: ClusterNetwork | None = None) -> None:
        self.members = [
            EtcdProcess(
                binary,
                folder,
                name=f"member{number}",
                host=network.client_host(number) if network else "127.0.0.1",
                peer_host=network.peer_host(number) if network else "127.0.0.1",
                namespace=network.namespace(number) if network else None,
            )
            for number in range(SIZE)
        ]
        initial = ",".join(f"{member.name}=http://{member.peer}" for member in self.members)
        for member in self.members:
            member.flags.append(f"--initial-cluster={initial}")
            # etcd's defaults: the time without a leader is part of the tests.
            member.flags += ["--heartbeat-interval=100", "--election-timeout=1000"]
        self._network = network
        self._ids: dict[int, EtcdProcess] = {}

    @property
    def endpoints(self) -> str:
        """The URLs of all members, as ``Registry`` takes them."""
        return ",".join(member.endpoint for member in self.members)

    def leader(self) -> EtcdProcess:
        """The member that a majority follows; waits for an election to end."""
        leader = eventually(self._elected)
        assert leader is not None
        return leader

    def move_leader(self, to: EtcdProcess) -> None:
        """Waits until ``to`` leads. All members must be up."""
        (number,) = (number for number, member in self._ids.items() if member is to)

        def leads() -> bool:
            leader = self.leader()
            if leader is not to:
                leader.gateway.move_leader(number)
            return leader is to

        eventually(leads)

    def others(self, member: EtcdProcess) -> list[EtcdProcess]:
        return [other for other in self.members if other is not member]

    # Faults, beside those of each process

    def cut(self, member: EtcdProcess) -> None:
        """Drops all packets to and from the member, without an error on either side."""
        self._set_links(member, "down", "clients", "peers")

    def cut_from_peers(self, member: EtcdProcess) -> None:
        """Clients still reach it, but it is not part of the majority any more."""
        self._set_links(member, "down", "peers")

    def mend(self, member: EtcdProcess) -> None:
        """Ends ``cut`` and ``cut_from_peers``; returns when the member serves again."""
        self._set_links(member, "up", "clients", "peers")
        member.wait_ready()

    def _set_links(self, member: EtcdProcess, state: str, *kinds: str) -> None:
        assert self._network is not None, "a member can be cut off only in a ClusterNetwork"
        self._network.set_links(self.members.index(member), state, kinds)

    def __enter__(self) -> EtcdCluster:
        with ExitStack() as running:
            for member in self.members:
                running.callback(member.kill)
                member.launch()
            for member in self.members:
                member.wait_ready()
                self._ids[member.gateway.status().member_id] = member
            self.leader()
            self._running = running.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def _elected(self) -> EtcdProcess | None:
        votes: Counter[int] = Counter()
        claims = set()
        for member in self.members:
            if not member.running:
                continue
            try:
                status = Gateway(member.plain, timeout_s=_ASK_TIMEOUT_S).status()
            except (OSError, GatewayError):  # stopped, cut off or just coming up
                continue
            votes[status.leader_id] += 1
            if status.leader_id == status.member_id:
                claims.add(status.member_id)
        for number, count in votes.items():
            # A leader that was cut off continues to believe in its lead for some time.
            if count > SIZE // 2 and number in claims:
                return self._ids[number]
        return None
