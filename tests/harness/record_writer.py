"""Peers that appear, change and disappear in etcd without the registry."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from harness.etcd_gateway import Gateway, GatewayError
from peerd.registry import PeerRecord

_PAUSE_S = 0.01


class RecordWriter:
    """Repeatedly puts and deletes a few records. No two values are equal."""

    def __init__(self, gateway: Gateway, prefix: str, seed: int = 1) -> None:
        self._gateway = gateway
        self._folder = f"{prefix}/".encode()
        self._random = random.Random(seed)
        self._written = 0
        self._there: set[str] = set()
        self.revision = 0  # after the last answered write

    def put(self, peer_id: str) -> PeerRecord:
        self._written += 1
        record = PeerRecord("localhost", 5001, peer_id, metadata={"Written": self._written})
        self.revision = self._gateway.put(self._key(peer_id), record.to_json())
        self._there.add(peer_id)
        return record

    def delete(self, peer_id: str) -> None:
        self.revision = self._gateway.delete(self._key(peer_id))
        self._there.discard(peer_id)

    def write(self, count: int = 1) -> None:
        """Put or delete ``count`` times; each is one event."""
        for _ in range(count):
            peer_id = f"peer-{self._random.randrange(8)}"
            if peer_id in self._there and self._random.random() < 0.4:
                self.delete(peer_id)
            else:
                self.put(peer_id)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write in a thread, whatever happens to etcd. Only etcd then knows the result, because a write
        without an answer may have been applied.
        """
        done = threading.Event()

        def write() -> None:
            while not done.wait(_PAUSE_S):
                try:
                    self.write()
                except (OSError, GatewayError):
                    continue

        thread = threading.Thread(target=write, name="record-writer")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def records(self) -> dict[str, PeerRecord]:
        """The records in etcd, by peer id."""
        return {
            key.removeprefix(self._folder).decode(): PeerRecord.from_json(item.value)
            for key, item in self._gateway.items(self._folder).items()
        }

    def _key(self, peer_id: str) -> bytes:
        return self._folder + peer_id.encode()
