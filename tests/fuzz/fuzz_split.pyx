"""Invariant: whatever the control bytes, the split reads none outside them, and its datagrams cover the buffer exactly.

An input is: 1 byte, flags (bit 0 MSG_TRUNC, bit 1 MSG_CTRUNC); 2 bytes, msg_len, little endian; the
rest, msg_control. The control bytes are put into a heap block of just their size, so ASan sees the
first one read too many. The walk is that of DatagramLoop._hand_out_buffer, and must meet as many
datagrams as segments() has counted beforehand.
"""

from libc.stdint cimport uint8_t
from libc.stdlib cimport abort, free, malloc
from libc.string cimport memcpy, memset

cimport peerd.linux_udp as linux
from peerd.receive cimport is_cut_off, segments, stride_of

cdef enum:
    HEAD_BYTES = 3


cdef inline void check(bint holds) noexcept nogil:
    if not holds:
        abort()


cdef public int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) noexcept nogil:
    cdef linux.mmsghdr received
    cdef size_t control_bytes, counted, left, stride
    cdef size_t walked = 0
    cdef void *control
    if size < HEAD_BYTES:
        return -1  # not for the corpus
    control_bytes = size - HEAD_BYTES
    control = malloc(control_bytes)
    memcpy(control, data + HEAD_BYTES, control_bytes)
    memset(&received, 0, sizeof(received))
    received.msg_len = data[1] | (<unsigned int>data[2] << 8)
    received.msg_hdr.msg_control = control
    received.msg_hdr.msg_controllen = control_bytes
    if data[0] & 1:
        received.msg_hdr.msg_flags |= linux.MSG_TRUNC
    if data[0] & 2:
        received.msg_hdr.msg_flags |= linux.MSG_CTRUNC

    counted = segments(&received)
    if is_cut_off(&received):
        check(counted == 1)  # it is dropped as one
    else:
        stride = stride_of(&received)
        left = received.msg_len
        while True:
            check(stride > 0 or received.msg_len == 0)
            walked += 1
            if left <= stride:
                break
            left -= stride
        check(walked == counted)
    free(control)
    return 0
