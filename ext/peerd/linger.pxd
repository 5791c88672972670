"""When to wait a little before the next recvmmsg, so that the queue refills.

One process a peer costs a wake-up for each datagram when traffic is spread thin over many peers on
few cores: 8 peers on one core took 4.8 us of CPU time a datagram (200,000 a second, interleaved), and
1.0 us when each slept 400 us after a short batch; the senders were faster for it, too, since each
datagram that finds a sleeper pays for waking it.

But who sends one request and waits for its answer gains nothing and waits longer. So it is tried, and
judged by what came of it: a sleep after which fewer than LINGER_WORTH datagrams were waiting was in
vain, and each one in vain doubles the number of turns until the next try, up to LINGER_REST_TURNS. One
that was worth it brings the next at once. A client that waits for its answers is thus delayed once in
LINGER_REST_TURNS requests. Nobody lingers when idle: where the gap before a batch was longer than the
linger, no more is to be expected within it.

Times are in nanoseconds of CLOCK_MONOTONIC.
"""

from libc.stdint cimport int64_t

cdef enum:
    LINGER_WORTH = 2
    LINGER_REST_TURNS = 4096
    # A batch that is this large pays for its wake-up without any linger.
    LINGER_ENOUGH = 64

cdef struct Linger:
    int64_t linger_ns
    int64_t last_turn_ns
    int rest  # turns until the next try
    int next_rest
    bint lingered  # before this turn


cdef inline void linger_open(Linger *linger, int64_t linger_ns) noexcept nogil:
    linger.linger_ns = linger_ns
    linger.last_turn_ns = 0
    linger.rest = 0
    linger.next_rest = 1
    linger.lingered = False


cdef inline int64_t linger_after(
    Linger *linger, unsigned int taken, bint more, int64_t begun_ns, int64_t now_ns
) noexcept nogil:
    """How long to sleep after a turn that took ``taken`` datagrams; 0 for not at all.

    ``more``: the queue may hold more, so there is nothing to wait for.
    """
    cdef int64_t gap_ns = begun_ns - linger.last_turn_ns
    if linger.linger_ns == 0:
        return 0
    linger.last_turn_ns = now_ns
    if linger.lingered:
        linger.lingered = False
        if taken >= LINGER_WORTH:
            linger.next_rest = 1
            linger.rest = 0
        else:
            linger.rest = linger.next_rest
            linger.next_rest = min(2 * linger.next_rest, LINGER_REST_TURNS)
        gap_ns = 0  # what the linger made of it says nothing
    if linger.rest > 0:
        linger.rest -= 1
        return 0
    if more or taken == 0 or taken >= LINGER_ENOUGH or gap_ns > linger.linger_ns:
        return 0
    linger.lingered = True
    return linger.linger_ns
