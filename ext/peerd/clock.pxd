"""CLOCK_MONOTONIC in nanoseconds."""

from libc.stdint cimport int64_t

cimport peerd.linux_udp as linux


cdef inline int64_t monotonic_ns() noexcept nogil:
    cdef linux.timespec now
    linux.clock_gettime(linux.CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec
