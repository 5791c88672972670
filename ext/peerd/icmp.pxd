"""ICMP errors about earlier datagrams, as the next system call reports them.

The kernel turns the type and code of the message into an errno (icmp_err_convert in net/ipv4/icmp.c,
icmpv6_err_convert in net/ipv6/icmp.c) and leaves it on the socket, where the next call finds it,
whatever it is about. Any host can send such a message: it must never end the loop, and never cost
the datagram at hand. Those that a call can also mean for itself are here as well, so whoever meets
one tries again a few times before it believes it.
"""

from libc.errno cimport (
    EACCES, ECONNREFUSED, EHOSTDOWN, EHOSTUNREACH, EMSGSIZE, ENETUNREACH, ENOPROTOOPT, EOPNOTSUPP, EPROTO,
)

cdef extern from "<errno.h>" nogil:
    int ENONET


cdef inline bint may_be_icmp(int error) noexcept nogil:
    return error in (
        ECONNREFUSED, EHOSTUNREACH, ENETUNREACH, EHOSTDOWN, ENONET, ENOPROTOOPT, EOPNOTSUPP, EPROTO,
        EACCES, EMSGSIZE,
    )
