"""When to wait briefly before the next recvmmsg, so that the queue refills.

When traffic is spread thinly over many peers on few cores, each datagram costs its process a wake-up: 8
peers on one core took 4.8 us of CPU time per datagram (200,000 per second, interleaved), and 1.0 us when
each slept 400 us after a short batch. The senders were faster, too, because a datagram that arrives at a
sleeping process pays for waking it.

A client that sends one request and waits for its answer gains nothing and waits longer. So the loop tries
to linger and judges the result: a linger was useless if fewer than LINGER_WORTH datagrams were waiting
after it. Each useless one doubles the number of turns until the next try, up to LINGER_REST_TURNS; after a
useful one the next follows immediately. A client that waits for its answers is thus delayed once in
LINGER_REST_TURNS requests. An idle loop does not linger: if the gap before a batch was longer than the
linger, no further datagram is expected within it.

Times are in nanoseconds of CLOCK_MONOTONIC.
"""

from libc.stdint cimport int64_t

cdef enum:
    LINGER_WORTH = 2
    LINGER_REST_TURNS = 4096
    # A batch of this size is worth its wake-up without a linger.
    LINGER_ENOUGH = 64

cdef struct Linger:
    int64_t linger_ns
    int64_t last_turn_ns
    int rest  # turns until the next try
    int next_rest
    bint lingered  # before this turn


cdef inline void linger_open(Linger *linger, int64_t linger_ns) noexcept nogil:
    """The rest is 0."""
    linger.linger_ns = linger_ns
    linger.next_rest = 1


cdef inline int64_t linger_after(
    Linger *linger, unsigned int taken, bint more, int64_t begun_ns, int64_t now_ns
) noexcept nogil:
    """How long to sleep after a turn that took ``taken`` datagrams; 0 for no sleep.

    ``more``: the queue may hold more datagrams already.
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
        gap_ns = 0  # the gap was the linger itself
    if linger.rest > 0:
        linger.rest -= 1
        return 0
    if more or taken == 0 or taken >= LINGER_ENOUGH or gap_ns > linger.linger_ns:
        return 0
    linger.lingered = True
    return linger.linger_ns
