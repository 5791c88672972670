/* Keeps an echo server on 127.0.0.1 busy and counts its replies.
 *
 *     echo_load -s SECONDS [-g SEGMENTS] [-w WINDOW] HEX PORT
 *
 * HEX is the datagram, which must come back unchanged. Each send carries SEGMENTS requests (UDP_SEGMENT)
 * while fewer than WINDOW are under way, and replies are received joined (UDP_GRO). So the server always
 * has work waiting, and no request is lost because it was sent too fast. Requests without a reply within
 * STALL_NS count as lost.
 *
 * Prints one line of JSON.
 */

#include "client.h"

#define BATCH 16
#define STALL_NS 500000000

static const char ARGUMENTS[] = "-s SECONDS [-g SEGMENTS] [-w WINDOW] HEX PORT";

static unsigned char joined[MAX_BYTES];
static unsigned char buffers[BATCH][BUFFER_BYTES];
static unsigned char control[BATCH][64];
static uint64_t errors = 0;

static uint64_t take_replies(int fd, size_t size)
{
    static struct mmsghdr headers[BATCH];
    static struct iovec vectors[BATCH];
    uint64_t replies = 0;
    for (int i = 0; i < BATCH; i++) {
        vectors[i] = (struct iovec){buffers[i], BUFFER_BYTES};
        headers[i].msg_hdr.msg_iov = &vectors[i];
        headers[i].msg_hdr.msg_iovlen = 1;
        headers[i].msg_hdr.msg_control = control[i];
        headers[i].msg_hdr.msg_controllen = sizeof control[i];
        headers[i].msg_hdr.msg_flags = 0;
    }
    int filled = recvmmsg(fd, headers, BATCH, MSG_DONTWAIT, NULL);
    for (int i = 0; i < filled; i++) {
        size_t received = headers[i].msg_len;
        size_t stride = stride_of(&headers[i].msg_hdr, received);
        if (stride != size || received % size || received > sizeof joined
            || memcmp(buffers[i], joined, received) != 0)
            errors++;
        replies += received / size;
    }
    if (filled < 0 && errno != EAGAIN && errno != EINTR)
        errors++;
    return replies;
}

int main(int argc, char **argv)
{
    uint64_t sent = 0, answered = 0, lost = 0;
    int count = read_options(argc, argv, "s:g:w:", ARGUMENTS);
    double seconds = option_number('s', 0);
    int segments = (int)option_number('g', MAX_SEGMENTS);
    uint64_t window = (uint64_t)option_number('w', 4096);
    if (count != 2 || seconds <= 0 || segments < 1 || segments > MAX_SEGMENTS
        || window < (uint64_t)segments)
        usage(ARGUMENTS);
    size_t size = parse_hex(argv[optind], joined, sizeof joined);
    if (size == 0 || size * segments > sizeof joined)
        usage(ARGUMENTS);
    die_with_parent();
    /* Longer than one send, because joined replies are compared with it. */
    for (size_t at = size; at + size <= sizeof joined; at += size)
        memcpy(joined + at, joined, size);
    int fd = connected_socket(argv[optind + 1]);
    split_sends(fd, (int)size);
    join_receives(fd);
    large_receive_buffer(fd, 16 << 20);

    int64_t started = monotonic_ns();
    int64_t now = started, last = started;
    int64_t end = started + (int64_t)(seconds * 1e9);
    while (now < end || (answered + lost < sent && now - last < STALL_NS)) {
        if (now < end && sent - answered - lost + segments <= window) {
            if (send(fd, joined, size * segments, 0) < 0)
                errors++;
            else
                sent += segments;
        }
        uint64_t replies = take_replies(fd, size);
        now = monotonic_ns();
        if (replies > 0) {
            answered += replies;
            last = now;
        } else if (now - last > STALL_NS) {
            lost = sent - answered;
            last = now;
        }
        /* Replies to requests that were counted as lost. */
        if (answered + lost > sent)
            lost = sent - answered;
    }
    if (answered == 0) {
        errno = ETIMEDOUT;
        fail("no answer at all");
    }
    printf("{\"sent\": %llu, \"answered\": %llu, \"errors\": %llu, \"started_ns\": %lld, "
           "\"seconds\": %.6f, \"cpu_s\": %.6f}\n",
           (unsigned long long)sent, (unsigned long long)answered, (unsigned long long)errors,
           (long long)started, (last - started) / 1e9, cpu_seconds());
    return 0;
}
