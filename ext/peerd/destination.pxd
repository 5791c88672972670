"""Where a reply goes, and the local address it leaves from.

A socket that is bound to a wildcard is asked at any address of its host, and a reply that left from another
one would not reach a connected client. So the kernel reports the address with each datagram (IP_PKTINFO,
IPV6_PKTINFO), and the reply names it. It names the interface only where the address does not determine the
way: link-local addresses and what came by multicast. A reply to a multicast or broadcast datagram leaves
from the address that the kernel gives for it.

A socket bound to one address has none of this: the options cost 40 to 50 ns per datagram.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

cimport peerd.linux_udp as linux

cdef enum:
    # CMSG_SPACE(sizeof(in6_pktinfo)), which C does not call a constant.
    LOCAL_CONTROL_BYTES = 40

cdef struct Destination:
    linux.sockaddr_in6 address  # large enough for an IPv4 one; zeros behind it
    linux.in6_pktinfo local  # IPv4 as v4-mapped; zeros: the kernel chooses


cdef inline void report_local_addresses(int fd, int on) noexcept nogil:
    """Or not: the socket may have had another loop before. Each option fails on the other family."""
    linux.setsockopt(fd, linux.IPPROTO_IP, linux.IP_PKTINFO, &on, sizeof(on))
    linux.setsockopt(fd, linux.IPPROTO_IPV6, linux.IPV6_RECVPKTINFO, &on, sizeof(on))


cdef inline bint has_local(const Destination *destination) noexcept nogil:
    cdef linux.in6_pktinfo none
    memset(&none, 0, sizeof(none))
    return memcmp(&destination.local, &none, sizeof(none)) != 0


cdef inline bint needs_interface_v4(const uint8_t *address) noexcept nogil:
    return address[0] & 0xF0 == 0xE0 or (address[0] == 169 and address[1] == 254)


cdef inline void local_of_v4(const linux.in_pktinfo *reported, linux.in6_pktinfo *local) noexcept nogil:
    memset(local, 0, sizeof(linux.in6_pktinfo))
    local.ipi6_addr.s6_addr[10] = local.ipi6_addr.s6_addr[11] = 0xFF
    memcpy(&local.ipi6_addr.s6_addr[12], &reported.ipi_spec_dst, 4)
    if needs_interface_v4(<const uint8_t *>&reported.ipi_addr):
        local.ipi6_ifindex = reported.ipi_ifindex


cdef inline void local_of_v6(const linux.in6_pktinfo *reported, linux.in6_pktinfo *local) noexcept nogil:
    cdef const uint8_t *address = <const uint8_t *>&reported.ipi6_addr
    memset(local, 0, sizeof(linux.in6_pktinfo))
    if address[0] != 0xFF:
        local.ipi6_addr = reported.ipi6_addr
    if address[0] == 0xFF or (address[0] == 0xFE and address[1] & 0xC0 == 0x80):
        local.ipi6_ifindex = reported.ipi6_ifindex


cdef inline void read_local(linux.msghdr *header, linux.in6_pktinfo *local) noexcept nogil:
    """The address that a datagram was sent to; zeros when the kernel did not report it.

    An IPv4 datagram on an IPv6 socket has both messages, and the one of IPv4 knows more.
    """
    cdef linux.cmsghdr *part = linux.CMSG_FIRSTHDR(header)
    cdef linux.in_pktinfo v4
    cdef linux.in6_pktinfo v6
    memset(local, 0, sizeof(linux.in6_pktinfo))
    while part != NULL:
        if (
            part.cmsg_level == linux.IPPROTO_IP
            and part.cmsg_type == linux.IP_PKTINFO
            and part.cmsg_len >= linux.CMSG_LEN(sizeof(v4))
        ):
            memcpy(&v4, linux.CMSG_DATA(part), sizeof(v4))
            local_of_v4(&v4, local)
            return
        if (
            part.cmsg_level == linux.IPPROTO_IPV6
            and part.cmsg_type == linux.IPV6_PKTINFO
            and part.cmsg_len >= linux.CMSG_LEN(sizeof(v6))
        ):
            memcpy(&v6, linux.CMSG_DATA(part), sizeof(v6))
            local_of_v6(&v6, local)
        part = linux.CMSG_NXTHDR(header, part)


cdef inline size_t write_local(int family, const linux.in6_pktinfo *local, void *control) noexcept nogil:
    """Write the control message for a socket of this family; its size."""
    cdef linux.cmsghdr *part = <linux.cmsghdr *>control
    cdef linux.in_pktinfo v4
    if family == linux.AF_INET:
        memset(&v4, 0, sizeof(v4))
        v4.ipi_ifindex = local.ipi6_ifindex
        memcpy(&v4.ipi_spec_dst, &local.ipi6_addr.s6_addr[12], 4)
        part.cmsg_level = linux.IPPROTO_IP
        part.cmsg_type = linux.IP_PKTINFO
        part.cmsg_len = linux.CMSG_LEN(sizeof(v4))
        memcpy(linux.CMSG_DATA(part), &v4, sizeof(v4))
        return linux.CMSG_SPACE(sizeof(v4))
    part.cmsg_level = linux.IPPROTO_IPV6
    part.cmsg_type = linux.IPV6_PKTINFO
    part.cmsg_len = linux.CMSG_LEN(sizeof(linux.in6_pktinfo))
    memcpy(linux.CMSG_DATA(part), local, sizeof(linux.in6_pktinfo))
    return linux.CMSG_SPACE(sizeof(linux.in6_pktinfo))
