"""For any bytes: a Message or a DecodeError, and the same as the reference decoder's."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from harness import reference_wire
from peerd import DecodeError, decode, encode

ascii_text = st.text(st.characters(max_codepoint=127), max_size=40)
lengths = st.one_of(
    st.integers(-(2**31), 2**31 - 1), st.integers(-3, 12), st.sampled_from([0, 2**31 - 1, -(2**31)])
)
near_envelopes = st.builds(
    lambda magic_size, magic, version_size, rest: (
        struct.pack(">i", magic_size) + magic + struct.pack(">i", version_size) + rest
    ),
    lengths,
    st.binary(max_size=8),
    lengths,
    st.binary(max_size=16),
)


@given(ascii_text, ascii_text, st.binary(max_size=200))
def test_round_trip(magic: str, version: str, body: bytes) -> None:
    message = decode(encode(magic, version, body))
    assert (message.magic, message.version, message.body) == (magic, version, body)


@given(st.one_of(st.binary(max_size=64), near_envelopes))
def test_the_compiled_decoder_agrees_with_the_reference(datagram: bytes) -> None:
    try:
        expected: object = reference_wire.decode(datagram)
    except reference_wire.RefusedError as refused:
        expected = refused.reason
    try:
        message = decode(datagram)
        got: object = (message.magic, message.version, message.body)
    except DecodeError as error:
        got = error.reason
    assert got == expected
