import pickle
from pathlib import Path

import pytest

from peerd import DecodeError, Message, decode, encode


def test_the_bytes_of_an_envelope() -> None:
    assert encode("PING", "1.0", b"hi") == b"\0\0\0\4PING\0\0\0\0031.0hi"


def test_decode_takes_apart_what_encode_made() -> None:
    message = decode(encode("PING", "1.0", b"hi"), ("127.0.0.1", 5001))
    assert (message.magic, message.version, message.body) == ("PING", "1.0", b"hi")
    assert message.sender == ("127.0.0.1", 5001)


def test_everything_may_be_empty() -> None:
    message = decode(encode("", "", b""))
    assert (message.magic, message.version, message.body, message.sender) == ("", "", b"", None)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_decoded(kind: type[bytes]) -> None:
    assert decode(kind(encode("A", "1", b"b"))).body == b"b"


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        (b"", "empty"),
        (b"\0", "short"),
        (b"\0\0\0", "short"),
        (b"\0\0\0\4PING", "short"),
        (b"\0\0\0\4PING\0\0\0", "short"),
        (b"\xff\xff\xff\xff", "negative_length"),
        (b"\x80\0\0\0PING", "negative_length"),
        (b"\0\0\0\1A\xff\xff\xff\xff", "negative_length"),
        (b"\0\0\0\5PING", "length_past_end"),
        (b"\x7f\xff\xff\xffPING", "length_past_end"),
        (b"\0\0\0\1A\0\0\0\2b", "length_past_end"),
        (b"\0\0\0\1\xc3\0\0\0\0", "not_ascii"),
        (b"\0\0\0\1A\0\0\0\1\x80", "not_ascii"),
    ],
)
def test_what_is_no_envelope_has_a_reason(datagram: bytes, reason: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(datagram)
    assert caught.value.reason == reason
    assert pickle.loads(pickle.dumps(caught.value)).reason == reason


@pytest.mark.parametrize(("magic", "version"), [("é", "1"), ("A", "ü")])
def test_text_that_is_not_ascii_is_refused(magic: str, version: str) -> None:
    with pytest.raises(ValueError, match="ASCII"):
        encode(magic, version, b"")
    with pytest.raises(ValueError, match="ASCII"):
        Message(magic, version, b"")


def test_a_message_is_a_value() -> None:
    message = Message("A", "1", b'{"x": 1}', ("::1", 7))
    assert message.json() == {"x": 1}
    assert message == Message("A", "1", b'{"x": 1}', ("::1", 7))
    assert message != Message("A", "1", b'{"x": 1}')
    assert hash(message) == hash(pickle.loads(pickle.dumps(message)))
    assert repr(message) == """Message('A', '1', b'{"x": 1}', sender=('::1', 7))"""


def test_a_message_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Message("A", "1", b"").body = b"other"  # type: ignore[misc]


def test_only_the_codec_knows_the_envelope() -> None:
    sources = (Path(__file__).parents[2] / "ext" / "peerd").glob("*.p[yx][xd]")
    users = {path.stem for path in sources if "peerd.wire" in path.read_text()}
    assert users == {"_envelope"}
