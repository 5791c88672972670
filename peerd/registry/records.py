"""What a peer says of itself in etcd: a JSON object that FaasNet's EtcdClusterStore reads unchanged.

    {"Url": "localhost", "Port": 5001, "PartitionKey": null,
     "Protocol": "udp", "PeerId": "localhost:5001", "Metadata": {}}

FaasNet looks at the first three, by exactly these names and types, and skips the rest. What it writes
itself has no PeerId, Protocol or Metadata, so these have defaults here; readers elsewhere write the
names in other cases, so any case is read.

The store is open to all, so a value is trusted no more than a datagram: it is bounded, every field is
checked, and text that a terminal would act on (control characters, direction overrides) is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from peerd.address import Address
from peerd.errors import InvalidRecordError

MAX_VALUE_BYTES = 64 * 1024
MAX_PEER_ID_BYTES = 255
MAX_URL_BYTES = MAX_PEER_ID_BYTES - len("[]:65535")
"""So that the default peer id always fits. A DNS name in use is shorter than this."""

MAX_PROTOCOL_BYTES = 64
MAX_PARTITION_KEY_BYTES = 255
MAX_METADATA_BYTES = 60 * 1024
"""As JSON. With everything else at its longest, the whole value stays below MAX_VALUE_BYTES."""

DEFAULT_PROTOCOL = "udp"

_FIELDS = {
    "Url": "url",
    "Port": "port",
    "PartitionKey": "partition_key",
    "Protocol": "protocol",
    "PeerId": "peer_id",
    "Metadata": "metadata",
}
_PLAIN_FIELDS = frozenset(_FIELDS)
_LONGEST_PLAIN_VALUE = MAX_METADATA_BYTES
_set = object.__setattr__
_FIELDS_IN_LOWER_CASE = {name.lower(): name for name in _FIELDS}


@dataclass(frozen=True)
class PeerRecord:
    """One peer. Raises InvalidRecordError for a value that cannot be stored."""

    url: str
    """The host that others send to: a name or an address, without scheme and port."""

    port: int

    peer_id: str = ""
    """Unique below the registry's prefix. Left empty, it becomes ``{url}:{port}``."""

    protocol: str = DEFAULT_PROTOCOL

    partition_key: str | None = None

    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Anything that JSON has. Copied, so a later change of the argument does not come through. Not to be
    changed in a record that a Registry has given: others have been given the same."""

    def __post_init__(self) -> None:
        _check_text("url", self.url, MAX_URL_BYTES)
        # bool is an int to Python, and not to anyone who reads the JSON.
        if type(self.port) is not int or not 1 <= self.port <= 65535:
            raise _invalid("port", self.port, "an integer from 1 to 65535")
        if self.peer_id == "":
            object.__setattr__(self, "peer_id", str(Address(self.url, self.port)))
        _check_text("peer_id", self.peer_id, MAX_PEER_ID_BYTES)
        if self.peer_id[0] == "/" or self.peer_id[-1] == "/":
            raise _invalid("peer_id", self.peer_id, "no '/' at either end, as it is part of a key")
        _check_text("protocol", self.protocol, MAX_PROTOCOL_BYTES)
        if self.partition_key is not None:
            _check_text("partition_key", self.partition_key, MAX_PARTITION_KEY_BYTES, shortest=0)
        object.__setattr__(self, "metadata", _json_copy(self.metadata))

    @classmethod
    def from_json(cls, value: bytes, stored_as: bytes | None = None) -> PeerRecord:
        """The record in a stored value. Raises InvalidRecordError for a value that is none.

        ``stored_as``: its key, below the prefix. A record that names a peer id is stored under that,
        or it is somebody else's. FaasNet's names none, and is stored under its host.
        """
        if len(value) > MAX_VALUE_BYTES:
            raise InvalidRecordError(
                f"the value has {len(value)} bytes: a record has at most {MAX_VALUE_BYTES}"
            )
        try:
            members = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise InvalidRecordError(f"the value {_short(value)} is no JSON: {error}") from None
        if not isinstance(members, dict):
            raise InvalidRecordError(f"the value {_short(value)} is no JSON object")
        if members.keys() >= _PLAIN_FIELDS and len(value) <= _LONGEST_PLAIN_VALUE:
            record = cls._of_plain(value, members)
            if record is not None and (stored_as is None or record.peer_id.encode() == stored_as):
                return record
        if not members.keys() <= _FIELDS.keys():
            # The exact name wins over the same in another case: FaasNet reads only that one.
            members = {
                _FIELDS_IN_LOWER_CASE.get(name.lower(), name): member
                for name, member in members.items()
            } | members
        if "Url" not in members or "Port" not in members:
            raise InvalidRecordError(f"the value {_short(value)} lacks Url or Port")
        peer_id = members.get("PeerId")
        if stored_as is not None and peer_id and str(peer_id).encode() != stored_as:
            raise InvalidRecordError(f"the value {_short(value)} is that of another peer id")
        # Null means the default for all but the two that have none.
        return cls(
            url=members["Url"],
            port=members["Port"],
            **{
                field_name: members[name]
                for name, field_name in _FIELDS.items()
                if name not in ("Url", "Port") and members.get(name) is not None
            },
        )

    @classmethod
    def _of_plain(cls, value: bytes, members: dict[str, Any]) -> PeerRecord | None:
        """The same for what peerd itself writes, in half the time; None where a closer look is needed.

        A listing of ten thousand spends most of its time here. Without escapes, text in JSON that is
        all ASCII holds no control character but DEL.
        """
        if not value.isascii() or b"\\" in value or b"\x7f" in value:
            return None
        url, port = members["Url"], members["Port"]
        peer_id, protocol = members["PeerId"], members["Protocol"]
        partition_key, metadata = members["PartitionKey"], members["Metadata"]
        if (
            type(url) is type(peer_id) is type(protocol) is str
            and type(port) is int
            and (partition_key is None or type(partition_key) is str)
            and type(metadata) is dict
            and 0 < len(url) <= MAX_URL_BYTES
            and 0 < port <= 65535
            and 0 < len(peer_id) <= MAX_PEER_ID_BYTES
            and peer_id[0] != "/" != peer_id[-1]
            and 0 < len(protocol) <= MAX_PROTOCOL_BYTES
            and (partition_key is None or len(partition_key) <= MAX_PARTITION_KEY_BYTES)
        ):
            record = object.__new__(cls)
            _set(
                record,
                "__dict__",
                {
                    "url": url,
                    "port": port,
                    "peer_id": peer_id,
                    "protocol": protocol,
                    "partition_key": partition_key,
                    "metadata": metadata,
                },
            )
            return record
        return None

    def to_json(self) -> bytes:
        return orjson.dumps(
            {name: getattr(self, field_name) for name, field_name in _FIELDS.items()}
        )

    def as_dict(self) -> dict[str, Any]:
        """The form of ``peerd nodes --json``."""
        return {
            "peer_id": self.peer_id,
            "url": self.url,
            "port": self.port,
            "protocol": self.protocol,
            "partition_key": self.partition_key,
            "metadata": self.metadata,
        }


def select(
    records: Iterable[PeerRecord],
    partition_key: str | None = None,
    protocol: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> list[PeerRecord]:
    """Those that have what is given: each item of ``metadata``, if any, with an equal value."""
    if partition_key is None and protocol is None and not metadata:
        return list(records)
    wanted = (metadata or {}).items()
    return [
        record
        for record in records
        if partition_key in (None, record.partition_key)
        and protocol in (None, record.protocol)
        and all(
            name in record.metadata and record.metadata[name] == value for name, value in wanted
        )
    ]


def _check_text(name: str, text: object, longest: int, shortest: int = 1) -> None:
    # isprintable() also refuses lone surrogates, so that encode() cannot fail.
    if (
        not isinstance(text, str)
        or not text.isprintable()
        or not shortest <= len(text.encode()) <= longest
    ):
        raise _invalid(name, text, f"printable text of {shortest} to {longest} bytes in UTF-8")


def _json_copy(metadata: object) -> dict[str, Any]:
    """``metadata`` as it will come back out of etcd; refused where that would not be the same."""
    if not isinstance(metadata, Mapping):
        raise _invalid("metadata", metadata, _JSON)
    given = dict(metadata)
    if not given:
        return given
    try:
        text = orjson.dumps(given)
        copy: dict[str, Any] = orjson.loads(text)
    except (TypeError, ValueError) as error:  # from dumps and from loads
        raise _invalid("metadata", given, f"{_JSON} ({error})") from None
    if copy != given:  # orjson put null for a NaN, a list for a tuple, text for a date
        raise _invalid("metadata", given, _JSON)
    if len(text) > MAX_METADATA_BYTES:
        raise _invalid("metadata", given, f"at most {MAX_METADATA_BYTES} bytes of JSON")
    return copy


_JSON = "an object of what JSON has: str, int of 64 bits, finite float, bool, None, list, dict"


def _invalid(name: str, value: object, allowed: str) -> InvalidRecordError:
    return InvalidRecordError(f"{name} {_short(value)}: allowed is {allowed}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
