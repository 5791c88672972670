"""etcd's answers as plain values."""

from __future__ import annotations

from typing import Any, NamedTuple


class KeyValue(NamedTuple):
    key: bytes
    value: bytes
    lease_id: int  # 0: no lease
    mod_revision: int

    @classmethod
    def of(cls, message: Any) -> KeyValue:
        return cls(message.key, message.value, message.lease, message.mod_revision)


class Lease(NamedTuple):
    lease_id: int
    ttl_s: int  # as granted: etcd raises a TTL that it finds too short


class Range(NamedTuple):
    items: list[KeyValue]  # in the order of their keys
    revision: int  # the revision of the store, the same for all items


class Change(NamedTuple):
    item: KeyValue
    """Without value and lease if it is deleted; its mod revision is then that of the deletion."""

    deleted: bool  # by a client, or because its lease expired

    @classmethod
    def of(cls, event: Any) -> Change:
        return cls(KeyValue.of(event.kv), deleted=bool(event.type))
