/* Sends datagrams of random bytes and sizes to 127.0.0.1 at full speed.
 *
 *     flood -s SECONDS [-j] [-x SEED] PORT
 *
 * Half of them are entirely random. The others begin like an envelope, with a length from 0 to 15 and a
 * magic code, so that all of the decoder is reached. No datagram is an envelope with a magic code that
 * begins with P, E or B (PING, ECHO, BNCH), so a handler of these receives none of them.
 *
 * Without -j, each send is one datagram of 0 to MAX_PLAIN bytes, and occasionally one of the maximum size.
 * With -j, each send is always MAX_SEGMENTS datagrams of one random size from 1 to MAX_JOINED bytes
 * (UDP_SEGMENT): if a receiver with UDP_GRO drops a send, it has dropped MAX_SEGMENTS datagrams.
 *
 * Prints one line of JSON.
 */

#include "client.h"

#include <sys/random.h>

#define MAX_PLAIN 1400
#define MAX_JOINED 1000
#define LARGE_EVERY 1024
#define POOL_BYTES (8u << 20)

static const char ARGUMENTS[] = "-s SECONDS [-j] [-x SEED] PORT";

static uint64_t state;
static unsigned char pool[POOL_BYTES + MAX_BYTES];
static unsigned char work[MAX_BYTES];

/* xorshift64*, https://en.wikipedia.org/wiki/Xorshift */
static uint64_t next_random(void)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * UINT64_C(2685821657736338717);
}

static uint64_t random_below(uint64_t limit)
{
    return next_random() % limit;
}

static const unsigned char *random_bytes(void)
{
    return pool + random_below(POOL_BYTES);
}

/* Overwrites the first bytes of a datagram with the length of a magic code, the code, and the length of
 * a version. */
static void begin_as_envelope(unsigned char *at, size_t size)
{
    unsigned char header[4 + 15 + 4] = {0};
    uint64_t r = next_random();
    size_t length = r & 15;
    header[3] = (unsigned char)length;
    for (size_t i = 0; i < length; i++)
        header[4 + i] = (unsigned char)('F' + (r >> (4 + i)) % 10); /* F to O */
    if (length && r >> 60 == 0)
        header[4] |= 0x80; /* not ASCII */
    header[4 + length + 3] = (unsigned char)(r >> 56 & 31);
    size_t header_bytes = 4 + length + 4;
    memcpy(at, header, size < header_bytes ? size : header_bytes);
}

static ssize_t send_plain(int fd)
{
    size_t size = random_below(LARGE_EVERY) ? random_below(MAX_PLAIN + 1) : random_below(MAX_BYTES + 1);
    const unsigned char *bytes = random_bytes();
    if (next_random() >> 63) {
        memcpy(work, bytes, size);
        begin_as_envelope(work, size);
        bytes = work;
    }
    return send(fd, bytes, size, 0) < 0 ? -1 : 1;
}

static ssize_t send_joined(int fd)
{
    size_t size = 1 + random_below(MAX_JOINED);
    struct iovec bytes = {(void *)random_bytes(), size * MAX_SEGMENTS};
    unsigned char control[CMSG_SPACE(sizeof(uint16_t))] = {0};
    struct msghdr message = {
        .msg_iov = &bytes,
        .msg_iovlen = 1,
        .msg_control = control,
        .msg_controllen = sizeof control,
    };
    struct cmsghdr *part = CMSG_FIRSTHDR(&message);
    uint16_t segment_bytes = (uint16_t)size;
    part->cmsg_level = SOL_UDP;
    part->cmsg_type = UDP_SEGMENT;
    part->cmsg_len = CMSG_LEN(sizeof segment_bytes);
    memcpy(CMSG_DATA(part), &segment_bytes, sizeof segment_bytes);
    if (next_random() >> 63) {
        memcpy(work, bytes.iov_base, bytes.iov_len);
        for (size_t i = 0; i < MAX_SEGMENTS; i++)
            begin_as_envelope(work + i * size, size);
        bytes.iov_base = work;
    }
    return sendmsg(fd, &message, 0) < 0 ? -1 : MAX_SEGMENTS;
}

int main(int argc, char **argv)
{
    uint64_t sent = 0, errors = 0;
    int count = read_options(argc, argv, "s:jx:", ARGUMENTS);
    double seconds = option_number('s', 0);
    uint64_t seed = option_texts['x'] ? strtoull(option_texts['x'], NULL, 10) : 0;
    if (count != 1 || seconds <= 0)
        usage(ARGUMENTS);
    if (seed == 0 && getrandom(&seed, sizeof seed, 0) != sizeof seed)
        fail("getrandom");
    state = seed | 1;
    die_with_parent();
    for (size_t i = 0; i < sizeof pool; i += sizeof(uint32_t)) {
        uint32_t word = (uint32_t)(next_random() >> 32);
        size_t left = sizeof pool - i;
        memcpy(pool + i, &word, left < sizeof word ? left : sizeof word);
    }
    int fd = connected_socket(argv[optind]);

    int64_t started = monotonic_ns();
    int64_t now = started;
    for (int64_t end = started + (int64_t)(seconds * 1e9); now < end; now = monotonic_ns()) {
        ssize_t taken = option_texts['j'] ? send_joined(fd) : send_plain(fd);
        if (taken < 0)
            errors++;
        else
            sent += (uint64_t)taken;
    }
    printf("{\"sent\": %llu, \"started_ns\": %lld, \"seconds\": %.6f, \"errors\": %llu, "
           "\"cpu_s\": %.6f, \"seed\": %llu}\n",
           (unsigned long long)sent, (long long)started, (now - started) / 1e9,
           (unsigned long long)errors, cpu_seconds(), (unsigned long long)seed);
    return 0;
}
