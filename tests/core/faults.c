/* Makes recvmmsg and sendmmsg fail by plan: LD_PRELOAD this, with the plan in PEERD_FAULTS.

   The plan is a list of function:first:last:kind:value:port, parted by spaces: what happens to the
   calls numbered first to last (from 1) of that function. The first entry that applies to a call
   decides. Kinds:

   errno    fails with this errno, and the kernel is not asked
   count    the kernel is asked for at most this many messages, so its answer is short
   run      a message with a UDP_SEGMENT control message fails with this errno, as with a device that
            has no checksum offload; messages before it are sent, so that the answer may be short
   to       a message to the port fails with this errno; messages before it are sent
   bytes    buffers of this size to receive into, so that the kernel cuts datagrams off
   control  the same with the control buffers

   port, if not 0: run only for messages to this port. */

#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define MAX_FAULTS 32
#define MAX_MESSAGES 1024

struct fault {
    char function[16];
    int first, last;
    char kind[16];
    int value, port;
    int met;
};

static struct fault plan[MAX_FAULTS];
static int planned;
static int recvmmsg_calls, sendmmsg_calls;
static int runs_sent;

/* How often entry number `index` of the plan was met. */
int faults_met(int index) { return plan[index].met; }

/* How many messages with a UDP_SEGMENT control message the kernel took. */
int faults_runs_sent(void) { return runs_sent; }

__attribute__((constructor)) static void read_plan(void)
{
    const char *text = getenv("PEERD_FAULTS");
    int used;
    while (text != NULL && *text != '\0') {
        struct fault *fault = &plan[planned];
        if (planned == MAX_FAULTS
            || sscanf(text, "%15[a-z]:%d:%d:%15[a-z]:%d:%d%n", fault->function, &fault->first,
                      &fault->last, fault->kind, &fault->value, &fault->port, &used) != 6) {
            fprintf(stderr, "faults: bad plan: %s\n", text);
            abort();
        }
        planned++;
        text += used;
        text += strspn(text, " ");
    }
}

static struct fault *fault_of(const char *function, int call)
{
    for (int i = 0; i < planned; i++)
        if (strcmp(plan[i].function, function) == 0 && plan[i].first <= call && call <= plan[i].last)
            return &plan[i];
    return NULL;
}

static int is(const struct fault *fault, const char *kind)
{
    return fault != NULL && strcmp(fault->kind, kind) == 0;
}

static int fail(struct fault *fault)
{
    fault->met++;
    errno = fault->value;
    return -1;
}

static unsigned int least(unsigned int a, int b) { return a < (unsigned int)b ? a : (unsigned int)b; }

int recvmmsg(int fd, struct mmsghdr *messages, unsigned int count, int flags, struct timespec *timeout)
{
    int (*real)(int, struct mmsghdr *, unsigned int, int, struct timespec *) =
        dlsym(RTLD_NEXT, "recvmmsg");
    struct fault *fault = fault_of("recvmmsg", ++recvmmsg_calls);
    size_t sizes[MAX_MESSAGES];
    int filled, error;
    if (is(fault, "errno"))
        return fail(fault);
    if (fault == NULL)
        return real(fd, messages, count, flags, timeout);
    fault->met++;
    if (is(fault, "count"))
        return real(fd, messages, least(count, fault->value), flags, timeout);
    for (unsigned int i = 0; i < count; i++) {
        sizes[i] = messages[i].msg_hdr.msg_iov->iov_len;
        if (is(fault, "bytes"))
            messages[i].msg_hdr.msg_iov->iov_len = fault->value;
        else
            messages[i].msg_hdr.msg_controllen = fault->value;
    }
    filled = real(fd, messages, count, flags, timeout);
    error = errno;
    for (unsigned int i = 0; i < count; i++)
        messages[i].msg_hdr.msg_iov->iov_len = sizes[i];
    errno = error;
    return filled;
}

static int is_met(const struct fault *fault, const struct mmsghdr *message)
{
    /* sin_port and sin6_port are at the same place. */
    const struct sockaddr_in *to = message->msg_hdr.msg_name;
    return (is(fault, "to") || message->msg_hdr.msg_controllen > 0)
           && (fault->port == 0 || ntohs(to->sin_port) == fault->port);
}

int sendmmsg(int fd, struct mmsghdr *messages, unsigned int count, int flags)
{
    int (*real)(int, struct mmsghdr *, unsigned int, int) = dlsym(RTLD_NEXT, "sendmmsg");
    struct fault *fault = fault_of("sendmmsg", ++sendmmsg_calls);
    unsigned int asked = count;
    int sent;
    if (is(fault, "errno"))
        return fail(fault);
    if (is(fault, "count")) {
        fault->met++;
        asked = least(count, fault->value);
    }
    if (is(fault, "run") || is(fault, "to")) {
        for (asked = 0; asked < count && !is_met(fault, &messages[asked]); asked++)
            ;
        if (asked == 0)
            return fail(fault);
    }
    sent = real(fd, messages, asked, flags);
    for (int i = 0; i < sent; i++)
        runs_sent += messages[i].msg_hdr.msg_controllen > 0;
    return sent;
}
