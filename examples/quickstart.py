"""The quick start of FaasNet.Discovery.Etcd, in Python.

Launches one unstructured UDP peer with the id "seedId" on port 5101, stores its information in etcd, and
displays the cluster. It needs an etcd at http://localhost:23790, such as that of `make run`, `peerd etcd`
or `docker compose up -d --wait`.
"""

from __future__ import annotations

import argparse
from contextlib import closing

from peerd import Peer, PeerdError
from peerd.registry import Registry


def launch_peer(port: int = 5101, peer_id: str = "peerId", *, etcd: str) -> Peer:
    """Start one UDP peer whose information is stored in etcd."""
    peer = Peer(host="localhost", port=port, peer_id=peer_id, etcd=etcd)
    peer.start()
    return peer


def display_cluster(etcd: str) -> None:
    """Display the peer information coming from etcd."""
    with Registry(etcd) as registry:
        for node in registry.nodes():
            print(f"Url = {node.url}, Port = {node.port}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    options.add_argument("--port", type=int, default=5101)
    options.add_argument("--etcd", default="http://localhost:23790")
    chosen = options.parse_args()
    try:
        with closing(launch_peer(chosen.port, "seedId", etcd=chosen.etcd)):
            display_cluster(chosen.etcd)
    except PeerdError as error:
        raise SystemExit(f"quickstart: {error}") from None


if __name__ == "__main__":
    main()
