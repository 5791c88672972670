"""Message and codec: the only part of the datagram path that knows the envelope (wire.pxd).

Codec reads a datagram into a Message with the route of its magic code, and writes replies into the
outbox. Nearly all messages of a peer begin with the same bytes, and whether they parse depends on
those bytes alone; so the codec caches the last header, and a datagram that begins with it is neither
parsed nor routed again. That is a tenth cheaper per message.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeASCII
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp, memcpy

cimport peerd.linux_udp as linux
from peerd._scoreboard cimport DECODE_EMPTY_COUNT, UNKNOWN_MAGIC
from peerd.outbox cimport Outbox, room
from peerd.destination cimport Destination, has_local
from peerd.loop_guard cimport is_checked, why_not_reply
from peerd.sockaddr cimport address_of
from peerd.transmit cimport DropReason, count_drops
from peerd.wire cimport DECODE_EMPTY, DECODE_OK, DecodeReason, Envelope, parse_envelope, write_text

from typing import Union

from peerd.errors import DecodeError

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object, Py_ssize_t *) except NULL

cdef enum:
    MAX_CACHED_VERSIONS = 64

DECODE_REASONS = ("ok", "empty", "short", "negative_length", "length_past_end", "not_ascii")
cdef dict _DECODE_TEXTS = {
    "empty": "the datagram has no bytes",
    "short": "the datagram ends inside a length field",
    "negative_length": "a length field is negative",
    "length_past_end": "a length field points past the end of the datagram",
    "not_ascii": "the magic code or the version is not ASCII",
}

cdef object _loads = None


@cython.final
@cython.no_gc
@cython.freelist(1024)
cdef class Message:
    """One message: what a handler receives, and, returned by it, a reply with its own magic code.

    ``magic``, the magic code, selects the handler; ``version`` is the sender's version of the protocol
    and may be empty; both are ASCII, or ValueError is raised. ``body`` is everything behind the version,
    a copy that may be kept. Two messages are equal when these three and ``sender`` are.
    """

    def __init__(self, str magic not None, str version not None, bytes body not None, sender=None):
        if not (magic.isascii() and version.isascii()):
            raise ValueError(f"magic code and version must be ASCII, not {magic!r} and {version!r}")
        self.magic = magic
        self.version = version
        self.body = body
        self._sender = checked_sender(sender)

    @property
    def sender(self):
        """The (address, port) that the datagram came from, IPv4 also in an IPv6 socket.

        Built at the first access. None for a message made by hand.
        """
        if self._sender is None and self._address_bytes:
            self._sender = address_of(<linux.sockaddr *>&self._destination.address)
        return self._sender

    @property
    def local(self):
        """(address, port) of this host that the datagram was sent to.

        None for a message made by hand, and for a datagram that came by IPv6 multicast.
        """
        cdef linux.sockaddr_in6 address
        if self._local_port == 0 or not has_local(&self._destination):
            return None
        address.sin6_family = linux.AF_INET6
        address.sin6_port = self._local_port
        address.sin6_addr = self._destination.local.ipi6_addr
        return address_of(<linux.sockaddr *>&address)

    def json(self):
        """The body as JSON (orjson). Raises orjson.JSONDecodeError, a ValueError."""
        global _loads
        if _loads is None:
            import orjson  # with what it imports itself, this takes 4 ms

            _loads = orjson.loads
        return _loads(self.body)

    def __eq__(self, other):
        cdef Message that
        if not isinstance(other, Message):
            return NotImplemented
        that = other
        return (
            self.magic == that.magic
            and self.version == that.version
            and self.body == that.body
            and self.sender == that.sender
        )

    def __hash__(self):
        return hash((self.magic, self.version, self.body, self.sender))

    def __repr__(self):
        body = repr(self.body) if len(self.body) <= 64 else f"<{len(self.body)} bytes>"
        return f"Message({self.magic!r}, {self.version!r}, {body}, sender={self.sender!r})"

    def __reduce__(self):
        return Message, (self.magic, self.version, self.body, self.sender)


Reply = Union[bytes, Message, None]


def encode(str magic not None, str version not None, bytes body not None=b""):
    """The datagram of a message. Raises ValueError when magic or version is not ASCII.

    The size is not checked: a UDP datagram holds at most 65,507 bytes on IPv4.
    """
    cdef Py_ssize_t magic_size, version_size
    cdef const char *magic_text = ascii_text(magic, &magic_size)
    cdef const char *version_text = ascii_text(version, &version_size)
    cdef Py_ssize_t body_size = PyBytes_GET_SIZE(body)
    cdef Py_ssize_t total = 8 + magic_size + version_size + body_size
    cdef bytes datagram = PyBytes_FromStringAndSize(NULL, total)
    cdef uint8_t *at = <uint8_t *>PyBytes_AS_STRING(datagram)
    at = write_text(at, magic_text, magic_size)
    at = write_text(at, version_text, version_size)
    memcpy(at, PyBytes_AS_STRING(body), body_size)
    return datagram


def decode(datagram, sender=None):
    """The message in a datagram. Raises peerd.DecodeError, and nothing else, whatever the bytes are."""
    cdef Py_buffer view
    cdef Envelope envelope
    cdef DecodeReason reason
    cdef Message message
    cdef tuple address = checked_sender(sender)
    PyObject_GetBuffer(datagram, &view, PyBUF_SIMPLE)
    try:
        reason = parse_envelope(<const uint8_t *>view.buf, view.len, &envelope)
        if reason != DECODE_OK:
            name = DECODE_REASONS[<int>reason]
            raise DecodeError(name, f"not an envelope: {_DECODE_TEXTS[name]} ({view.len} bytes)")
        message = Message.__new__(Message)
        message.magic = PyUnicode_DecodeASCII(<const char *>envelope.magic, envelope.magic_size, NULL)
        message.version = PyUnicode_DecodeASCII(<const char *>envelope.version, envelope.version_size, NULL)
        message.body = PyBytes_FromStringAndSize(<const char *>envelope.body, envelope.body_size)
        message._sender = address
        return message
    finally:
        PyBuffer_Release(&view)


@cython.final
cdef class Codec:
    """Reads envelopes for the routes of a table, magic code (str) to route, and writes replies."""

    def __init__(self, routes):
        self._routes = {magic.encode("ascii"): (magic, route) for magic, route in routes.items()}
        self._versions = {}

    cdef Message read(self, const uint8_t *data, size_t size, const Destination *destination,
                      linux.socklen_t address_bytes):
        """The message in a datagram, or None when no route takes it: see count_unread.

        ``route`` and ``header_bytes`` are those of this message.
        """
        cdef Message message
        cdef size_t cached_bytes = self._cached_bytes
        if cached_bytes == 0 or size < cached_bytes or memcmp(data, self._cached, cached_bytes) != 0:
            if not self._parse(data, size):
                return None
        message = Message.__new__(Message)
        message.magic = self._magic
        message.version = self._version
        message.body = PyBytes_FromStringAndSize(
            <const char *>data + self.header_bytes, size - self.header_bytes
        )
        message._address_bytes = address_bytes
        message._destination = destination[0]
        message._local_port = self.local_port
        return message

    cdef void count_unread(self) noexcept:
        """Count why the last datagram gave no message: not an envelope, or an unknown magic code."""
        if self._reason == DECODE_OK:
            self._counters[UNKNOWN_MAGIC] += 1
        else:
            self._counters[DECODE_EMPTY_COUNT + <int>self._reason - DECODE_EMPTY] += 1

    cdef int reply(
        self, Outbox *outbox, Message request, object result, const uint8_t *header, size_t header_bytes
    ) except -1:
        """Queue what a handler returned. ``header``: the request's, for a reply that repeats it."""
        cdef Message reply
        cdef const char *magic
        cdef const char *version
        cdef Py_ssize_t magic_size, version_size
        cdef bytes body
        cdef size_t body_bytes
        cdef uint8_t *at
        if type(result) is bytes:
            body = <bytes>result
            body_bytes = PyBytes_GET_SIZE(body)
            if not may_reply(outbox, request, request.magic):
                return 0
            at = room(outbox, header_bytes + body_bytes, &request._destination, request._address_bytes)
            if at != NULL:
                memcpy(at, header, header_bytes)
                memcpy(at + header_bytes, PyBytes_AS_STRING(body), body_bytes)
        elif type(result) is Message:
            reply = <Message>result
            magic = ascii_text(reply.magic, &magic_size)
            version = ascii_text(reply.version, &version_size)
            body_bytes = PyBytes_GET_SIZE(reply.body)
            if not may_reply(outbox, request, reply.magic):
                return 0
            at = room(
                outbox,
                8 + magic_size + version_size + body_bytes,
                &request._destination,
                request._address_bytes,
            )
            if at != NULL:
                at = write_text(at, magic, magic_size)
                at = write_text(at, version, version_size)
                memcpy(at, PyBytes_AS_STRING(reply.body), body_bytes)
        elif result is not None:
            raise TypeError(
                f"the handler of {request.magic!r} returned {type(result).__name__}; "
                "it must return bytes, a Message or None"
            )
        return 0

    cdef int reply_later(self, Outbox *outbox, Message request, object result) except -1:
        """As reply(), when the request's datagram is no longer in the receive buffer."""
        cdef bytes header = encode(request.magic, request.version)
        return self.reply(
            outbox,
            request,
            result,
            <const uint8_t *>PyBytes_AS_STRING(header),
            PyBytes_GET_SIZE(header),
        )

    cdef bint _parse(self, const uint8_t *data, size_t size) except -1:
        """Parse and route a header that is not the cached one; False when no route takes it."""
        cdef Envelope envelope
        self._reason = parse_envelope(data, size, &envelope)
        if self._reason != DECODE_OK:
            return False
        found = self._routes.get(
            PyBytes_FromStringAndSize(<const char *>envelope.magic, envelope.magic_size)
        )
        if found is None:
            return False
        self._cached_bytes = 0
        self._magic, self.route = <tuple>found
        self._version = self._version_of(&envelope)
        self.header_bytes = envelope.body - data
        if self.header_bytes <= HEADER_CACHE_BYTES:
            memcpy(self._cached, data, self.header_bytes)
            self._cached_bytes = self.header_bytes
        return True

    cdef str _version_of(self, Envelope *envelope):
        """The version's text, shared by all messages that have it."""
        key = PyBytes_FromStringAndSize(<const char *>envelope.version, envelope.version_size)
        version = self._versions.get(key)
        if version is None:
            version = key.decode("ascii")
            # Senders choose versions: what is kept of them is bounded, in number and in size.
            if len(key) <= HEADER_CACHE_BYTES and len(self._versions) < MAX_CACHED_VERSIONS:
                self._versions[key] = version
        return version


cdef bint may_reply(Outbox *outbox, Message request, str magic) noexcept:
    """False when the reply could begin a loop (loop_guard.pxd); it is counted then."""
    cdef int reason
    if not is_checked(&outbox.guard, &request._destination.address):
        return True
    reason = why_not_reply(&outbox.guard, &request._destination.address, magic == request.magic)
    if reason < 0:
        return True
    count_drops(&outbox.tx, <DropReason>reason, 1, 0, &request._destination)
    return False


cdef const char *ascii_text(str text, Py_ssize_t *size) except NULL:
    if not text.isascii():
        raise ValueError(f"magic code and version must be ASCII, not {text!r}")
    return PyUnicode_AsUTF8AndSize(text, size)


cdef tuple checked_sender(object sender):
    if sender is None:
        return None
    host, port = sender
    if not isinstance(host, str) or not isinstance(port, int):
        raise TypeError(f"a sender is (host, port), not {sender!r}")
    return (host, port)
