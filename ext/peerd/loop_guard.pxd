"""Reply loops: which datagrams are dropped, and which replies are not sent.

Two peers that answer each other's answers do so for ever, and one datagram with a forged source starts it
(the class of CVE-2024-2169). Neither a restart nor a kill ends it, because the queue belongs to the socket.
The envelope does not say whether a datagram is a request, so the sender has to:

- A peer does not ask itself: a datagram from its own address and port is dropped.
- The socket of a peer is one-way. Requests come from other sockets, so a reply with the request's magic
  code (a bytes reply, or a Message with that code) is not sent to the socket of a peer of this supervisor.
  A Message with another code is: that is how peers answer each other on purpose.
- Peers of other supervisors cannot be recognised, but their sockets can: servers listen below port 32768,
  and kernels choose the ports of clients above (net.ipv4.ip_local_port_range). A source below has a token
  bucket of ``max_per_s``, from which a reply with the request's magic code takes SAME_MAGIC_COST tokens: a
  loop on one link runs at 1,000 to 40,000 rounds per second, and ends with the first reply that is dropped.
- ``limits_all``: each source has such a bucket, and every reply takes one token.

So a client that sends 200,000 requests per second loses no reply: it has a port of its own above 32767.
Rejected: the bucket for every source by default, because that client would lose nine replies of ten; a
comparison of each request with the reply before it, because it costs each message a hash and a look-up,
and an app that appends to the text is not recognised. Two peers above port 32767 whose supervisors do not
know each other are limited by ``limits_all`` only.

Peers of this supervisor have the ports from its first one on, one per slot, and the local addresses: the
bound one, or for a wildcard any address of this host. The local addresses are read again when one is not
found, at most once per ADDRESSES_INTERVAL_NS.

A normal message costs one comparison of its source port. Nothing here touches Python.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

cimport peerd.linux_udp as linux
from peerd._scoreboard cimport SlotData
from peerd.transmit cimport DROP_LOOP, DROP_RATE

cdef enum:
    FIRST_CLIENT_PORT = 32768
    SAME_MAGIC_COST = 20
    BUCKET_WAYS = 4
    BUCKET_SETS = 256
    MAX_LOCAL_ADDRESSES = 128
    ADDRESSES_INTERVAL_NS = 1000000000
    NANO = 1000000000

# An IPv4 address is v4-mapped; the zone of a link-local address is left out.
cdef struct Source:
    uint8_t address[16]
    uint16_t port
    uint8_t pad[6]

cdef struct Bucket:
    Source source
    int64_t used_ns  # 0: free
    int64_t tokens  # in units of 1 / NANO

cdef struct Guard:
    Source own
    int family
    bint is_wildcard
    uint16_t first_port
    const int64_t *slot_count
    const SlotData *slots
    uint64_t max_per_s  # 0: no limit
    bint limits_all
    uint16_t checked_ports  # sources below this port are looked at, beside those of peers
    Bucket *buckets
    uint8_t local[MAX_LOCAL_ADDRESSES][16]
    int local_count
    int64_t local_read_ns


cdef inline void guard_open(
    Guard *guard,
    int fd,
    const SlotData *slots,
    int slot,
    const int64_t *slot_count,
    uint64_t max_per_s,
    bint limits_all,
) noexcept nogil:
    cdef linux.sockaddr_in6 address
    cdef linux.socklen_t size = sizeof(address)
    memset(guard, 0, sizeof(Guard))
    memset(&address, 0, sizeof(address))
    linux.getsockname(fd, <linux.sockaddr *>&address, &size)
    read_source(&address, &guard.own)
    guard.family = (<linux.sockaddr *>&address).sa_family
    guard.is_wildcard = is_unspecified(guard.own.address)
    guard.first_port = guard.own.port - slot
    guard.slots = slots
    guard.slot_count = slot_count
    guard.max_per_s = max_per_s
    guard.limits_all = limits_all and max_per_s > 0
    if max_per_s:
        guard.checked_ports = FIRST_CLIENT_PORT


cdef inline void guard_close(Guard *guard) noexcept nogil:
    free(guard.buckets)


cdef inline uint16_t port_of(const void *address) noexcept nogil:
    # sin_port and sin6_port are at the same place.
    return linux.ntohs((<const linux.sockaddr_in6 *>address).sin6_port)


cdef inline bint is_from_self(Guard *guard, const void *address) noexcept nogil:
    """Whether a datagram from this socket address is this peer's own."""
    cdef Source source
    if port_of(address) != guard.own.port:
        return False
    read_source(address, &source)
    return is_local(guard, source.address)


cdef inline bint is_checked(Guard *guard, const void *to) noexcept nogil:
    """Whether replies to this socket address need a look at why_not_reply."""
    cdef uint16_t port = port_of(to)
    return (
        port < guard.checked_ports
        or <uint16_t>(port - guard.first_port) < guard.slot_count[0]
        or guard.limits_all
    )


cdef inline int why_not_reply(Guard *guard, const void *to, bint same_magic) noexcept nogil:
    """-1 when the reply may be sent; else DROP_LOOP or DROP_RATE."""
    cdef Source source
    cdef int cost = 1
    cdef uint16_t slot = port_of(to) - guard.first_port
    read_source(to, &source)
    # Only slots with a peer: another program may have taken the port of a removed peer.
    if (
        same_magic
        and slot < guard.slot_count[0]
        and guard.slots[slot].state != 0
        and is_local(guard, source.address)
    ):
        return DROP_LOOP
    if guard.limits_all or source.port < guard.checked_ports:
        if not guard.limits_all and same_magic:
            cost = SAME_MAGIC_COST
        if not takes(guard, &source, cost, linux.monotonic_ns()):
            return DROP_RATE
    return -1


cdef inline void read_source(const void *address, Source *source) noexcept nogil:
    cdef const linux.sockaddr_in *v4 = <const linux.sockaddr_in *>address
    cdef const linux.sockaddr_in6 *v6 = <const linux.sockaddr_in6 *>address
    memset(source, 0, sizeof(Source))
    if (<const linux.sockaddr *>address).sa_family == linux.AF_INET:
        source.address[10] = source.address[11] = 0xFF
        memcpy(&source.address[12], &v4.sin_addr, 4)
    else:
        memcpy(source.address, &v6.sin6_addr, 16)
    source.port = port_of(address)


cdef inline bint is_v4_mapped(const uint8_t *address) noexcept nogil:
    return linux.IN6_IS_ADDR_V4MAPPED(<const linux.in6_addr *>address)


cdef inline bint is_unspecified(const uint8_t *address) noexcept nogil:
    cdef uint8_t bits = 0
    cdef int i
    for i in range(12 if is_v4_mapped(address) else 0, 16):
        bits |= address[i]
    return bits == 0


cdef inline bint is_loopback(const uint8_t *address) noexcept nogil:
    cdef uint8_t bits = 0
    cdef int i
    if is_v4_mapped(address):
        return address[12] == 127
    for i in range(15):
        bits |= address[i]
    return bits == 0 and address[15] == 1


cdef inline bint is_local(Guard *guard, const uint8_t *address) noexcept nogil:
    """Whether a peer of this supervisor can send from the address."""
    cdef int64_t now_ns
    if not guard.is_wildcard:
        return memcmp(address, guard.own.address, 16) == 0
    if is_loopback(address) or is_listed(guard, address):
        return True
    now_ns = linux.monotonic_ns()
    if guard.local_read_ns and now_ns - guard.local_read_ns < ADDRESSES_INTERVAL_NS:
        return False
    guard.local_read_ns = now_ns
    read_local_addresses(guard)
    return is_listed(guard, address)


cdef inline bint is_listed(Guard *guard, const uint8_t *address) noexcept nogil:
    cdef int i
    for i in range(guard.local_count):
        if memcmp(guard.local[i], address, 16) == 0:
            return True
    return False


cdef inline void read_local_addresses(Guard *guard) noexcept nogil:
    cdef linux.ifaddrs *first = NULL
    cdef linux.ifaddrs *entry
    cdef Source source
    cdef int family
    guard.local_count = 0
    if linux.getifaddrs(&first) < 0:
        return
    entry = first
    while entry != NULL and guard.local_count < MAX_LOCAL_ADDRESSES:
        if entry.ifa_addr != NULL:
            family = entry.ifa_addr.sa_family
            if family == linux.AF_INET or family == linux.AF_INET6:
                read_source(entry.ifa_addr, &source)
                memcpy(guard.local[guard.local_count], source.address, 16)
                guard.local_count += 1
        entry = entry.ifa_next
    linux.freeifaddrs(first)


cdef inline uint32_t hash_of(const Source *source) noexcept nogil:
    cdef uint64_t halves[2]
    memcpy(halves, source.address, 16)
    return <uint32_t>(
        ((halves[0] ^ (halves[1] * 0x9E3779B97F4A7C15u) ^ source.port) * 0x9E3779B97F4A7C15u) >> 40
    )


cdef inline bint takes(Guard *guard, const Source *source, int cost, int64_t now_ns) noexcept nogil:
    """Take ``cost`` tokens from the source's bucket; False when it has not as many.

    A bucket holds what one second brings. A new source takes the bucket of its set that was used
    longest ago: a sender that forges sources can give others a full bucket, not an empty one.
    """
    cdef Bucket *bucket
    cdef Bucket *oldest
    cdef int64_t full = <int64_t>guard.max_per_s * NANO
    cdef int64_t passed_ns
    cdef int i
    if guard.buckets == NULL:
        guard.buckets = <Bucket *>calloc(BUCKET_SETS * BUCKET_WAYS, sizeof(Bucket))
        if guard.buckets == NULL:
            return True
    bucket = &guard.buckets[(hash_of(source) % BUCKET_SETS) * BUCKET_WAYS]
    oldest = bucket
    for i in range(BUCKET_WAYS):
        if bucket[i].used_ns and memcmp(&bucket[i].source, source, sizeof(Source)) == 0:
            oldest = &bucket[i]
            break
        if bucket[i].used_ns < oldest.used_ns:
            oldest = &bucket[i]
    else:
        oldest.source = source[0]
        oldest.tokens = full
        oldest.used_ns = now_ns
    passed_ns = min(now_ns - oldest.used_ns, <int64_t>NANO)
    oldest.tokens = min(full, oldest.tokens + passed_ns * <int64_t>guard.max_per_s)
    oldest.used_ns = now_ns
    if oldest.tokens < cost * <int64_t>NANO:
        return False
    oldest.tokens -= cost * <int64_t>NANO
    return True
