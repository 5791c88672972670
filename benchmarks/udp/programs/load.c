/* Sends one datagram to 127.0.0.1 repeatedly, at full speed or at a rate per second.
 *
 *     load -s SECONDS [-r RATE] [-g SEGMENTS] HEX PORT [PORT ...]
 *
 * HEX is the datagram. With one port, each send() carries SEGMENTS copies of it, which UDP_SEGMENT
 * (udp(7)) splits into datagrams. On loopback the receive path runs inside the sender's system call, so a
 * sender with one datagram per call is slower than every receiver and would measure only itself. With
 * more ports, each sendmmsg() carries one plain datagram per port. At a RATE, each datagram has its own
 * call, evenly spaced, like those of independent senders. It ends after SECONDS.
 *
 * Prints one line of JSON. started_ns is CLOCK_MONOTONIC, which all processes share.
 */

#include "client.h"

#define MAX_PORTS 64

static const char ARGUMENTS[] =
    "-s SECONDS [-r RATE] [-g SEGMENTS] HEX PORT [PORT ...]";

static uint64_t sent = 0, errors = 0;

static void send_joined(int fd, const unsigned char *datagram, size_t size, int segments)
{
    ssize_t taken = send(fd, datagram, size * segments, 0);
    if (taken < 0)
        errors++;
    else
        sent += (uint64_t)taken / size;
}

static void send_plain(int fd, struct mmsghdr *headers, int count)
{
    int done = 0;
    while (done < count) {
        int taken = sendmmsg(fd, headers + done, count - done, 0);
        if (taken < 0) {
            errors++;
            done++;
        } else {
            sent += taken;
            done += taken;
        }
    }
}

int main(int argc, char **argv)
{
    static unsigned char joined[MAX_BYTES];
    static struct sockaddr_in to[MAX_PORTS];
    static struct mmsghdr headers[MAX_PORTS];
    int ports = read_options(argc, argv, "s:r:g:", ARGUMENTS) - 1;
    double seconds = option_number('s', 0), rate = option_number('r', 0);
    int segments = (int)option_number('g', 1);
    if (ports < 1 || ports > MAX_PORTS || seconds <= 0 || rate < 0 || (ports > 1 && segments > 1))
        usage(ARGUMENTS);
    size_t size = parse_hex(argv[optind], joined, sizeof joined);
    if (size == 0 || segments < 1 || segments > MAX_SEGMENTS || size * segments > sizeof joined)
        usage(ARGUMENTS);
    die_with_parent();
    for (int i = 1; i < segments; i++)
        memcpy(joined + i * size, joined, size);

    struct iovec datagram = {joined, size};
    int fd;
    if (ports == 1) {
        fd = connected_socket(argv[optind + 1]);
        if (segments > 1)
            split_sends(fd, (int)size);
    } else {
        fd = udp_socket();
        for (int i = 0; i < ports; i++) {
            to[i] = loopback(argv[optind + 1 + i]);
            headers[i].msg_hdr.msg_name = &to[i];
            headers[i].msg_hdr.msg_namelen = sizeof to[i];
            headers[i].msg_hdr.msg_iov = &datagram;
            headers[i].msg_hdr.msg_iovlen = 1;
        }
    }

    int64_t started = monotonic_ns();
    int64_t now = started;
    int64_t end = started + (int64_t)(seconds * 1e9);
    double step_ns = rate > 0 ? segments / rate * 1e9 : 0;
    double due = (double)started;
    int next = 0;
    for (; now < end; now = monotonic_ns()) {
        if (now < due)
            continue;
        due += step_ns;
        if (ports == 1)
            send_joined(fd, joined, size, segments);
        else if (rate == 0)
            send_plain(fd, headers, ports);
        else {
            send_plain(fd, headers + next, 1);
            next = (next + 1) % ports;
        }
    }
    if (sent == 0)
        fail("no send worked; the last one");
    printf("{\"sent\": %llu, \"started_ns\": %lld, \"seconds\": %.6f, \"errors\": %llu, \"cpu_s\": %.6f}\n",
           (unsigned long long)sent, (long long)started, (now - started) / 1e9,
           (unsigned long long)errors, cpu_seconds());
    return 0;
}
