"""The datagram format, read and written in place.

    offset      size  what
    0           4     m: length of the magic code in bytes, int32, big endian
    4           m     magic code, ASCII
    4 + m       4     v: length of the version in bytes, int32, big endian
    8 + m       v     version, ASCII
    8 + m + v   rest  body, to the end of the datagram; may be empty

This is the envelope of FaasNet's peer packages: WriteBufferContext.WriteString writes an int32 and
the ASCII bytes, WriteInteger is big endian (github.com/simpleidserver/FaasNet,
FaasNet.RaftConsensus.Client/Messages). The lengths are signed there, so a negative one is possible
on the wire and is refused here by its own reason.

parse_envelope never reads a byte at or past data + size, whatever the bytes are.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t
from libc.string cimport memcpy

# In the order of the decode_* counters: Codec.count_unread adds the reason to the first one.
cdef enum DecodeReason:
    DECODE_OK
    DECODE_EMPTY
    DECODE_SHORT
    DECODE_NEGATIVE_LENGTH
    DECODE_LENGTH_PAST_END
    DECODE_NOT_ASCII

cdef struct Envelope:
    const uint8_t *magic
    size_t magic_size
    const uint8_t *version
    size_t version_size
    const uint8_t *body
    size_t body_size


cdef inline int32_t read_int32(const uint8_t *at) noexcept nogil:
    return <int32_t>(
        (<uint32_t>at[0] << 24) | (<uint32_t>at[1] << 16) | (<uint32_t>at[2] << 8) | <uint32_t>at[3]
    )


cdef inline void write_int32(uint8_t *at, uint32_t value) noexcept nogil:
    at[0] = <uint8_t>(value >> 24)
    at[1] = <uint8_t>(value >> 16)
    at[2] = <uint8_t>(value >> 8)
    at[3] = <uint8_t>value


cdef inline DecodeReason parse_text(
    const uint8_t **at, const uint8_t *end, const uint8_t **text, size_t *text_size
) noexcept nogil:
    cdef int32_t size
    cdef uint8_t high = 0
    cdef size_t i
    if end - at[0] < 4:
        return DECODE_SHORT
    size = read_int32(at[0])
    if size < 0:
        return DECODE_NEGATIVE_LENGTH
    at[0] += 4
    if size > end - at[0]:
        return DECODE_LENGTH_PAST_END
    for i in range(<size_t>size):
        high |= at[0][i]
    if high & 0x80:
        return DECODE_NOT_ASCII
    text[0] = at[0]
    text_size[0] = <size_t>size
    at[0] += size
    return DECODE_OK


cdef inline DecodeReason parse_envelope(const uint8_t *data, size_t size, Envelope *out) noexcept nogil:
    cdef const uint8_t *at = data
    cdef const uint8_t *end = data + size
    cdef DecodeReason reason
    if size == 0:
        return DECODE_EMPTY
    reason = parse_text(&at, end, &out.magic, &out.magic_size)
    if reason != DECODE_OK:
        return reason
    reason = parse_text(&at, end, &out.version, &out.version_size)
    if reason != DECODE_OK:
        return reason
    out.body = at
    out.body_size = <size_t>(end - at)
    return DECODE_OK


cdef inline uint8_t *write_text(uint8_t *at, const char *text, size_t size) noexcept nogil:
    write_int32(at, <uint32_t>size)
    memcpy(at + 4, text, size)
    return at + 4 + size
