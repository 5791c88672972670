"""Invariant: whatever the bytes, parse_envelope reads none outside them, and what it finds adds up to all of them.

libFuzzer copies each input into a heap block of just its size, so ASan sees the first byte read too
many. What was parsed is written again with the writer, and must give the same bytes. And since the
loop takes a datagram that begins like the last one as parsed (Codec.read), the header
alone must parse to the same header.
"""

from libc.stdint cimport uint8_t
from libc.stdlib cimport abort, free, malloc
from libc.string cimport memcmp

from peerd.wire cimport DECODE_EMPTY, DECODE_OK, DecodeReason, Envelope, parse_envelope, write_text


cdef inline void check(bint holds) noexcept nogil:
    if not holds:
        abort()


cdef inline bint has_high_bit(const uint8_t *text, size_t size) noexcept nogil:
    cdef size_t i
    for i in range(size):
        if text[i] & 0x80:
            return True
    return False


cdef public int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) noexcept nogil:
    cdef Envelope envelope, again
    cdef size_t header_bytes
    cdef uint8_t *written
    cdef DecodeReason reason = parse_envelope(data, size, &envelope)
    check((reason == DECODE_EMPTY) == (size == 0))
    if reason != DECODE_OK:
        return 0
    header_bytes = 8 + envelope.magic_size + envelope.version_size
    check(envelope.magic == data + 4)
    check(envelope.version == data + 8 + envelope.magic_size)
    check(envelope.body == data + header_bytes)
    check(header_bytes + envelope.body_size == size)
    check(not has_high_bit(envelope.magic, envelope.magic_size))
    check(not has_high_bit(envelope.version, envelope.version_size))

    written = <uint8_t *>malloc(header_bytes)
    check(
        write_text(
            write_text(written, <const char *>envelope.magic, envelope.magic_size),
            <const char *>envelope.version,
            envelope.version_size,
        )
        == written + header_bytes
    )
    check(memcmp(written, data, header_bytes) == 0)

    check(parse_envelope(written, header_bytes, &again) == DECODE_OK)
    check(again.body_size == 0)
    check(again.magic_size == envelope.magic_size)
    check(again.version_size == envelope.version_size)
    free(written)
    return 0
