/* Measures round trips to an echo server on 127.0.0.1.
 *
 *     ping -s SECONDS [-r RATE] [-b] [-w WAIT] HEX PORT [PORT ...]
 *
 * HEX is the datagram. Its last 8 bytes are overwritten with a number, and a reply that ends with the
 * number of a request under way answers it. With more ports, requests go to each in turn.
 *
 * Without -r one request is under way at a time (a closed loop), and its time starts just before the
 * send. With -r, RATE requests are sent per second, whether or not earlier ones are answered, and the
 * time of each starts when it was due, so a late send counts as well (no coordinated omission). With -b
 * the client sleeps while it has nothing to do, like a usual program; otherwise it polls its socket
 * without sleeping, so that its own wake-ups are not in the figures. WAIT is the timeout of an answer in
 * seconds (1).
 *
 * Prints one line of JSON with times in nanoseconds. lost is the number of unanswered requests,
 * kernel_drops the number of replies that the client's own socket had no room for.
 */

#include "client.h"

#include <poll.h>

#define MAX_SAMPLES (1u << 23)
#define MAX_PORTS 64

static const char ARGUMENTS[] = "-s SECONDS [-r RATE] [-b] [-w WAIT] HEX PORT [PORT ...]";

static unsigned char datagram[MAX_BYTES];
static size_t size;
static int fd;
static struct sockaddr_in to[MAX_PORTS];
static int ports;
static int sleeps;
static uint64_t sent = 0, answered = 0, errors = 0;
static int64_t *due_ns; /* by request number; 0 for an answered one */
static uint32_t *samples;

static void send_request(int64_t due)
{
    memcpy(datagram + size - sizeof sent, &sent, sizeof sent);
    due_ns[sent] = due;
    /* A single port is connected to. */
    ssize_t taken = ports == 1
        ? send(fd, datagram, size, 0)
        : sendto(fd, datagram, size, 0, (struct sockaddr *)&to[sent % ports], sizeof to[0]);
    if (taken < 0)
        errors++;
    sent++;
}

/* Returns 1 if there was a datagram. */
static int take_answer(int flags)
{
    static unsigned char reply[BUFFER_BYTES];
    uint64_t number;
    ssize_t got = recv(fd, reply, sizeof reply, flags);
    int64_t now = monotonic_ns();
    if (got < 0) {
        if (errno != EAGAIN && errno != EINTR)
            errors++;
        return 0;
    }
    if (got < (ssize_t)sizeof number) {
        errors++;
        return 1;
    }
    memcpy(&number, reply + got - sizeof number, sizeof number);
    if (number >= sent || due_ns[number] == 0) {
        errors++;
        return 1;
    }
    int64_t took = now - due_ns[number];
    samples[answered++] = took > UINT32_MAX ? UINT32_MAX : (uint32_t)took;
    due_ns[number] = 0;
    return 1;
}

static void wait_until(int64_t until)
{
    int64_t left = until - monotonic_ns();
    struct pollfd readable = {.fd = fd, .events = POLLIN};
    struct timespec time = {left / 1000000000, left % 1000000000};
    if (left > 0)
        ppoll(&readable, 1, &time, NULL);
}

static void closed_loop(int64_t end, int64_t wait_ns)
{
    int64_t now;
    while ((now = monotonic_ns()) < end && sent < MAX_SAMPLES) {
        uint64_t before = answered;
        send_request(now);
        int64_t limit = now + wait_ns;
        while (answered == before && monotonic_ns() < limit)
            take_answer(sleeps ? 0 : MSG_DONTWAIT);
    }
}

static void open_loop(int64_t started, int64_t end, int64_t wait_ns, double rate)
{
    double step_ns = 1e9 / rate;
    double due = (double)started;
    int64_t now = started;
    while (now < end && sent < MAX_SAMPLES) {
        if (now >= due) {
            send_request((int64_t)due);
            due += step_ns;
        } else if (!take_answer(MSG_DONTWAIT) && sleeps) {
            wait_until(due < end ? (int64_t)due : end);
        }
        now = monotonic_ns();
    }
    for (int64_t limit = now + wait_ns; answered < sent && now < limit; now = monotonic_ns())
        if (!take_answer(MSG_DONTWAIT) && sleeps)
            wait_until(limit);
}

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* The smallest sample that this share of all samples does not exceed. */
static uint32_t percentile(double share)
{
    uint64_t index = (uint64_t)(share * (double)answered);
    return samples[index < answered ? index : answered - 1];
}

static uint32_t dropped_here(void)
{
    uint32_t memory[9] = {0};
    socklen_t bytes = sizeof memory;
    getsockopt(fd, SOL_SOCKET, SO_MEMINFO, memory, &bytes);
    return memory[8];
}

int main(int argc, char **argv)
{
    ports = read_options(argc, argv, "s:r:bw:", ARGUMENTS) - 1;
    double seconds = option_number('s', 0), rate = option_number('r', 0);
    double wait = option_number('w', 1);
    sleeps = option_texts['b'] != NULL;
    if (ports < 1 || ports > MAX_PORTS || seconds <= 0 || rate < 0 || wait <= 0)
        usage(ARGUMENTS);
    size = parse_hex(argv[optind], datagram, sizeof datagram);
    if (size < sizeof sent)
        usage(ARGUMENTS);
    die_with_parent();
    fd = ports == 1 ? connected_socket(argv[optind + 1]) : udp_socket();
    for (int i = 0; i < ports; i++)
        to[i] = loopback(argv[optind + 1 + i]);
    large_receive_buffer(fd, 4 << 20);
    /* A timeout for the blocking recv() of the closed loop. */
    struct timeval limit = {(time_t)wait, (suseconds_t)((wait - (time_t)wait) * 1e6)};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    due_ns = calloc(MAX_SAMPLES, sizeof *due_ns);
    samples = calloc(MAX_SAMPLES, sizeof *samples);
    if (!due_ns || !samples)
        fail("calloc");

    int64_t started = monotonic_ns();
    int64_t end = started + (int64_t)(seconds * 1e9);
    int64_t wait_ns = (int64_t)(wait * 1e9);
    if (rate > 0)
        open_loop(started, end, wait_ns, rate);
    else
        closed_loop(end, wait_ns);
    double took = (monotonic_ns() - started) / 1e9;
    if (answered == 0) {
        errno = ETIMEDOUT;
        fail("no answer at all");
    }
    qsort(samples, answered, sizeof *samples, by_value);
    printf("{\"sent\": %llu, \"answered\": %llu, \"lost\": %llu, \"errors\": %llu, "
           "\"kernel_drops\": %u, \"seconds\": %.6f, \"cpu_s\": %.6f, "
           "\"p50_ns\": %u, \"p99_ns\": %u, \"p999_ns\": %u, \"max_ns\": %u}\n",
           (unsigned long long)sent, (unsigned long long)answered,
           (unsigned long long)(sent - answered), (unsigned long long)errors, dropped_here(), took,
           cpu_seconds(), percentile(0.5), percentile(0.99), percentile(0.999),
           samples[answered - 1]);
    return 0;
}
