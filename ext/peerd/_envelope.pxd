"""Declarations of _envelope.pyx for the dispatcher."""

cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint64_t

cimport peerd.linux_udp as linux
from peerd.destination cimport Destination
from peerd.outbox cimport Outbox
from peerd.wire cimport DecodeReason, Envelope

cdef enum:
    HEADER_CACHE_BYTES = 64


@cython.final
cdef class Message:
    cdef readonly str magic
    cdef readonly str version
    cdef readonly bytes body
    cdef tuple _sender
    cdef linux.socklen_t _address_bytes  # 0: not from the network
    cdef Destination _destination
    cdef uint16_t _local_port  # network byte order; 0: not from the network


@cython.final
cdef class Codec:
    # Of the message that was read last.
    cdef object route
    cdef size_t header_bytes

    cdef uint16_t local_port  # of the socket, in network byte order
    cdef uint64_t *_counters
    cdef dict _routes
    cdef dict _versions
    cdef str _magic
    cdef str _version
    cdef uint8_t _cached[HEADER_CACHE_BYTES]
    cdef size_t _cached_bytes  # 0 when no header is cached
    cdef DecodeReason _reason

    cdef Message read(self, const uint8_t *data, size_t size, const Destination *destination,
                      linux.socklen_t address_bytes)
    cdef void count_unread(self) noexcept
    cdef int reply(self, Outbox *outbox, Message request, object result, const uint8_t *header,
                   size_t header_bytes) except -1
    cdef int reply_later(self, Outbox *outbox, Message request, object result) except -1
    cdef bint _parse(self, const uint8_t *data, size_t size) except -1
    cdef str _version_of(self, Envelope *envelope)
