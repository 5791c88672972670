"""Socket addresses as Python sees them."""

from libc.stdint cimport uint16_t

cimport peerd.linux_udp as linux


cdef inline tuple address_of(linux.sockaddr *address):
    """(host, port), an IPv4-mapped address as IPv4; None for another family."""
    cdef char text[64]
    cdef linux.sockaddr_in *v4
    cdef linux.sockaddr_in6 *v6
    cdef const void *raw
    cdef int family = address.sa_family
    cdef uint16_t port
    if family == linux.AF_INET:
        v4 = <linux.sockaddr_in *>address
        raw = &v4.sin_addr
        port = v4.sin_port
    elif family == linux.AF_INET6:
        v6 = <linux.sockaddr_in6 *>address
        raw = &v6.sin6_addr
        port = v6.sin6_port
        if linux.IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr):
            family = linux.AF_INET
            raw = &v6.sin6_addr.s6_addr[12]
    else:
        return None
    if linux.inet_ntop(family, raw, text, sizeof(text)) == NULL:
        return None
    return ((<bytes>text).decode("ascii"), <int>linux.ntohs(port))
