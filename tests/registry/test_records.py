"""A value is a record that FaasNet can read and a terminal can show, or InvalidRecordError."""

import datetime
import json
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from types import MappingProxyType
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerd.errors import InvalidRecordError
from peerd.registry.owner import Owner
from peerd.registry.records import (
    MAX_METADATA_BYTES,
    MAX_PARTITION_KEY_BYTES,
    MAX_PEER_ID_BYTES,
    MAX_PROTOCOL_BYTES,
    MAX_URL_BYTES,
    MAX_VALUE_BYTES,
    PeerRecord,
)


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


DEEP: list[Callable[[int], bytes]] = [
    lambda levels: b'{"Url":"h","Port":1,"Metadata":{"n":%b}}' % nested(levels),
    lambda levels: (
        b'{"Url":"h","Port":1,"PartitionKey":null,"Protocol":"udp","PeerId":"h:1",'
        b'"Metadata":{"n":%b}}' % nested(levels)
    ),
    lambda levels: b'{"Url":"h","Port":1,"Else":{"n":%b}}' % nested(levels),
    lambda levels: b'{"Url":"h","Port":1,"PeerId":[%b]}' % nested(levels),
    lambda levels: b'{"Url":[%b],"Port":1}' % nested(levels),
    lambda levels: b'{"Url":"h","Port":%b}' % nested(levels),
]
"""The places where a record may hold deeply nested JSON."""

FAASNETS = b'{"Url":"localhost","Port":5009,"PartitionKey":null,"Id":"..."}'


def test_the_stored_form() -> None:
    record = PeerRecord(url="localhost", port=5001, partition_key="p", metadata={"zone": "a"})
    assert record.to_json() == (
        b'{"Url":"localhost","Port":5001,"PartitionKey":"p","Protocol":"udp",'
        b'"PeerId":"localhost:5001","Metadata":{"zone":"a"}}'
    )
    assert PeerRecord("h", 1).to_json().startswith(b'{"Url":"h","Port":1,"PartitionKey":null,')


def test_the_form_of_nodes_json() -> None:
    assert PeerRecord("localhost", 5001).as_dict() == {
        "peer_id": "localhost:5001",
        "url": "localhost",
        "port": 5001,
        "protocol": "udp",
        "partition_key": None,
        "metadata": {},
    }


@pytest.mark.parametrize(
    ("value", "record"),
    [
        (FAASNETS, PeerRecord("localhost", 5009)),
        (b'{"url":"h","PORT":1,"peerid":"x"}', PeerRecord("h", 1, peer_id="x")),
        (b'{"url":"other","Url":"h","Port":1}', PeerRecord("h", 1)),
        (b'{"Url":"h","Port":1,"PeerId":"","Protocol":null,"Metadata":null}', PeerRecord("h", 1)),
        (b'{"Url":"h","Port":1,"PartitionKey":""}', PeerRecord("h", 1, partition_key="")),
        (b'{"Url":"a","Port":1,"Url":"b"}', PeerRecord("b", 1)),
    ],
)
def test_records_of_other_writers_are_read(value: bytes, record: PeerRecord) -> None:
    assert PeerRecord.from_json(value) == record


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"no JSON",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b'{"Url":"h"}',
        b'{"Port":1}',
        b'{"Url":null,"Port":1}',
        b'{"Url":"","Port":1}',
        b'{"Url":1,"Port":1}',
        b'{"Url":"h","Port":"1"}',
        b'{"Url":"h","Port":true}',
        b'{"Url":"h","Port":1.0}',
        b'{"Url":"h","Port":0}',
        b'{"Url":"h","Port":65536}',
        b'{"Url":"h","Port":1,"PartitionKey":1}',
        b'{"Url":"h","Port":1,"Metadata":[1]}',
        b'{"Url":"h","Port":1,"PeerId":"/x"}',
        b'{"Url":"h\\u001b[31m","Port":1}',
        b'{"Url":"h\\u202e","Port":1}',
        b'{"Url":"h","Port":1,"X":"' + b"x" * MAX_VALUE_BYTES + b'"}',
        b'{"Url":"h","Port":1,"Metadata":{"n":NaN}}',
        b'{"Url":"h","Port":1,"Metadata":{"n":1e999}}',
        b'{"Url":"h","Port":' + b"9" * 5000 + b"}",
        b'{"Url":"h\\ud800","Port":1}',
        b'{"Url":"h\xff","Port":1}',
        b'{"Url":"h","Port":1,"PeerId":["h"]}',
        b"[" * 60_000,
        b"[" * 1000 + b"]" * 1000,
    ],
    ids=lambda value: repr(value[:40]),
)
def test_any_other_value_is_no_record(value: bytes) -> None:
    with pytest.raises(InvalidRecordError) as caught:
        PeerRecord.from_json(value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("url", "", "1 to 247 bytes"),
        ("url", "u" * (MAX_URL_BYTES + 1), "1 to 247 bytes"),
        ("url", None, "printable text"),
        ("port", 0, "1 to 65535"),
        ("port", 65536, "1 to 65535"),
        ("port", True, "an integer"),
        ("port", "5001", "an integer"),
        ("peer_id", "/x", "no '/' at either end"),
        ("peer_id", "x/", "no '/' at either end"),
        ("peer_id", "x\n", "printable text"),
        ("peer_id", "\ud800", "printable text"),
        ("peer_id", "ä" * 128, "1 to 255 bytes"),
        ("protocol", "", "1 to 64 bytes"),
        ("partition_key", 1, "printable text"),
        ("metadata", [], "an object"),
        ("metadata", {1: 2}, "an object"),
        ("metadata", {"x": float("nan")}, "finite float"),
        ("metadata", {"x": 2**64}, "int of 64 bits"),
        ("metadata", {"x": (1, 2)}, "list"),
        ("metadata", {"x": datetime.date(2026, 1, 1)}, "an object"),
        ("metadata", {"x": object()}, "an object"),
        ("metadata", {"x": "x" * MAX_METADATA_BYTES}, "at most 61440 bytes"),
        pytest.param("port", 10**5000, "an integer", id="huge"),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: Any, allowed: str) -> None:
    fields: dict[str, Any] = {"url": "h", "port": 1} | {field: value}
    with pytest.raises(InvalidRecordError, match=f"^{field} .*{allowed}"):
        PeerRecord(**fields)


def test_the_longest_record_fits() -> None:
    url = ":" + '"' * (MAX_URL_BYTES - 1)  # each quote takes two bytes in JSON, the colon brackets
    record = PeerRecord(
        url=url,
        port=65535,
        protocol='"' * MAX_PROTOCOL_BYTES,
        partition_key='"' * MAX_PARTITION_KEY_BYTES,
        metadata={"": "x" * (MAX_METADATA_BYTES - len('{"":""}'))},
    )
    assert len(record.peer_id) == MAX_PEER_ID_BYTES
    assert PeerRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize("levels", [63, 253, 254, 1000, 20_000])
def test_too_deep_nesting_is_refused(levels: int) -> None:
    for value in DEEP:
        with pytest.raises(InvalidRecordError) as caught:
            PeerRecord.from_json(value(levels))
        assert len(str(caught.value)) < 400
    metadata: dict[str, Any] = {}
    for _ in range(levels):
        metadata = {"n": metadata}
    with pytest.raises(InvalidRecordError, match=r"^metadata .*at most 62 levels"):
        PeerRecord("h", 1, metadata=metadata)


def test_metadata_may_be_nested_as_deeply_as_faasnet_reads() -> None:
    record = PeerRecord("h", 1, metadata={"n": orjson.loads(nested(62))})
    assert PeerRecord.from_json(record.to_json()) == record
    wide = PeerRecord("h", 1, metadata={"n": [[]] * 100})
    assert PeerRecord.from_json(wide.to_json()) == wide


def test_a_record_is_a_value() -> None:
    metadata = {"tags": ["a"]}
    record = PeerRecord("h", 1, metadata=MappingProxyType(metadata))
    metadata["tags"].append("b")
    assert record.metadata == {"tags": ["a"]}
    assert pickle.loads(pickle.dumps(record)) == record
    assert len({record, replace(record), replace(record, port=2)}) == 2
    with pytest.raises(FrozenInstanceError):
        record.port = 2  # type: ignore[misc]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
NAMES = st.sampled_from(["Url", "url", "Port", "PORT", "PartitionKey", "PeerId", "Metadata", "Id"])
PLAUSIBLE = st.sampled_from(["h", "x/y", 1, 65535, None, {}, {"a": 1}])
TEXT = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=10)
)


# The json module also writes NaN and infinities, which are not JSON, and integers of any size.
STORED = (JSON | st.dictionaries(NAMES, PLAUSIBLE | JSON)).map(lambda value: json.dumps(value))


# Damaged records: some bytes replaced, inserted or removed.
FULL = PeerRecord("h", 1, partition_key="p", metadata={"n": [{"m": 1}]}).to_json()
DAMAGED = st.builds(
    lambda start, middle, length: FULL[:start] + middle + FULL[start + length :],
    st.integers(0, len(FULL)),
    st.binary(max_size=3) | st.sampled_from([b"[", b"{", b"9" * 400, b"1e999", b"NaN", b"\\ud800"]),
    st.integers(0, 20),
)
NESTED = st.builds(lambda value, levels: value(levels), st.sampled_from(DEEP), st.integers(0, 2000))


@given(st.binary() | STORED.map(str.encode) | DAMAGED | NESTED, st.none() | st.binary(max_size=3))
def test_reading_never_raises_anything_else(value: bytes, key: bytes | None) -> None:
    """Any bytes give a record, which is stored as it was read, or InvalidRecordError."""
    Owner.in_value(value)
    try:
        record = PeerRecord.from_json(value, key)
    except InvalidRecordError:
        return
    assert PeerRecord.from_json(record.to_json()) == record
    assert orjson.dumps(record.as_dict())
    assert repr(record)


@given(
    url=TEXT.filter(lambda text: len(text.encode()) <= MAX_URL_BYTES and text.isprintable()),
    port=st.integers(1, 65535),
    partition_key=st.none() | st.just("") | st.just("eu-1"),
    metadata=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=5),
        SCALARS | st.lists(SCALARS) | st.dictionaries(st.text("ab"), SCALARS),
    ),
)
def test_a_stored_record_is_read_back(
    url: str, port: int, partition_key: str | None, metadata: dict[str, Any]
) -> None:
    if url.startswith("/"):
        url = f"h{url[1:]}"  # it begins the default peer id
    record = PeerRecord(url, port, partition_key=partition_key, metadata=metadata)
    assert PeerRecord.from_json(record.to_json()) == record
    assert orjson.loads(record.to_json())["Port"] == port
