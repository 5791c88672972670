"""What a worker is in the middle of, kept where the supervisor can read it when it was killed there.

A process that gets SIGKILL within recvmmsg or sendmmsg dies when the call is over: the kernel has done
its part, and nobody has counted it. But the kernel writes msg_len of each message when that one is done.
So the headers of these two calls live in the scoreboard, with msg_len set to what no message has, and
beside them the counters as they were before the call. After the worker's death, what is not UNTOUCHED
was received, or sent. While no call is under way, the counters are right by themselves.

A thread dies between two instructions, so what matters is the order in which the compiler stores.
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
    # Room for what the socket's owner may have switched on besides UDP_GRO: time stamps, marks.
    RX_CONTROL_BYTES = 256
    # Messages of one sendmmsg.
    TX_WINDOW = 64

cdef extern from *:
    """
    #define PEERD_UNTOUCHED 0xffffffffu
    """
    const uint32_t UNTOUCHED "PEERD_UNTOUCHED"

cdef struct Flight:
    uint64_t receiving  # how many headers the call has; 0 for no call
    uint64_t rx_datagrams_before
    uint64_t sending
    uint64_t handled_before
    linux.mmsghdr rx[RX_BATCH]
    uint8_t rx_control[RX_BATCH][RX_CONTROL_BYTES]
    linux.mmsghdr tx[TX_WINDOW]
    uint16_t tx_datagrams[TX_WINDOW]
