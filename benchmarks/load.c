/* Sends one datagram to 127.0.0.1 again and again, as fast as it goes, for a time.
 *
 *     load PORT SECONDS SEGMENTS HEX
 *
 * HEX is the datagram. Each send() carries SEGMENTS copies of it, which UDP_SEGMENT (udp(7)) makes
 * into as many datagrams: on loopback the receive path runs inside the sender's system call, so a
 * sender of one datagram a call is slower than every receiver and would measure only itself.
 *
 * Prints one line of JSON. started_ns is CLOCK_MONOTONIC, which all processes share.
 */

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

/* One send may carry 64 datagrams before Linux 6.9 (UDP_MAX_SEGMENTS) and 65,507 bytes ever. */
#define MAX_SEGMENTS 64
#define MAX_BYTES 65507

static void fail(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static double cpu_seconds(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return used.ru_utime.tv_sec + used.ru_stime.tv_sec
        + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static size_t parse_hex(const char *text, unsigned char *out, size_t room)
{
    size_t size = strlen(text) / 2;
    unsigned int byte;
    if (size == 0 || size > room || strlen(text) % 2)
        return 0;
    for (size_t i = 0; i < size; i++) {
        if (sscanf(text + 2 * i, "%2x", &byte) != 1)
            return 0;
        out[i] = (unsigned char)byte;
    }
    return size;
}

static int connected_socket(int port, int segment_bytes)
{
    struct sockaddr_in to = {
        .sin_family = AF_INET,
        .sin_port = htons((uint16_t)port),
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        fail("socket");
    if (connect(fd, (struct sockaddr *)&to, sizeof to) < 0)
        fail("connect");
    if (setsockopt(fd, SOL_UDP, UDP_SEGMENT, &segment_bytes, sizeof segment_bytes) < 0)
        fail("setsockopt UDP_SEGMENT (Linux 4.18 or newer)");
    return fd;
}

int main(int argc, char **argv)
{
    static unsigned char joined[MAX_BYTES];
    uint64_t sent = 0, errors = 0;

    if (argc != 5) {
        fprintf(stderr, "usage: load PORT SECONDS SEGMENTS HEX\n");
        return 2;
    }
    int port = atoi(argv[1]);
    double seconds = atof(argv[2]);
    int segments = atoi(argv[3]);
    size_t size = parse_hex(argv[4], joined, sizeof joined);
    if (port < 1 || port > 65535 || seconds <= 0 || segments < 1 || segments > MAX_SEGMENTS
        || size == 0 || size * segments > sizeof joined) {
        fprintf(stderr, "load: an argument is out of range\n");
        return 2;
    }
    /* Not to outlive a benchmark that was killed. */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (int i = 1; i < segments; i++)
        memcpy(joined + i * size, joined, size);

    int fd = connected_socket(port, (int)size);
    int64_t started = monotonic_ns();
    int64_t now = started;
    int64_t end = started + (int64_t)(seconds * 1e9);
    for (; now < end; now = monotonic_ns()) {
        ssize_t taken = send(fd, joined, size * segments, 0);
        if (taken < 0)
            errors++;
        else
            sent += (uint64_t)taken / size;
    }
    if (sent == 0)
        fail("no send worked; the last one");
    printf("{\"sent\": %llu, \"started_ns\": %lld, \"seconds\": %.6f, \"errors\": %llu, \"cpu_s\": %.6f}\n",
           (unsigned long long)sent, (long long)started, (now - started) / 1e9,
           (unsigned long long)errors, cpu_seconds());
    return 0;
}
