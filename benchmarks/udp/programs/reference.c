/* The reference receivers in C: the kernel's limit.
 *
 *     reference count-gro FD      recvmmsg with UDP_GRO; counts
 *     reference count FD          recvmmsg without; counts
 *     reference count-epoll FD .. one epoll, recvmmsg on each socket; counts
 *     reference echo FD           blocking recvfrom, sendto
 *     reference echo-gro FD       recvmmsg with UDP_GRO, sendmmsg with UDP_SEGMENT
 *
 * receivers.py describes the protocol: "ready", and a line of JSON at the end of stdin. All of them
 * receive the sender's address, because a peer needs it. None of them reads the datagrams.
 */

#include "client.h"

#include <fcntl.h>
#include <sys/epoll.h>

#define PLAIN_BATCH 64
#define GRO_BATCH 16
#define MAX_SOCKETS 64
#define CONTROL_BYTES 64
/* A cache line more than the maximum size of a datagram. With a power of two, the first bytes of all
 * buffers would compete for the same few cache sets (4 % of CPU time without GRO). */
#define BUFFER_STRIDE (BUFFER_BYTES + 64)

static volatile sig_atomic_t ended = 0;
static uint64_t messages = 0;

static struct mmsghdr headers[PLAIN_BATCH];
static struct iovec vectors[PLAIN_BATCH];
static struct sockaddr_in senders[PLAIN_BATCH];
static unsigned char buffers[PLAIN_BATCH][BUFFER_STRIDE];
static unsigned char control[PLAIN_BATCH][CONTROL_BYTES];

static void on_stdin(int number)
{
    (void)number;
    ended = 1;
}

/* SIGIO at the end of stdin interrupts a blocking call. If it arrives just before the call, the socket's
 * timeout ends the call. */
static void watch_stdin(void)
{
    struct sigaction action = {.sa_handler = on_stdin};
    sigaction(SIGIO, &action, NULL);
    if (fcntl(0, F_SETOWN, getpid()) < 0 || fcntl(0, F_SETFL, O_ASYNC | O_NONBLOCK) < 0)
        fail("fcntl O_ASYNC on stdin");
}

static void limit_waiting(int fd)
{
    struct timeval limit = {0, 200000};
    if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) < 0)
        fail("setsockopt SO_RCVTIMEO");
}

static void reset_headers(int from, int count, size_t controls)
{
    for (int i = from; i < from + count; i++) {
        vectors[i] = (struct iovec){buffers[i], BUFFER_BYTES};
        headers[i].msg_hdr = (struct msghdr){
            .msg_name = &senders[i],
            .msg_namelen = sizeof senders[i],
            .msg_iov = &vectors[i],
            .msg_iovlen = 1,
            .msg_control = controls ? control[i] : NULL,
            .msg_controllen = controls,
        };
    }
}

static void count_joined(struct mmsghdr *received, size_t stride)
{
    messages += stride ? (received->msg_len + stride - 1) / stride : 1;
}

/* Without controls no datagram is joined. */
static void count(int fd, int batch, size_t controls)
{
    reset_headers(0, batch, controls);
    while (!ended) {
        int filled = recvmmsg(fd, headers, batch, MSG_WAITFORONE, NULL);
        if (filled <= 0)
            continue;
        if (!controls)
            messages += filled;
        for (int i = 0; controls && i < filled; i++)
            count_joined(&headers[i], stride_of(&headers[i].msg_hdr, headers[i].msg_len));
        reset_headers(0, filled, controls);
    }
}

static void count_on_many(char **fds, int count)
{
    struct epoll_event events[MAX_SOCKETS];
    int poller = epoll_create1(EPOLL_CLOEXEC);
    if (poller < 0)
        fail("epoll_create1");
    for (int i = 0; i < count; i++) {
        struct epoll_event event = {.events = EPOLLIN, .data.fd = atoi(fds[i])};
        if (epoll_ctl(poller, EPOLL_CTL_ADD, event.data.fd, &event) < 0)
            fail("epoll_ctl");
    }
    reset_headers(0, PLAIN_BATCH, 0);
    while (!ended) {
        int ready = epoll_wait(poller, events, MAX_SOCKETS, 200);
        for (int i = 0; i < ready; i++) {
            int filled = recvmmsg(events[i].data.fd, headers, PLAIN_BATCH, MSG_DONTWAIT, NULL);
            if (filled > 0) {
                messages += filled;
                reset_headers(0, filled, 0);
            }
        }
    }
}

static void echo(int fd)
{
    struct sockaddr_in sender;
    while (!ended) {
        socklen_t length = sizeof sender;
        ssize_t size = recvfrom(fd, buffers[0], BUFFER_BYTES, 0, (struct sockaddr *)&sender, &length);
        if (size >= 0) {
            messages++;
            sendto(fd, buffers[0], (size_t)size, 0, (struct sockaddr *)&sender, length);
        }
    }
}

/* A received control message has the segment size, and so has one that is sent (an int for UDP_GRO, 16
 * bits for UDP_SEGMENT). */
static void split_as_received(struct mmsghdr *received, unsigned char *room)
{
    struct msghdr *header = &received->msg_hdr;
    size_t stride = stride_of(header, received->msg_len);
    count_joined(received, stride);
    header->msg_iov->iov_len = received->msg_len;
    header->msg_flags = 0;
    header->msg_control = NULL;
    header->msg_controllen = 0;
    if (stride < received->msg_len) {
        header->msg_control = room;
        header->msg_controllen = CMSG_SPACE(sizeof(uint16_t));
        struct cmsghdr *part = CMSG_FIRSTHDR(header);
        part->cmsg_level = SOL_UDP;
        part->cmsg_type = UDP_SEGMENT;
        part->cmsg_len = CMSG_LEN(sizeof(uint16_t));
        uint16_t segment_bytes = (uint16_t)stride;
        memcpy(CMSG_DATA(part), &segment_bytes, sizeof segment_bytes);
    }
}

static void echo_joined(int fd)
{
    join_receives(fd);
    while (!ended) {
        reset_headers(0, GRO_BATCH, CONTROL_BYTES);
        int filled = recvmmsg(fd, headers, GRO_BATCH, MSG_WAITFORONE, NULL);
        for (int i = 0; i < filled; i++)
            split_as_received(&headers[i], control[i]);
        for (int done = 0; done < filled;) {
            int taken = sendmmsg(fd, headers + done, filled - done, 0);
            done += taken > 0 ? taken : 1;
        }
    }
}

int main(int argc, char **argv)
{
    if (argc < 3 || argc - 2 > MAX_SOCKETS)
        usage("NAME FD [FD ...]");
    die_with_parent();
    watch_stdin();
    int fd = atoi(argv[2]);
    limit_waiting(fd);
    printf("ready %d\n", getpid());
    fflush(stdout);
    if (strcmp(argv[1], "count-gro") == 0) {
        join_receives(fd);
        count(fd, GRO_BATCH, CONTROL_BYTES);
    } else if (strcmp(argv[1], "count") == 0)
        count(fd, PLAIN_BATCH, 0);
    else if (strcmp(argv[1], "count-epoll") == 0)
        count_on_many(argv + 2, argc - 2);
    else if (strcmp(argv[1], "echo") == 0)
        echo(fd);
    else if (strcmp(argv[1], "echo-gro") == 0)
        echo_joined(fd);
    else
        usage("NAME FD [FD ...]");
    printf("{\"messages\": %llu}\n", (unsigned long long)messages);
    return 0;
}
