"""A peer's record in etcd: a JSON object that FaasNet's EtcdClusterStore reads unchanged.

    {"Url": "localhost", "Port": 5001, "PartitionKey": null,
     "Protocol": "udp", "PeerId": "localhost:5001", "Metadata": {}}

FaasNet reads the first three members, by exactly these names and types, and skips the rest. Its own
records have no PeerId, Protocol or Metadata, so these three have defaults here. Other writers spell the
names in other cases, so case is ignored.

Anyone may write to the store, so a value is trusted no more than a datagram: its size and its nesting are
bounded, every field is checked, and text that would control a terminal (control characters, direction
overrides) is refused. Reading any bytes returns a record or raises InvalidRecordError: another exception
would end every listing and every watch for as long as the value is in etcd. Therefore nesting is checked
before anything recurses (repr, ``==``, orjson.dumps). The limit is FaasNet's own: System.Text.Json reads 64
levels, and one record with more makes its listing of all peers fail.
"""

from __future__ import annotations

import logging
import math
import reprlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from peerd.address import Address
from peerd.errors import InvalidRecordError

log = logging.getLogger(__name__)

MAX_VALUE_BYTES = 64 * 1024
MAX_PEER_ID_BYTES = 255
MAX_URL_BYTES = MAX_PEER_ID_BYTES - len("[]:65535")
"""Leaves room for the default peer id. A DNS name has at most 253 characters."""

MAX_PROTOCOL_BYTES = 64
MAX_PARTITION_KEY_BYTES = 255
MAX_METADATA_BYTES = 60 * 1024
"""As JSON. With every other field at its limit, the value stays below MAX_VALUE_BYTES."""

MAX_METADATA_LEVELS = 62
"""Of lists and objects, one within the other, below the metadata object itself."""

MAX_JSON_LEVELS = MAX_METADATA_LEVELS + 2
"""Of a whole record: the record and its metadata are the first two."""

DEFAULT_PROTOCOL = "udp"

_WARN_INTERVAL_S = 60.0

_FIELDS = {
    "Url": "url",
    "Port": "port",
    "PartitionKey": "partition_key",
    "Protocol": "protocol",
    "PeerId": "peer_id",
    "Metadata": "metadata",
}
_FIELDS_IN_LOWER_CASE = {name.lower(): name for name in _FIELDS}


@dataclass(frozen=True)
class PeerRecord:
    """One peer. Raises InvalidRecordError for a value that cannot be stored."""

    url: str
    """The advertised host: a name or an address, without scheme and port."""

    port: int

    peer_id: str = ""
    """Unique below the registry's prefix. Left empty, it becomes ``{url}:{port}``."""

    protocol: str = DEFAULT_PROTOCOL

    partition_key: str | None = None

    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Any JSON values, nested at most MAX_METADATA_LEVELS deep. The argument is copied. Do not change the
    metadata of a record that a Registry returned: its other readers share it."""

    def __post_init__(self) -> None:
        _check_text("url", self.url, MAX_URL_BYTES)
        # bool is a subclass of int, but True is not a number in JSON.
        if type(self.port) is not int or not 1 <= self.port <= 65535:
            raise _invalid("port", self.port, "an integer from 1 to 65535")
        if self.peer_id == "":
            object.__setattr__(self, "peer_id", str(Address(self.url, self.port)))
        _check_text("peer_id", self.peer_id, MAX_PEER_ID_BYTES)
        if self.peer_id[0] == "/" or self.peer_id[-1] == "/":
            raise _invalid(
                "peer_id", self.peer_id, "no '/' at either end, because it is part of a key"
            )
        _check_text("protocol", self.protocol, MAX_PROTOCOL_BYTES)
        if self.partition_key is not None:
            _check_text("partition_key", self.partition_key, MAX_PARTITION_KEY_BYTES, min_bytes=0)
        object.__setattr__(self, "metadata", _json_copy(self.metadata))

    @classmethod
    def from_json(cls, value: bytes, stored_as: bytes | None = None) -> PeerRecord:
        """Parse a stored value. Raises InvalidRecordError, and nothing else, if it holds no record.

        ``stored_as``: its key, without the prefix. A record that names a peer id must be stored under that
        id; FaasNet's records name none and are stored under their host.
        """
        if len(value) > MAX_VALUE_BYTES:
            raise InvalidRecordError(
                f"the value has {len(value)} bytes: a record has at most {MAX_VALUE_BYTES}"
            )
        try:
            members = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise InvalidRecordError(f"the value {_short(value)} is not JSON: {error}") from None
        # Counting brackets is enough for nearly all values, and takes 0.1 us.
        if value.count(b"[") + value.count(b"{") > MAX_JSON_LEVELS and _is_deeper(
            members, MAX_JSON_LEVELS
        ):
            raise InvalidRecordError(
                f"the value {_short(value)} is nested more than {MAX_JSON_LEVELS} levels deep"
            )
        if not isinstance(members, dict):
            raise InvalidRecordError(f"the value {_short(value)} is not a JSON object")
        if members.keys() >= _FIELDS.keys() and len(value) <= MAX_METADATA_BYTES:
            record = cls._of_plain(value, members)
            if record is not None and (stored_as is None or record.peer_id.encode() == stored_as):
                return record
        if not members.keys() <= _FIELDS.keys():
            # The exact name takes precedence over other spellings: FaasNet reads only that one.
            members = {
                _FIELDS_IN_LOWER_CASE.get(name.lower(), name): member
                for name, member in members.items()
            } | members
        if "Url" not in members or "Port" not in members:
            raise InvalidRecordError(f"the value {_short(value)} lacks Url or Port")
        peer_id = members.get("PeerId")
        is_named = isinstance(peer_id, str) and peer_id != ""
        if stored_as is not None and is_named and peer_id.encode() != stored_as:
            raise InvalidRecordError(
                f"the value {_short(value)} names another peer id than its key"
            )
        # Null means the default, where there is one.
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
        """Parse what peerd itself writes, in half the time. Returns None if the full checks are needed.

        A listing of 10,000 records spends most of its time here. JSON text that is all ASCII and has no
        escapes contains no control character except DEL.
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
            record.__dict__.update(
                url=url,
                port=port,
                peer_id=peer_id,
                protocol=protocol,
                partition_key=partition_key,
                metadata=metadata,
            )
            return record
        return None

    def to_json(self) -> bytes:
        """The value to store in etcd, with FaasNet's names of the fields."""
        return orjson.dumps(
            {name: getattr(self, field_name) for name, field_name in _FIELDS.items()}
        )

    def as_dict(self) -> dict[str, Any]:
        """The form of ``peerd nodes --json``."""
        names = ("peer_id", "url", "port", "protocol", "partition_key", "metadata")
        return {name: getattr(self, name) for name in names}


class RecordReader:
    """Reads the records below one prefix, and logs the keys of other values: one per minute as a warning."""

    def __init__(self, folder: bytes) -> None:
        self._folder = folder
        self._warn_at_s = -math.inf

    def read(self, key: bytes, value: bytes) -> PeerRecord | None:
        """None for a value that is no record."""
        try:
            return PeerRecord.from_json(value, key[len(self._folder) :])
        except InvalidRecordError as error:
            now_s = time.monotonic()
            level = logging.DEBUG
            if now_s >= self._warn_at_s:
                self._warn_at_s = now_s + _WARN_INTERVAL_S
                level = logging.WARNING
            log.log(level, "key=%s skipped, not a peer record: %s", _short(key), error)
            return None


def select(
    records: Iterable[PeerRecord],
    partition_key: str | None = None,
    protocol: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> list[PeerRecord]:
    """The records that match every argument; ``metadata`` matches if each of its items is in the record."""
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


def _check_text(name: str, text: object, max_bytes: int, min_bytes: int = 1) -> None:
    # isprintable() is false for lone surrogates, so encode() cannot fail.
    if (
        not isinstance(text, str)
        or not text.isprintable()
        or not min_bytes <= len(text.encode()) <= max_bytes
    ):
        raise _invalid(name, text, f"printable text of {min_bytes} to {max_bytes} bytes in UTF-8")


def _json_copy(metadata: object) -> dict[str, Any]:
    """``metadata`` as a reader of etcd will see it; refused if that is not equal to what was given."""
    if not isinstance(metadata, Mapping):
        raise _invalid("metadata", metadata, _JSON)
    given = dict(metadata)
    if not given:
        return given
    try:
        text = orjson.dumps(given)
        copy: dict[str, Any] = orjson.loads(text)
    except (TypeError, ValueError) as error:  # from dumps and from loads
        # orjson refuses more than 254 levels, and therefore a list that contains itself.
        allowed = _LEVELS if "Recursion limit" in str(error) else f"{_JSON} ({error})"
        raise _invalid("metadata", given, allowed) from None
    if _is_deeper(copy, MAX_METADATA_LEVELS + 1):
        raise _invalid("metadata", given, _LEVELS)
    if copy != given:  # orjson writes null for a NaN, a list for a tuple, text for a date
        raise _invalid("metadata", given, _JSON)
    if len(text) > MAX_METADATA_BYTES:
        raise _invalid("metadata", given, f"at most {MAX_METADATA_BYTES} bytes of JSON")
    return copy


def _is_deeper(value: object, max_levels: int) -> bool:
    """Whether lists and dicts are nested in more than that many levels. Does not recurse."""
    level = [value]
    for _ in range(max_levels + 1):
        containers = [each for each in level if isinstance(each, dict | list)]
        if not containers:
            return False
        level = [
            child
            for each in containers
            for child in (each.values() if isinstance(each, dict) else each)
        ]
    return True


_JSON = "an object of JSON values: str, int of 64 bits, finite float, bool, None, list, dict"
_LEVELS = f"at most {MAX_METADATA_LEVELS} levels of lists and objects within each other"


def _invalid(name: str, value: object, allowed: str) -> InvalidRecordError:
    return InvalidRecordError(f"{name} {_short(value)}: allowed is {allowed}")


def _short(value: object) -> str:
    """Unlike repr() it does not recurse into what is nested deeply, and its result is short."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # an int of more than 4,300 digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 100 else f"{text[:97]}..."


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100
