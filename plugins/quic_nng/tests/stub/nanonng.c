/* A libnng with NanoNNG's streams, and its ways, over plain TCP to 127.0.0.1:
 *
 * - of what arrives it shows only the first buffer to the receives that are posted. Where they take all of that,
 *   it goes on by itself; where not, it waits until a receive is posted while none is;
 * - where something arrives while no receive is posted, it delivers nothing any more;
 * - what is closed here is closed at once.
 *
 * Unlike it, it shows nothing between the posting of a large receive, or the taking back of one, and that of the
 * single byte that is to follow: a moment in which the real one may lose all, and nobody can help it. Where no
 * single byte follows it goes on after GRACE seconds.
 *
 * Faults, from the environment: TESAIOT_STUB_
 *   REFUSE          a dial fails, as one does that finds nobody
 *   NO_HANDSHAKE    a dial never ends
 *   STALL_AFTER=n   after n bytes nothing is delivered any more
 *   SPLIT=n         the first buffer of what arrives has n bytes, or all where there are fewer
 *   EVENT=n         at most n bytes arrive at a time
 *   ABORT_AFTER=n   abort() after n bytes
 *   LOG=path        gets a line for each option that is set, and "lost" where nothing is delivered any more
 */

#include <netinet/in.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { ECLOSED = 7, ENOTSUP_ = 9, EINVAL_ = 3, ETIMEDOUT_ = 5, ECANCELED_ = 20, ECONNSHUT = 31, UNAVAILABLE = 136 };

typedef struct {
	void  *buf;
	size_t len;
} iov_t;

typedef struct aio {
	void (*callback)(void *);
	void         *argument, *output;
	iov_t         iov;
	int           result, timeout;
	size_t        count;
	struct queue *reads; /* of its stream */
	struct aio   *next;  /* in the queue of its stream */
	struct aio   *task;  /* in the queue of completions */
} aio;

typedef struct queue {
	aio *first, **end;
	bool half; /* of reads: a single byte is to follow */
} queue;

typedef struct {
	int   fd;
	bool  enabled, closed, lost;
	queue reads, writes;
} stream;

typedef struct { int port; aio *a; } dialer;

enum { GRACE = 2 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t  enabled = PTHREAD_COND_INITIALIZER, writing = PTHREAD_COND_INITIALIZER,
                      completed = PTHREAD_COND_INITIALIZER;
static aio            *tasks, **tasks_end = &tasks;

static long
setting(const char *name)
{
	char full[64];
	snprintf(full, sizeof(full), "TESAIOT_STUB_%s", name);
	return getenv(full) == NULL ? -1 : atol(getenv(full));
}

static void
note(const char *name, const char *value)
{
	const char *path = getenv("TESAIOT_STUB_LOG");
	FILE       *file = path == NULL ? NULL : fopen(path, "a");
	if (file != NULL) {
		fprintf(file, "%s %s\n", name, value);
		fclose(file);
	}
}

static void
append(queue *q, aio *a)
{
	a->next = NULL;
	q->end = &(*q->end = a)->next;
}

static aio *
drop(queue *q, aio *a)
{
	aio **at = &q->first;
	while (*at != NULL && *at != a)
		at = &(*at)->next;
	if (*at == NULL)
		return NULL;
	if ((*at = a->next) == NULL)
		q->end = at;
	return a;
}

/* Completions run on a thread of their own, in order. */
static void
finish(aio *a, int result, size_t count)
{
	a->result = result;
	a->count = count;
	a->task = NULL;
	*tasks_end = a;
	tasks_end = &a->task;
	pthread_cond_signal(&completed);
}

static void *
run_tasks(void *nothing)
{
	(void) nothing;
	for (;;) {
		pthread_mutex_lock(&lock);
		while (tasks == NULL)
			pthread_cond_wait(&completed, &lock);
		aio *a = tasks;
		tasks = a->task;
		if (tasks == NULL)
			tasks_end = &tasks;
		pthread_mutex_unlock(&lock);
		a->callback(a->argument);
	}
	return NULL;
}

static void
start(void *(*what)(void *), void *argument)
{
	pthread_t thread;
	if (pthread_create(&thread, NULL, what, argument) != 0 || pthread_detach(thread) != 0)
		abort();
}

__attribute__((constructor)) static void
begin(void)
{
	start(run_tasks, NULL);
}

static void
fail(stream *s, int result)
{
	s->closed = true;
	queue *queues[] = { &s->writes, &s->reads };
	for (int i = 0; i < 2; i++)
		while (queues[i]->first != NULL)
			finish(drop(queues[i], queues[i]->first), result, 0);
	pthread_cond_broadcast(&writing);
	pthread_cond_broadcast(&enabled);
}

static void
await_other_half(stream *s)
{
	struct timespec end;
	clock_gettime(CLOCK_REALTIME, &end);
	end.tv_sec += GRACE;
	while (!s->closed && s->reads.half)
		if (pthread_cond_timedwait(&enabled, &lock, &end) != 0)
			s->reads.half = false;
}

/* Shows the posted receives `size` bytes, of which they take some. */
static size_t
deliver(stream *s, const char *data, size_t size)
{
	size_t at = 0;
	for (aio *a; at < size && (a = s->reads.first) != NULL;) {
		size_t n = size - at < a->iov.len ? size - at : a->iov.len;
		memcpy(a->iov.buf, data + at, n);
		at += n;
		finish(drop(&s->reads, a), 0, n);
	}
	return at;
}

static void *
run_reads(void *argument)
{
	stream *s = argument;
	long    stall = setting("STALL_AFTER"), split = setting("SPLIT"), most = setting("EVENT");
	long    end = setting("ABORT_AFTER"), total = 0;
	char    data[65536];
	size_t  room = most > 0 && most < (long) sizeof(data) ? (size_t) most : sizeof(data);
	for (;;) {
		usleep(100); /* a datagram takes its time */
		pthread_mutex_lock(&lock);
		while (!s->closed && (!s->enabled || s->lost))
			pthread_cond_wait(&enabled, &lock);
		pthread_mutex_unlock(&lock);
		ssize_t got = recv(s->fd, data, room, MSG_PEEK);
		pthread_mutex_lock(&lock);
		await_other_half(s);
		if (s->closed || got <= 0)
			break;
		if (s->reads.first == NULL || (stall >= 0 && total >= stall)) {
			note("lost", s->reads.first == NULL ? "no receive" : "stall");
			s->lost = true;
			pthread_mutex_unlock(&lock);
			continue;
		}
		size_t shown = split > 0 && split < got ? (size_t) split : (size_t) got;
		size_t taken = deliver(s, data, shown);
		s->enabled = taken == (size_t) got;
		total += (long) taken;
		(void) !recv(s->fd, data, taken, 0);
		if (end >= 0 && total >= end)
			abort();
		pthread_mutex_unlock(&lock);
	}
	shutdown(s->fd, SHUT_WR);
	while (!s->closed && s->writes.first != NULL) /* what was sent is told first */
		pthread_cond_wait(&writing, &lock);
	fail(s, ECONNSHUT);
	pthread_mutex_unlock(&lock);
	return NULL;
}

static void *
run_writes(void *argument)
{
	stream *s = argument;
	for (;;) {
		pthread_mutex_lock(&lock);
		while (!s->closed && s->writes.first == NULL)
			pthread_cond_wait(&writing, &lock);
		aio *a = s->writes.first;
		pthread_mutex_unlock(&lock);
		if (a == NULL)
			return NULL;
		size_t at = 0;
		while (at < a->iov.len) {
			ssize_t n = send(s->fd, (char *) a->iov.buf + at, a->iov.len - at, MSG_NOSIGNAL);
			if (n <= 0)
				break;
			at += (size_t) n;
		}
		pthread_mutex_lock(&lock);
		if (drop(&s->writes, a))
			finish(a, at == a->iov.len ? 0 : ECONNSHUT, at);
		pthread_cond_broadcast(&writing);
		pthread_mutex_unlock(&lock);
	}
}

static void *
run_dial(void *argument)
{
	dialer            *d = argument;
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((uint16_t) d->port),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fd = socket(AF_INET, SOCK_STREAM, 0), result = UNAVAILABLE;
	if (setting("NO_HANDSHAKE") >= 0) {
		usleep((useconds_t) d->a->timeout * 1000);
		result = ETIMEDOUT_;
	} else if (setting("REFUSE") < 0 && connect(fd, (struct sockaddr *) &address, sizeof(address)) == 0) {
		stream *s = calloc(1, sizeof(*s));
		s->fd = fd;
		s->reads.end = &s->reads.first;
		s->writes.end = &s->writes.first;
		d->a->output = s;
		start(run_reads, s);
		start(run_writes, s);
		result = 0;
	}
	pthread_mutex_lock(&lock);
	finish(d->a, result, 0);
	pthread_mutex_unlock(&lock);
	return NULL;
}

/* --- the interface */

const char *
nng_version(void)
{
	return "1.11.0-stub";
}

const char *
nng_strerror(int code)
{
	static _Thread_local char text[32];
	snprintf(text, sizeof(text), "stub error %d", code);
	return code == ETIMEDOUT_ ? "Timed out" : code == ECONNSHUT ? "Connection shutdown" : text;
}

int
nng_aio_alloc(aio **result, void (*callback)(void *), void *argument)
{
	*(*result = malloc(sizeof(aio))) = (aio){ .callback = callback, .argument = argument };
	return 0;
}

int
nng_aio_set_iov(aio *a, unsigned count, const iov_t *iov)
{
	a->iov = *iov;
	return count == 1 ? 0 : EINVAL_;
}

void   nng_aio_set_timeout(aio *a, int32_t ms) { a->timeout = ms; }
int    nng_aio_result(aio *a) { return a->result; }
size_t nng_aio_count(aio *a) { return a->count; }
void  *nng_aio_get_output(aio *a, unsigned index) { return index == 0 ? a->output : NULL; }

void
nng_aio_cancel(aio *a)
{
	pthread_mutex_lock(&lock);
	if (a->reads != NULL && drop(a->reads, a)) {
		a->reads->half = true;
		finish(a, ECANCELED_, 0);
	} else
		a->result = ECANCELED_; /* too late, and yet */
	pthread_mutex_unlock(&lock);
}

int
nng_stream_dialer_alloc(dialer **result, const char *url)
{
	const char *port = strrchr(url, ':');
	if (strncmp(url, "mqtt-quic://", 12) != 0 || port == NULL)
		return ENOTSUP_;
	*(*result = malloc(sizeof(dialer))) = (dialer){ .port = atoi(port + 1) };
	return 0;
}

/* The first letter is the type. */
static const char *const options[] = { "s quic-tls-ca", "s quic-tls-cacert", "s quic-tls-key", "b quic-tls-verify",
	"u quic-idle-timeout", "u quic-connect-timeout", "i quic-keepalive", NULL };

static int
set(dialer *d, char type, const char *name, const char *value)
{
	(void) d;
	for (const char *const *known = options; *known != NULL; known++) {
		if ((*known)[0] == type && strcmp(*known + 2, name) == 0) {
			note(name, value);
			return 0;
		}
	}
	return ENOTSUP_;
}

int
nng_stream_dialer_set_string(dialer *d, const char *name, const char *value)
{
	return set(d, 's', name, access(value, R_OK) == 0 ? "readable" : "missing");
}

#define SETTER(kind, type, letter, format) \
	int nng_stream_dialer_set_##kind(dialer *d, const char *name, type value) \
	{ \
		char text[32]; \
		snprintf(text, sizeof(text), format, value); \
		return set(d, letter, name, text); \
	}
SETTER(bool, bool, 'b', "%d")
SETTER(uint64, uint64_t, 'u', "%lu")
SETTER(int, int, 'i', "%d")

void
nng_stream_dialer_dial(dialer *d, aio *a)
{
	d->a = a;
	start(run_dial, d);
}

void nng_stream_dialer_free(dialer *d) { free(d); }

static void
post(stream *s, queue *q, aio *a)
{
	pthread_mutex_lock(&lock);
	a->count = 0;
	if (s->closed) {
		finish(a, ECLOSED, 0);
	} else {
		append(q, a);
		if (q == &s->reads)
			q->half = a->iov.len > 1;
		if (s->reads.first == a)
			s->enabled = true;
		pthread_cond_broadcast(&enabled);
		pthread_cond_broadcast(&writing);
	}
	pthread_mutex_unlock(&lock);
}

void
nng_stream_recv(stream *s, aio *a)
{
	a->reads = &s->reads;
	post(s, &s->reads, a);
}

void nng_stream_send(stream *s, aio *a) { post(s, &s->writes, a); }

void
nng_stream_close(stream *s)
{
	pthread_mutex_lock(&lock);
	if (!s->closed) {
		shutdown(s->fd, SHUT_RDWR);
		fail(s, ECONNSHUT);
	}
	pthread_mutex_unlock(&lock);
}

