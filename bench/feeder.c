/* A feed that is never the bottleneck: pre-encoded PUBLISH packets from a raw socket.
 *
 *   feeder serve QOS COUNT                 be the broker of one subscriber: print "port N", accept, answer
 *                                          CONNECT and SUBSCRIBE, then send COUNT messages and a marker
 *   feeder publish PORT QOS COUNT RATE     publish the same messages to a real broker, RATE a second (0: no limit)
 *
 * The last line of output is "first S last S acked S": seconds of CLOCK_MONOTONIC when the first byte was
 * sent, when the last was, and when everything was acknowledged (0 at QoS 0).
 *
 * At QoS 1 no more than the subscriber's Receive Maximum is unacknowledged (65535 where it names none).
 * Every message has the same length, so any position in the ring is a message and an offset.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define DEVICES 100
#define CHUNK (256 * 1024)

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static size_t message(unsigned char *at, int version, int qos, unsigned id, const char *device, unsigned n) {
    char topic[64], payload[128];
    int topic_length = snprintf(topic, sizeof topic, "device/sensor-%s/telemetry/temperature", device);
    int payload_length = snprintf(payload, sizeof payload,
                                  "{\"value\":%u.%02u,\"unit\":\"celsius\",\"timestamp\":\"2025-12-09T10:%02u:%02u.%03uZ\"}",
                                  20 + n % 10, n % 100, n / 60000 % 60, n / 1000 % 60, n % 1000);
    size_t rest = 2 + topic_length + (qos ? 2 : 0) + (version == 5 ? 1 : 0) + payload_length;
    unsigned char *p = at;
    *p++ = 0x30 | qos << 1;
    *p++ = rest; /* always below 128 */
    *p++ = 0;
    *p++ = topic_length;
    memcpy(p, topic, topic_length);
    p += topic_length;
    if (qos) {
        *p++ = id >> 8;
        *p++ = id & 255;
    }
    if (version == 5) *p++ = 0;
    memcpy(p, payload, payload_length);
    return p + payload_length - at;
}

static void read_all(int fd, unsigned char *at, size_t length) {
    while (length) {
        ssize_t got = read(fd, at, length);
        if (got <= 0) fail("the peer closed during the handshake");
        at += got;
        length -= got;
    }
}

static size_t read_packet(int fd, unsigned char *first, unsigned char *body, size_t room) {
    unsigned char byte;
    size_t length = 0, shift = 0;
    read_all(fd, first, 1);
    do {
        read_all(fd, &byte, 1);
        length |= (size_t)(byte & 127) << shift;
        shift += 7;
    } while (byte & 128);
    if (length > room) fail("a packet of the handshake is too large");
    read_all(fd, body, length);
    return length;
}

static void write_all(int fd, const unsigned char *at, size_t length) {
    while (length) {
        ssize_t put = write(fd, at, length);
        if (put <= 0) fail("write");
        at += put;
        length -= put;
    }
}

/* The Receive Maximum among the properties of a CONNECT: a fixed table of value sizes is enough. */
static unsigned receive_maximum(const unsigned char *p, size_t length) {
    const unsigned char *end = p + length;
    while (p < end) {
        switch (*p++) {
            case 0x21: return p[0] << 8 | p[1];
            case 0x11: case 0x27: p += 4; break;
            case 0x22: p += 2; break;
            case 0x17: case 0x19: p += 1; break;
            case 0x26: p += 2 + (p[0] << 8 | p[1]); p += 2 + (p[0] << 8 | p[1]); break;
            default: p += 2 + (p[0] << 8 | p[1]);
        }
    }
    return 65535;
}

static int serve(int *version, unsigned *window) {
    unsigned char body[65536], first;
    int one = 1, buffer = 4 << 20, listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1)) fail("listen");
    getsockname(listener, (struct sockaddr *)&address, &length);
    printf("port %d\n", ntohs(address.sin_port));
    fflush(stdout);
    int fd;
    size_t size;
    for (;;) { /* a connection that closes without a word was somebody looking whether we are up */
        fd = accept(listener, 0, 0);
        if (fd < 0) fail("accept");
        if (recv(fd, &first, 1, MSG_PEEK) == 1) break;
        close(fd);
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer);
    read_packet(fd, &first, body, sizeof body);
    *version = body[6];
    *window = *version == 5 ? receive_maximum(body + 11, body[10]) : 65535;
    if (*version == 5) write_all(fd, (unsigned char *)"\x20\x03\x00\x00\x00", 5);
    else write_all(fd, (unsigned char *)"\x20\x02\x00\x00", 4);
    for (;;) {
        size = read_packet(fd, &first, body, sizeof body);
        if (first == 0xC0) write_all(fd, (unsigned char *)"\xD0\x00", 2);
        if (first == 0x82) break;
    }
    unsigned char suback[64] = {0x90, 0, body[0], body[1]};
    size_t answer = 4, at = 2;
    if (*version == 5) {
        suback[answer++] = 0;
        at += 1 + body[2];
    }
    while (at < size) {
        at += 2 + (body[at] << 8 | body[at + 1]);
        suback[answer++] = body[at++] & 3;
    }
    suback[1] = answer - 2;
    write_all(fd, suback, answer);
    return fd;
}

static int publish_to(int port) {
    unsigned char answer[4];
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons(port)};
    if (connect(fd, (struct sockaddr *)&address, sizeof address)) fail("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    write_all(fd, (unsigned char *)"\x10\x12\x00\x04MQTT\x04\x02\x00\x00\x00\x06" "feeder", 20);
    read_all(fd, answer, 4);
    if (answer[3]) fail("the broker refused the feeder");
    return fd;
}

int main(int argc, char **argv) {
    int version = 4, fd;
    unsigned window = 65535;
    if (argc < 4) return 2;
    int serving = argv[1][0] == 's';
    int qos = atoi(argv[serving ? 2 : 3]);
    long count = atol(argv[serving ? 3 : 4]);
    double rate = serving ? 0 : atof(argv[5]);
    fd = serving ? serve(&version, &window) : publish_to(atoi(argv[2]));
    if (!serving) window = 1000;

    size_t ring = qos ? 65535 : 10000, each = 0;
    unsigned char *buffer = malloc(ring * 128);
    for (size_t n = 0; n < ring; n++) {
        char device[16];
        snprintf(device, sizeof device, "%04u", (unsigned)(n % DEVICES));
        each = message(buffer + n * each, version, qos, n + 1, device, n);
    }
    unsigned char marker[128];
    message(marker, version, qos, count % ring + 1, "last", 0);
    fcntl(fd, F_SETFL, O_NONBLOCK);

    const size_t total = (count + 1) * each;
    size_t sent = 0;
    long acked = 0, in_ack = 0, ack_left = 0;
    unsigned char input[65536];
    double first = now(), last = 0;
    while (sent < total || (qos && acked <= count)) {
        size_t limit = total;
        double wait = -1;
        if (qos && (acked + window) * each < limit) limit = (acked + window) * each;
        if (rate > 0) { /* bursts of a millisecond */
            size_t due = (size_t)((now() - first + 0.001) * rate) * each;
            if (due < limit) limit = due, wait = 1;
        }
        struct pollfd poller = {.fd = fd, .events = POLLIN | (sent < limit ? POLLOUT : 0)};
        if (poll(&poller, 1, sent < limit ? -1 : (int)wait) < 0) fail("poll");
        if (poller.revents & POLLIN) {
            ssize_t got = read(fd, input, sizeof input);
            if (got == 0) {
                fprintf(stderr, "the peer closed after %ld acknowledgements\n", acked);
                return 1;
            }
            for (ssize_t i = 0; i < got; i++) { /* count PUBACKs, skip whatever else */
                if (ack_left) ack_left--;
                else if (in_ack) ack_left = input[i], in_ack = 0;
                else in_ack = 1, acked += input[i] == 0x40;
            }
        }
        while (sent < limit) {
            const unsigned char *from = marker;
            size_t at = sent, piece = each;
            if (sent < total - each) {
                at = sent % (ring * each);
                from = buffer;
                piece = ring * each - at;
                if (piece > limit - sent) piece = limit - sent;
                if (piece > total - each - sent) piece = total - each - sent;
                if (piece > CHUNK) piece = CHUNK;
            } else {
                at = sent - (total - each);
                piece = each - at;
            }
            ssize_t put = write(fd, from + at, piece);
            if (put < 0) {
                if (errno == EAGAIN) break;
                fail("write");
            }
            sent += put;
        }
        if (sent >= total && !last) last = now();
    }
    printf("first %.6f last %.6f acked %.6f\n", first, last, qos ? now() : 0.0);
    fflush(stdout);
    while (serving) { /* stay until the subscriber has gone, answering its pings */
        fcntl(fd, F_SETFL, 0);
        ssize_t got = read(fd, input, sizeof input);
        if (got <= 0) break;
        if (got == 2 && input[0] == 0xC0) write_all(fd, (unsigned char *)"\xD0\x00", 2);
    }
    if (!serving) write_all(fd, (unsigned char *)"\xE0\x00", 2);
    return 0;
}
