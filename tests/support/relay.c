/* relay: delay, loss and rate between two network namespaces, at packet level, so TCP and UDP are treated alike.
 *
 *   relay [--delay-us N] [--loss-permille N] [--seed N] [--rate-mbit N] [--queue N] NAMESPACE_A NAMESPACE_B
 *
 * Opens the TUN device `wan0` in each namespace, prints READY, and forwards between them until its standard input
 * ends or SIGTERM comes; then it prints its counters as JSON. Addresses and routes are the caller's business.
 *
 * Every figure holds for each direction by itself: a delay of 25000 is a round trip of 50 ms. Whether the n-th packet
 * of a direction is lost depends on the seed, the direction and n alone. --rate-mbit 0 means unlimited; --queue is
 * how many full-size packets may wait for the rate limit before further ones are dropped.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_PACKET = 65535,
    FULL_SIZE = 1500,     /* what --queue counts in */
    MAX_HELD = 65536,     /* packets under way in one direction; more are dropped */
    BURST = 64,           /* packets read from one device before the other has its turn */
};
static const uint64_t SECOND = 1000000000;

struct packet {
    struct packet *next;
    uint64_t due; /* when it arrives, in ns of the monotonic clock */
    size_t length;
    unsigned char bytes[];
};

/* One way through the relay. The delay is constant, so packets arrive in the order in which they came: a FIFO. */
struct direction {
    int from, to;
    uint64_t random;
    uint64_t line_free; /* when the last byte accepted so far has left at the given rate */
    struct packet *first, **last;
    bool blocked; /* the receiving device takes nothing at present */
    uint64_t held, received, lost, overflowed, delivered, refused;
};

struct settings {
    uint64_t delay; /* ns */
    uint64_t loss;  /* of 1000 */
    uint64_t seed;
    uint64_t rate;  /* bits per second, 0: unlimited */
    uint64_t queue; /* packets */
};

static volatile sig_atomic_t ended;

static void end(int signal_number)
{
    (void)signal_number;
    ended = 1;
}

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...)
{
    int error = errno;
    va_list arguments;

    va_start(arguments, format);
    fputs("relay: ", stderr);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, ": %s\n", strerror(error));
    exit(1);
}

static uint64_t now(void)
{
    struct timespec time;

    if (clock_gettime(CLOCK_MONOTONIC, &time) != 0)
        fail("clock_gettime");
    return (uint64_t)time.tv_sec * SECOND + (uint64_t)time.tv_nsec;
}

/* SplitMix64 (Steele, Lea, Flood 2014): a full-period generator in which any seed is a good one. */
static uint64_t next_random(uint64_t *state)
{
    uint64_t mixed = *state += UINT64_C(0x9e3779b97f4a7c15);

    mixed = (mixed ^ (mixed >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    mixed = (mixed ^ (mixed >> 27)) * UINT64_C(0x94d049bb133111eb);
    return mixed ^ (mixed >> 31);
}

static int open_device(const char *namespace)
{
    char path[PATH_MAX];
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI, .ifr_name = "wan0"};
    int place, device;

    if ((size_t)snprintf(path, sizeof path, "/run/netns/%s", namespace) >= sizeof path) {
        errno = ENAMETOOLONG;
        fail("%s", namespace);
    }
    place = open(path, O_RDONLY | O_CLOEXEC);
    if (place < 0)
        fail("%s", path);
    if (setns(place, CLONE_NEWNET) != 0)
        fail("cannot enter %s", path);
    close(place);
    device = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (device < 0)
        fail("/dev/net/tun");
    if (ioctl(device, TUNSETIFF, &request) != 0)
        fail("cannot make wan0 in %s", path);
    return device;
}

/* Takes in one packet of `length` bytes that came just now. */
static void accept_packet(struct direction *way, const struct settings *settings, const unsigned char *bytes,
                          size_t length)
{
    struct packet *packet;
    uint64_t time = now();

    way->received++;
    if (next_random(&way->random) % 1000 < settings->loss) {
        way->lost++;
        return;
    }
    if (way->held >= MAX_HELD) {
        way->overflowed++;
        return;
    }
    if (settings->rate > 0) {
        uint64_t room = settings->queue * FULL_SIZE * 8 * SECOND / settings->rate;

        if (way->line_free < time)
            way->line_free = time;
        if (way->line_free - time > room) {
            way->overflowed++;
            return;
        }
        way->line_free += length * 8 * SECOND / settings->rate;
        time = way->line_free;
    }
    packet = malloc(sizeof *packet + length);
    if (packet == NULL)
        fail("no memory for a packet");
    packet->next = NULL;
    packet->due = time + settings->delay;
    packet->length = length;
    memcpy(packet->bytes, bytes, length);
    *way->last = packet;
    way->last = &packet->next;
    way->held++;
}

static void read_packets(struct direction *way, const struct settings *settings)
{
    static unsigned char buffer[MAX_PACKET];
    int count;

    for (count = 0; count < BURST; count++) {
        ssize_t length = read(way->from, buffer, sizeof buffer);

        if (length < 0) {
            if (errno == EINTR)
                continue;
            if (errno == EAGAIN)
                return;
            fail("cannot read from wan0");
        }
        accept_packet(way, settings, buffer, (size_t)length);
    }
}

static void write_packets(struct direction *way)
{
    uint64_t time = now();

    way->blocked = false;
    while (way->first != NULL && way->first->due <= time) {
        struct packet *packet = way->first;

        if (write(way->to, packet->bytes, packet->length) >= 0) {
            way->delivered++;
        } else if (errno == EINTR) {
            continue;
        } else if (errno == EAGAIN) {
            way->blocked = true;
            return;
        } else {
            way->refused++; /* the device is down, or the packet is none: a network would drop it as well */
        }
        way->first = packet->next;
        if (way->first == NULL)
            way->last = &way->first;
        way->held--;
        free(packet);
    }
}

/* Waits for packets, for one to be due, or for the end. */
static void wait_for_work(struct direction ways[2], const sigset_t *mask)
{
    struct pollfd watched[3] = {
        {.fd = ways[0].from, .events = POLLIN},
        {.fd = ways[1].from, .events = POLLIN},
        {.fd = STDIN_FILENO, .events = POLLIN},
    };
    uint64_t time = now(), until = UINT64_MAX;
    struct timespec left;
    int index;

    for (index = 0; index < 2; index++) {
        struct direction *way = &ways[index];

        if (way->blocked)
            watched[1 - index].events |= POLLOUT;
        else if (way->first != NULL && way->first->due < until)
            until = way->first->due;
    }
    if (until < time)
        until = time;
    left.tv_sec = (time_t)((until - time) / SECOND);
    left.tv_nsec = (long)((until - time) % SECOND);
    if (ppoll(watched, 3, until == UINT64_MAX ? NULL : &left, mask) < 0) {
        if (errno != EINTR)
            fail("ppoll");
        return;
    }
    if (watched[2].revents != 0) {
        char ignored[512];

        if (read(STDIN_FILENO, ignored, sizeof ignored) <= 0)
            ended = 1;
    }
}

static void print_counters(const char *name, const struct direction *way, const char *after)
{
    printf("\"%s\": {\"received\": %" PRIu64 ", \"lost\": %" PRIu64 ", \"overflowed\": %" PRIu64
           ", \"delivered\": %" PRIu64 ", \"refused\": %" PRIu64 ", \"held\": %" PRIu64 "}%s",
           name, way->received, way->lost, way->overflowed, way->delivered, way->refused, way->held, after);
}

static uint64_t number(const char *option, const char *text, uint64_t most)
{
    char *rest;
    unsigned long long value;

    errno = 0;
    value = strtoull(text, &rest, 10);
    if (errno == 0 && (text[0] < '0' || text[0] > '9' || *rest != '\0' || value > most))
        errno = EINVAL;
    if (errno != 0)
        fail("--%s %s", option, text);
    return value;
}

static void parse(int count, char **arguments, struct settings *settings)
{
    static const struct option options[] = {
        {"delay-us", required_argument, NULL, 'd'},  {"loss-permille", required_argument, NULL, 'l'},
        {"seed", required_argument, NULL, 's'},      {"rate-mbit", required_argument, NULL, 'r'},
        {"queue", required_argument, NULL, 'q'},     {NULL, 0, NULL, 0},
    };
    int option, index;

    while ((option = getopt_long(count, arguments, "", options, &index)) != -1) {
        switch (option) {
        case 'd':
            settings->delay = number(options[index].name, optarg, 60000000) * 1000;
            break;
        case 'l':
            settings->loss = number(options[index].name, optarg, 1000);
            break;
        case 's':
            settings->seed = number(options[index].name, optarg, UINT64_MAX);
            break;
        case 'r':
            settings->rate = number(options[index].name, optarg, 100000) * 1000000;
            break;
        case 'q':
            settings->queue = number(options[index].name, optarg, 100000);
            break;
        default:
            exit(2);
        }
    }
    if (count - optind != 2) {
        fputs("relay: two namespaces are needed\n", stderr);
        exit(2);
    }
}

int main(int count, char **arguments)
{
    struct settings settings = {.queue = 1000};
    struct direction ways[2] = {0};
    struct sigaction action = {.sa_handler = end};
    sigset_t blocked, open;
    int index;

    parse(count, arguments, &settings);

    /* signals come only inside ppoll, so none is missed between a check and the wait */
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGTERM);
    sigaddset(&blocked, SIGINT);
    if (sigprocmask(SIG_BLOCK, &blocked, &open) != 0 || sigaction(SIGTERM, &action, NULL) != 0 ||
        sigaction(SIGINT, &action, NULL) != 0)
        fail("signals");
    sigdelset(&open, SIGTERM);
    sigdelset(&open, SIGINT);
    if (prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL) != 0)
        fail("timer slack");

    for (index = 0; index < 2; index++) {
        int device = open_device(arguments[optind + index]);

        ways[index].from = device;
        ways[1 - index].to = device;
        ways[index].last = &ways[index].first;
        ways[index].random = settings.seed * 2 + (uint64_t)index;
    }
    if (puts("READY") == EOF || fflush(stdout) != 0)
        fail("standard output");

    while (!ended) {
        wait_for_work(ways, &open);
        for (index = 0; index < 2; index++) {
            read_packets(&ways[index], &settings);
            write_packets(&ways[index]);
        }
    }

    putchar('{');
    print_counters("a_to_b", &ways[0], ", ");
    print_counters("b_to_a", &ways[1], "}\n");
    if (fflush(stdout) != 0)
        fail("standard output");
    return 0;
}
