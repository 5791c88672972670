"""The system call that a worker is in, kept where the supervisor can read it after a SIGKILL.

A process that gets SIGKILL within recvmmsg or sendmmsg dies when the call is over: the kernel has done
its part, and the datagrams are not counted. But the kernel writes msg_len of each message when that
message is done. So the headers of these two calls live in the scoreboard, with msg_len set to a value that
no message has (UNTOUCHED), beside the counters as they were before the call. After the worker's death,
each message whose msg_len has changed was received or sent. Outside these calls the counters are exact.

A thread dies between two instructions, so only the order of the compiler's stores matters.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cimport peerd.linux_udp as linux

cdef extern from *:
    """
    #define PEERD_STORE_BARRIER() __asm__ volatile("" ::: "memory")
    """
    void store_barrier "PEERD_STORE_BARRIER"() noexcept nogil

cdef enum:
    # recvmmsg is flat above 16 on Linux 6.18 (2.15 against 2.28 million datagrams/s at 256).
    RX_BATCH = 16
    # Room for control messages that the socket's owner may have enabled besides UDP_GRO.
    RX_CONTROL_BYTES = 256
    # Messages of one sendmmsg.
    TX_WINDOW = 64

cdef extern from *:
    """
    #define PEERD_UNTOUCHED 0xffffffffu
    """
    const uint32_t UNTOUCHED "PEERD_UNTOUCHED"

cdef struct Flight:
    uint64_t receiving  # number of headers of the call; 0 outside a call
    uint64_t rx_datagrams_before
    uint64_t sending
    uint64_t handled_before
    linux.mmsghdr rx[RX_BATCH]
    uint8_t rx_control[RX_BATCH][RX_CONTROL_BYTES]
    linux.mmsghdr tx[TX_WINDOW]
    uint16_t tx_datagrams[TX_WINDOW]
