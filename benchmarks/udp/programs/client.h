/* Errors, clocks, arguments and sockets of the benchmark's C programs. */

#ifndef PEERD_BENCHMARK_CLIENT_H
#define PEERD_BENCHMARK_CLIENT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/udp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* A send may carry 64 datagrams before Linux 6.9 (UDP_MAX_SEGMENTS), and 65,507 bytes in any case. */
#define MAX_SEGMENTS 64
#define MAX_BYTES 65507
/* Joined datagrams need a buffer of the maximum size of a datagram. */
#define BUFFER_BYTES 65536

static inline void fail(const char *what)
{
    fprintf(stderr, "%s: %s: %s\n", program_invocation_short_name, what, strerror(errno));
    exit(1);
}

static inline void usage(const char *arguments)
{
    fprintf(stderr, "usage: %s %s\n", program_invocation_short_name, arguments);
    exit(2);
}

/* The text of each option, by letter; "" for one without. */
static const char *option_texts[128];

/* Returns the number of arguments behind the options. */
static inline int read_options(int argc, char **argv, const char *letters, const char *arguments)
{
    int option;
    while ((option = getopt(argc, argv, letters)) != -1) {
        if (option == '?')
            usage(arguments);
        option_texts[option] = optarg ? optarg : "";
    }
    return argc - optind;
}

static inline double option_number(char letter, double otherwise)
{
    return option_texts[(int)letter] ? atof(option_texts[(int)letter]) : otherwise;
}

static inline int64_t monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline double cpu_seconds(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return used.ru_utime.tv_sec + used.ru_stime.tv_sec
        + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

/* Die with a benchmark that is killed. */
static inline void die_with_parent(void)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
}

/* Returns the number of bytes; 0 if the text is not hexadecimal or too long. */
static inline size_t parse_hex(const char *text, unsigned char *out, size_t room)
{
    size_t size = strlen(text) / 2;
    unsigned int byte;
    if (size > room || strlen(text) % 2)
        return 0;
    for (size_t i = 0; i < size; i++) {
        if (sscanf(text + 2 * i, "%2x", &byte) != 1)
            return 0;
        out[i] = (unsigned char)byte;
    }
    return size;
}

static inline struct sockaddr_in loopback(const char *port)
{
    int number = atoi(port);
    if (number < 1 || number > 65535) {
        errno = EINVAL;
        fail(port);
    }
    return (struct sockaddr_in){
        .sin_family = AF_INET,
        .sin_port = htons((uint16_t)number),
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
}

static inline int udp_socket(void)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        fail("socket");
    return fd;
}

static inline int connected_socket(const char *port)
{
    struct sockaddr_in to = loopback(port);
    int fd = udp_socket();
    if (connect(fd, (struct sockaddr *)&to, sizeof to) < 0)
        fail("connect");
    return fd;
}

/* Splits each send on the socket into datagrams of this many bytes (UDP_SEGMENT, udp(7)). */
static inline void split_sends(int fd, int segment_bytes)
{
    if (setsockopt(fd, SOL_UDP, UDP_SEGMENT, &segment_bytes, sizeof segment_bytes) < 0)
        fail("setsockopt UDP_SEGMENT (Linux 4.18 or newer)");
}

static inline void join_receives(int fd)
{
    int on = 1;
    if (setsockopt(fd, SOL_UDP, UDP_GRO, &on, sizeof on) < 0)
        fail("setsockopt UDP_GRO (Linux 5.0 or newer)");
}

/* With CAP_NET_ADMIN it may exceed net.core.rmem_max (socket(7)). */
static inline void large_receive_buffer(int fd, int bytes)
{
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes) < 0)
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
}

/* The size of each datagram in a buffer, except the last. */
static inline size_t stride_of(struct msghdr *header, size_t received)
{
    for (struct cmsghdr *part = CMSG_FIRSTHDR(header); part; part = CMSG_NXTHDR(header, part))
        if (part->cmsg_level == SOL_UDP && part->cmsg_type == UDP_GRO) {
            int stride;
            memcpy(&stride, CMSG_DATA(part), sizeof stride);
            return (size_t)stride;
        }
    return received;
}

#endif
