"""The parts of the kernel's and libc's interfaces that the datagram loop uses."""

from libc.stdint cimport int64_t, uint16_t, uint32_t

cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t

    cdef struct iovec:
        void *iov_base
        size_t iov_len

    cdef struct sockaddr:
        unsigned short sa_family

    cdef struct sockaddr_storage:
        pass

    cdef struct msghdr:
        void *msg_name
        socklen_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags

    cdef struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len

    cdef struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type

    cmsghdr *CMSG_FIRSTHDR(msghdr *)
    cmsghdr *CMSG_NXTHDR(msghdr *, cmsghdr *)
    unsigned char *CMSG_DATA(cmsghdr *)
    size_t CMSG_LEN(size_t)
    size_t CMSG_SPACE(size_t)

    ssize_t recvmsg(int, msghdr *, int)
    int recvmmsg(int, mmsghdr *, unsigned int, int, void *)
    int sendmmsg(int, mmsghdr *, unsigned int, int)
    int getsockname(int, sockaddr *, socklen_t *)
    int setsockopt(int, int, int, const void *, socklen_t)

    int AF_INET
    int AF_INET6
    int SOL_SOCKET
    int SOL_UDP
    int IPPROTO_IP
    int IPPROTO_IPV6
    int MSG_ERRQUEUE
    int MSG_DONTWAIT
    int MSG_CTRUNC
    int MSG_TRUNC

cdef extern from "<netinet/udp.h>" nogil:
    int UDP_GRO
    int UDP_SEGMENT

cdef extern from "<linux/errqueue.h>" nogil:
    cdef struct sock_extended_err:
        uint32_t ee_errno
        unsigned char ee_origin

    int SO_EE_ORIGIN_ICMP
    int SO_EE_ORIGIN_ICMP6

cdef extern from "<netinet/in.h>" nogil:
    cdef struct in_addr:
        uint32_t s_addr

    cdef struct in6_addr:
        unsigned char s6_addr[16]

    cdef struct sockaddr_in:
        unsigned short sin_family
        uint16_t sin_port
        in_addr sin_addr

    cdef struct sockaddr_in6:
        unsigned short sin6_family
        uint16_t sin6_port
        in6_addr sin6_addr

    cdef struct in_pktinfo:
        int ipi_ifindex
        in_addr ipi_spec_dst
        in_addr ipi_addr

    cdef struct in6_pktinfo:
        in6_addr ipi6_addr
        unsigned int ipi6_ifindex

    int IP_PKTINFO
    int IPV6_PKTINFO
    int IPV6_RECVPKTINFO
    int IP_RECVERR
    int IPV6_RECVERR
    bint IN6_IS_ADDR_V4MAPPED(const in6_addr *)

cdef extern from "<arpa/inet.h>" nogil:
    const char *inet_ntop(int, const void *, char *, socklen_t)
    uint16_t ntohs(uint16_t)
    uint16_t htons(uint16_t)

cdef extern from "<ifaddrs.h>" nogil:
    cdef struct ifaddrs:
        ifaddrs *ifa_next
        sockaddr *ifa_addr

    int getifaddrs(ifaddrs **)
    void freeifaddrs(ifaddrs *)

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents

    int poll(pollfd *, unsigned long, int)
    int POLLERR
    int POLLIN
    int POLLOUT

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec

    int clock_gettime(int, timespec *)
    int clock_nanosleep(int, int, const timespec *, timespec *)
    int CLOCK_MONOTONIC

cdef extern from "<fcntl.h>" nogil:
    int O_CLOEXEC
    int O_NONBLOCK

cdef extern from "<unistd.h>" nogil:
    int pipe2(int *, int)
    int close(int)
    ssize_t read(int, void *, size_t)
    ssize_t write(int, const void *, size_t)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *, size_t, int, int, int, long)
    int munmap(void *, size_t)
    int PROT_READ
    int PROT_WRITE
    int MAP_NORESERVE
    int MAP_PRIVATE
    int MAP_SHARED
    int MAP_ANONYMOUS
    void *MAP_FAILED


cdef inline int64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef inline void *untouched_pages(size_t size) noexcept nogil:
    """Zeros, to which the kernel adds a page when it is first written; NULL without memory.

    calloc would not do: once a large block was freed, glibc takes such sizes from its heap instead of
    from the kernel (mallopt(3), M_MMAP_THRESHOLD), and writes zeros to all of them.
    """
    cdef void *pages = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    return NULL if pages == MAP_FAILED else pages


cdef inline void free_pages(void *pages, size_t size) noexcept nogil:
    if pages != NULL:
        munmap(pages, size)
