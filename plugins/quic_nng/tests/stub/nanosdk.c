/*
 * A libnng of NanoSDK's shape for tests: an MQTT 3.1.1 client behind the functions of its headers, over plain
 * TCP instead of QUIC. Written from what the real library was seen to do; "As there" marks its defects, which
 * are imitated because callers must survive them.
 *
 * Faults, from the environment, read when a socket is opened (TESAIOT_STUB_ before each name):
 *   LOSE_ACK=n              every nth PUBACK or PUBCOMP never reaches the ack callback
 *   LOSE_ALL_ACKS_AFTER=n   only the first n do (0: none)
 *   LOSE_REFUSAL=1          a CONNACK that refuses is lost, as one that comes together with a FIN is
 *   NO_CONNACK=1            any CONNACK is lost
 *   NO_HANDSHAKE=1          a connection is never made, and nothing says so
 *   DROP_AFTER=n            the connection ends after n PUBLISHes have been sent (each time)
 *   ABORT_AFTER=n           the process aborts after n PUBLISHes have been sent
 *   ABORT_ON_LOSS=1         it aborts when a connection ends while PUBLISHes of nng_sendmsg wait for acks
 *   ABORT_ON_CLOSE=1        it aborts in nng_close
 *   HANG_AFTER=n            nng_sendmsg and nng_send_aio never return from the PUBLISH after n
 *   HANG_ON_OPEN=1          nng_mqtt_quic_client_open_conf never returns
 *   HANG_ON_CLOSE=1         nng_close never returns
 *   SEND_DELAY=usec         each packet takes so long to be sent
 *   RETRY=usec              the pause before the next attempt to connect (default: 1 s)
 *   ONCE=path               the faults are those of the first socket only: it makes this file
 *   LOG=path                a line an event is added: open, failed (an attempt), connected, send TYPE ID (called),
 *                           publish ID QOS (sent), dropped TYPE ID, ack_lost ID, received_dropped, disconnected, close
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { EINVALID = 3, EBUSYNG = 4, ECLOSED = 7, EPROTONG = 13, ECANCELLED = 20, ECONNSHUT = 31 };
enum { CONNECT = 1, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP, SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK, PINGREQ };
enum { QUEUE = 256, SOCKETS = 64, TASK_THREADS = 4, TIMER_SECONDS = 5 };

typedef struct { uint32_t id; } nng_socket;
typedef struct { bool enable; char *url, *cafile, *certfile, *keyfile, *ca, *cert, *key, *key_password; bool verify_peer, set_fail; } conf_tls;
typedef struct { conf_tls tls; bool qos_first, multi_stream; uint64_t qkeepalive, qconnect_timeout; uint32_t qdiscon_timeout, qidle_timeout; uint8_t qcongestion_control; } conf_quic;
typedef struct { uint32_t length; uint8_t *buf; } nng_mqtt_topic;
typedef struct { nng_mqtt_topic topic; uint8_t qos, nolocal, rap, retain_handling; } nng_mqtt_topic_qos;

typedef struct nng_aio nng_aio;

typedef struct nng_msg {
	int refs, type;
	uint8_t flags, qos; /* PUBLISH: dup and retain as on the wire */
	uint16_t id, keep_alive;
	uint8_t level, connect_flags, return_code;
	nng_mqtt_topic client, will_topic, will, user, password, topic, payload, *filters;
	uint8_t *options, *codes;
	uint32_t count;      /* of filters or codes */
	nng_mqtt_topic wire; /* encoded, or as it came in: then topic, payload and codes point into it */
	bool from_wire, by_sendmsg;
	nng_aio *aio;
} nng_msg;

struct nng_aio {
	void (*callback)(void *);
	void *arg;
	int result, busy; /* busy: begun, queued or in its callback, each counts */
	bool prepared, queued, stopped, receiving, unacknowledged;
	nng_msg *msg;
	nng_aio *next_task, *next;
};

typedef struct { nng_msg *slots[QUEUE]; unsigned first, count; } queue;

struct faults {
	long lose_ack, lose_all_acks_after, lose_refusal, no_connack, no_handshake, drop_after, abort_after, abort_on_loss;
	long abort_on_close, hang_after, hang_on_open, hang_on_close, send_delay, retry;
};

typedef int (*event_cb)(void *, void *);

struct sock {
	uint32_t id;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct faults faults;
	int log, fd;
	char host[256], port[16];
	bool ready, writing, ping_due, closed, ended;
	unsigned next_id, pings, idle, keep_alive; /* idle, keep_alive: s */
	long sent, sent_here, called, acks;
	nng_msg *connect, *wire, *unacked[65536], *unreleased[65536];
	nng_aio *parked, *first_receiver, **last_receiver, *ack_aio;
	queue sending, received, acked;
	event_cb connect_cb, disconnect_cb, recv_cb, send_cb;
	void *connect_arg, *disconnect_arg, *recv_arg, *send_arg;
};

extern unsigned MsQuicOpenVersion(unsigned, const void **); /* As there: nothing names the library that has it */
extern void MsQuicClose(const void *);

static struct sock *sockets[SOCKETS];
static pthread_mutex_t sockets_lock = PTHREAD_MUTEX_INITIALIZER;
static conf_quic conf; /* As there: one a process, with the caller's pointers, read again at each connection */

/* -- aios: a task per aio, run by a few threads of the library ------------------------------------------------ */

static pthread_mutex_t tasks_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t task_queued = PTHREAD_COND_INITIALIZER, task_done = PTHREAD_COND_INITIALIZER;
static nng_aio *first_task, **last_task = &first_task;
static pthread_once_t task_threads = PTHREAD_ONCE_INIT;

static _Noreturn void panic(const char *what, const char *why)
{
	fprintf(stderr, "panic: %s%s\nThis message is indicative of a BUG.\nReport this at https://github.com/emqx/nanosdk\n", what, why);
	abort();
}

static void lock(pthread_mutex_t *mutex)
{
	int code = pthread_mutex_lock(mutex);
	if (code != 0)
		panic("pthread_mutex_lock: ", strerror(code));
}

static void start(void *(*run)(void *), void *arg)
{
	pthread_t thread;
	if (pthread_create(&thread, NULL, run, arg) != 0)
		panic("pthread_create", "");
	pthread_detach(thread);
}

static void task_over(nng_aio *aio)
{
	lock(&tasks_lock);
	if (--aio->busy == 0)
		pthread_cond_broadcast(&task_done);
	pthread_mutex_unlock(&tasks_lock);
}

static void *task_thread(void *unused)
{
	(void) unused;
	for (;;) {
		lock(&tasks_lock);
		while (first_task == NULL)
			pthread_cond_wait(&task_queued, &tasks_lock);
		nng_aio *aio = first_task;
		if ((first_task = aio->next_task) == NULL)
			last_task = &first_task;
		aio->queued = false;
		pthread_mutex_unlock(&tasks_lock);
		aio->callback(aio->arg);
		task_over(aio);
	}
	return NULL;
}

static void start_task_threads(void)
{
	for (int i = 0; i < TASK_THREADS; i++)
		start(task_thread, NULL);
}

static bool begin(nng_aio *aio)
{
	lock(&tasks_lock);
	bool begun = !aio->stopped;
	aio->result = begun ? 0 : ECANCELLED;
	if (begun) {
		aio->busy++;
		aio->prepared = true;
	}
	pthread_mutex_unlock(&tasks_lock);
	return begun;
}

/* Completes `aio`; its callback runs on a task thread, or here where `here`. */
static void finish(nng_aio *aio, int result, nng_msg *msg, bool here)
{
	pthread_once(&task_threads, start_task_threads);
	lock(&tasks_lock);
	aio->result = result;
	if (msg != NULL)
		aio->msg = msg;
	if (aio->prepared)
		aio->prepared = false;
	else
		aio->busy++;
	here = here || aio->callback == NULL;
	if (!here) {
		if (aio->queued)
			panic("list.c: node is already on a list", ""); /* As there: two completions at once */
		aio->queued = true;
		aio->next_task = NULL;
		*last_task = aio;
		last_task = &aio->next_task;
		pthread_cond_signal(&task_queued);
	}
	pthread_mutex_unlock(&tasks_lock);
	if (here) {
		if (aio->callback != NULL)
			aio->callback(aio->arg);
		task_over(aio);
	}
}

int nng_aio_alloc(nng_aio **aio, void (*callback)(void *), void *arg)
{
	*aio = calloc(1, sizeof(nng_aio));
	(*aio)->callback = callback;
	(*aio)->arg = arg;
	return 0;
}

bool nng_aio_busy(nng_aio *aio)
{
	lock(&tasks_lock);
	bool busy = aio->busy > 0;
	pthread_mutex_unlock(&tasks_lock);
	return busy;
}

void nng_aio_wait(nng_aio *aio)
{
	lock(&tasks_lock);
	while (aio->busy > 0)
		pthread_cond_wait(&task_done, &tasks_lock);
	pthread_mutex_unlock(&tasks_lock);
}

/* As there: the aio is no longer busy, its result stays 0, and the library still holds it. */
void nng_aio_cancel(nng_aio *aio)
{
	lock(&tasks_lock);
	if (aio->prepared) {
		aio->prepared = false;
		if (--aio->busy == 0)
			pthread_cond_broadcast(&task_done);
	}
	pthread_mutex_unlock(&tasks_lock);
}

void nng_aio_stop(nng_aio *aio)
{
	lock(&tasks_lock);
	aio->stopped = true;
	pthread_mutex_unlock(&tasks_lock);
	nng_aio_cancel(aio);
	nng_aio_wait(aio);
}

/* The real library would write to freed memory some day; this one says so now. */
void nng_aio_free(nng_aio *aio)
{
	if (aio == NULL)
		return;
	nng_aio_cancel(aio);
	nng_aio_wait(aio);
	if (__atomic_load_n(&aio->receiving, __ATOMIC_SEQ_CST) || __atomic_load_n(&aio->unacknowledged, __ATOMIC_SEQ_CST))
		panic("nng_aio_free: the library still holds this aio", "");
	free(aio);
}

int nng_aio_result(nng_aio *aio) { return aio->result; }
nng_msg *nng_aio_get_msg(nng_aio *aio) { return aio->msg; }
void nng_aio_set_msg(nng_aio *aio, nng_msg *msg) { aio->msg = msg; }

/* -- messages ------------------------------------------------------------------------------------------------- */

static void set(nng_mqtt_topic *field, const void *bytes, size_t length)
{
	free(field->buf);
	field->buf = malloc(length + 1);
	field->length = (uint32_t) length;
	memcpy(field->buf, bytes, length);
	field->buf[length] = 0;
}

static void add(nng_mqtt_topic *to, const void *bytes, size_t length)
{
	to->buf = realloc(to->buf, to->length + length + 1);
	memcpy(to->buf + to->length, bytes, length);
	to->length += (uint32_t) length;
}

static void add_u16(nng_mqtt_topic *to, unsigned value)
{
	add(to, (uint8_t[]) { (uint8_t) (value >> 8), (uint8_t) value }, 2);
}

static void add_string(nng_mqtt_topic *to, const nng_mqtt_topic *string)
{
	add_u16(to, string->length);
	add(to, string->buf, string->length);
}

int nng_mqtt_msg_alloc(nng_msg **msg, size_t size)
{
	(void) size;
	*msg = calloc(1, sizeof(nng_msg));
	(*msg)->refs = 1;
	(*msg)->level = 4;
	(*msg)->keep_alive = 30;
	(*msg)->connect_flags = 2;
	return 0;
}

static nng_msg *keep(nng_msg *msg)
{
	__atomic_add_fetch(&msg->refs, 1, __ATOMIC_SEQ_CST);
	return msg;
}

void nng_msg_free(nng_msg *msg)
{
	if (msg == NULL || __atomic_sub_fetch(&msg->refs, 1, __ATOMIC_SEQ_CST) > 0)
		return;
	nng_mqtt_topic *own[] = { &msg->client, &msg->will_topic, &msg->will, &msg->user, &msg->password, &msg->topic, &msg->payload };
	for (size_t i = 0; !msg->from_wire && i < sizeof own / sizeof *own; i++)
		free(own[i]->buf);
	for (uint32_t i = 0; msg->filters != NULL && i < msg->count; i++)
		free(msg->filters[i].buf);
	free(msg->filters);
	free(msg->options);
	free(msg->wire.buf);
	memset(msg, 0xa5, sizeof *msg); /* whoever uses it still is found out */
	free(msg);
}

void nng_mqtt_msg_set_packet_type(nng_msg *msg, int type) { msg->type = type; }
int nng_mqtt_msg_get_packet_type(nng_msg *msg) { return msg->type; }
void nng_mqtt_msg_set_connect_proto_version(nng_msg *msg, uint8_t level) { msg->level = level; }
void nng_mqtt_msg_set_connect_keep_alive(nng_msg *msg, uint16_t seconds) { msg->keep_alive = seconds; }
void nng_mqtt_msg_set_connect_client_id(nng_msg *msg, const char *id) { set(&msg->client, id, strlen(id)); }
void nng_mqtt_msg_set_connect_user_name(nng_msg *msg, const char *name) { set(&msg->user, name, strlen(name)); }
void nng_mqtt_msg_set_connect_password(nng_msg *msg, const char *password) { set(&msg->password, password, strlen(password)); }
void nng_mqtt_msg_set_connect_will_topic(nng_msg *msg, const char *topic) { set(&msg->will_topic, topic, strlen(topic)); }
void nng_mqtt_msg_set_connect_will_msg(nng_msg *msg, uint8_t *bytes, uint32_t length) { set(&msg->will, bytes, length); }
static void set_flag(nng_msg *msg, unsigned bits, unsigned mask) { msg->connect_flags = (uint8_t) ((msg->connect_flags & ~mask) | (bits & mask)); }
void nng_mqtt_msg_set_connect_clean_session(nng_msg *msg, bool clean) { set_flag(msg, clean ? 2 : 0, 2); }
void nng_mqtt_msg_set_connect_will_retain(nng_msg *msg, bool retain) { set_flag(msg, retain ? 0x20 : 0, 0x20); }
void nng_mqtt_msg_set_connect_will_qos(nng_msg *msg, uint8_t qos) { set_flag(msg, (unsigned) qos << 3, 0x18); }
uint8_t nng_mqtt_msg_get_connack_return_code(nng_msg *msg) { return msg->return_code; }
uint8_t nng_mqtt_msg_get_connack_flags(nng_msg *msg) { return msg->connect_flags; }
uint16_t nng_mqtt_msg_get_puback_packet_id(nng_msg *msg) { return msg->id; }
int nng_mqtt_msg_set_publish_topic(nng_msg *msg, const char *topic) { set(&msg->topic, topic, strlen(topic)); return 0; }
void nng_mqtt_msg_set_publish_payload(nng_msg *msg, uint8_t *bytes, uint32_t length) { set(&msg->payload, bytes, length); }
void nng_mqtt_msg_set_publish_qos(nng_msg *msg, uint8_t qos) { msg->qos = qos; }
void nng_mqtt_msg_set_publish_retain(nng_msg *msg, bool on) { msg->flags = (uint8_t) ((msg->flags & ~1) | on); }
void nng_mqtt_msg_set_publish_dup(nng_msg *msg, bool on) { msg->flags = (uint8_t) ((msg->flags & ~8) | on << 3); }
uint8_t nng_mqtt_msg_get_publish_qos(nng_msg *msg) { return msg->qos; }
bool nng_mqtt_msg_get_publish_retain(nng_msg *msg) { return msg->flags & 1; }
bool nng_mqtt_msg_get_publish_dup(nng_msg *msg) { return (msg->flags & 8) != 0; }
const char *nng_mqtt_msg_get_publish_topic(nng_msg *msg, uint32_t *length) { *length = msg->topic.length; return (const char *) msg->topic.buf; }
uint8_t *nng_mqtt_msg_get_publish_payload(nng_msg *msg, uint32_t *length) { *length = msg->payload.length; return msg->payload.length ? msg->payload.buf : NULL; }
uint8_t *nng_mqtt_msg_get_suback_return_codes(nng_msg *msg, uint32_t *count) { *count = msg->count; return msg->codes; }

void nng_mqtt_msg_set_subscribe_topics(nng_msg *msg, nng_mqtt_topic_qos *topics, uint32_t count)
{
	msg->filters = calloc(count, sizeof *msg->filters);
	msg->options = calloc(count, 1);
	for (msg->count = 0; msg->count < count; msg->count++) {
		set(&msg->filters[msg->count], topics[msg->count].topic.buf, topics[msg->count].topic.length);
		msg->options[msg->count] = topics[msg->count].qos;
	}
}

/* As there: the length given is not looked at, a zero byte ends each. */
void nng_mqtt_msg_set_unsubscribe_topics(nng_msg *msg, nng_mqtt_topic *topics, uint32_t count)
{
	msg->filters = calloc(count, sizeof *msg->filters);
	for (msg->count = 0; msg->count < count; msg->count++)
		set(&msg->filters[msg->count], topics[msg->count].buf, strlen((char *) topics[msg->count].buf));
}

/*
 * As there: no keepalive becomes 60 s, no client identifier one of its own, empty user names and passwords are
 * left out, and a will without a payload gives a packet that breaks off.
 */
static size_t encode_connect(nng_msg *msg, nng_mqtt_topic *body)
{
	nng_mqtt_topic *fields[] = { &msg->will_topic, &msg->will, &msg->user, &msg->password };
	static const uint8_t flag[] = { 4, 4, 0x80, 0x40 };
	if (msg->client.length == 0)
		set(&msg->client, "nanomq-00000001", 15);
	if (msg->keep_alive == 0)
		msg->keep_alive = 60;
	size_t length = 12 + msg->client.length;
	for (int i = 0; i < 4; i++)
		if (fields[i]->length > 0) {
			msg->connect_flags |= flag[i];
			length += 2 + fields[i]->length;
		}
	add(body, "\0\4MQTT", 6);
	add(body, (uint8_t[]) { msg->level, msg->connect_flags }, 2);
	add_u16(body, msg->keep_alive);
	add_string(body, &msg->client);
	for (int i = 0; i < 4 && (fields[i]->length > 0 || !(msg->connect_flags & flag[i])); i++)
		if (fields[i]->length > 0)
			add_string(body, fields[i]);
	return length;
}

static void encode(nng_msg *msg)
{
	static const uint8_t low[16] = { [PUBREL] = 2, [SUBSCRIBE] = 2, [UNSUBSCRIBE] = 2 };
	nng_mqtt_topic body = { 0, NULL };
	uint8_t flags = low[msg->type & 15];
	size_t length = 0;
	if (msg->type == CONNECT)
		length = encode_connect(msg, &body);
	else if (msg->type == PUBLISH) {
		flags = (uint8_t) (msg->flags | msg->qos << 1);
		add_string(&body, &msg->topic);
		if (msg->qos > 0)
			add_u16(&body, msg->id);
		add(&body, msg->payload.buf, msg->payload.length);
	} else
		add_u16(&body, msg->id);
	for (uint32_t i = 0; msg->filters != NULL && i < msg->count; i++) {
		add_string(&body, &msg->filters[i]);
		if (msg->type == SUBSCRIBE)
			add(&body, &msg->options[i], 1);
	}
	if (length == 0)
		length = body.length;
	msg->wire.length = 0;
	add(&msg->wire, (uint8_t[]) { (uint8_t) (msg->type << 4 | flags) }, 1);
	do {
		uint8_t digit = length % 128;
		length /= 128;
		add(&msg->wire, (uint8_t[]) { (uint8_t) (digit | (length > 0 ? 0x80 : 0)) }, 1);
	} while (length > 0);
	add(&msg->wire, body.buf, body.length);
	free(body.buf);
}

static nng_msg *decoded(uint8_t first, const uint8_t *bytes, uint32_t length)
{
	nng_msg *msg;
	nng_mqtt_msg_alloc(&msg, 0);
	msg->from_wire = true;
	msg->type = first >> 4;
	add(&msg->wire, bytes, length);
	uint8_t *body = msg->wire.buf;
	if (msg->type == CONNACK && length >= 2) {
		msg->connect_flags = body[0];
		msg->return_code = body[1];
	} else if (msg->type == PUBLISH && length >= 2) {
		uint32_t at = 2 + ((uint32_t) body[0] << 8 | body[1]);
		msg->flags = first & 9;
		msg->qos = first >> 1 & 3;
		msg->topic = (nng_mqtt_topic) { at - 2, body + 2 };
		if (at + 2 <= length && msg->qos > 0) {
			msg->id = (uint16_t) (body[at] << 8 | body[at + 1]);
			at += 2;
		}
		if (at <= length)
			msg->payload = (nng_mqtt_topic) { length - at, body + at };
	} else if (length >= 2) {
		msg->id = (uint16_t) (body[0] << 8 | body[1]);
		msg->codes = body + 2;
		msg->count = length - 2;
	}
	return msg;
}

/* -- queues and the wire -------------------------------------------------------------------------------------- */

static void note(struct sock *s, const char *format, ...)
{
	char line[128];
	va_list values;
	if (s->log < 0)
		return;
	va_start(values, format);
	int length = vsnprintf(line, sizeof line - 1, format, values);
	va_end(values);
	line[length] = '\n';
	if (write(s->log, line, (size_t) length + 1) < 0)
		perror("TESAIOT_STUB_LOG");
}

static bool put(queue *q, nng_msg *msg)
{
	if (q->count == QUEUE)
		return false;
	q->slots[(q->first + q->count++) % QUEUE] = msg;
	return true;
}

static nng_msg *take(queue *q)
{
	if (q->count == 0)
		return NULL;
	nng_msg *msg = q->slots[q->first];
	q->first = (q->first + 1) % QUEUE;
	q->count--;
	return msg;
}

/* As there, from here on: `aio` is written to when the answer comes, whatever its owner did meanwhile. */
static void remember(struct sock *s, nng_msg *msg, nng_aio *aio, bool by_sendmsg)
{
	nng_msg_free(s->unacked[msg->id]);
	s->unacked[msg->id] = keep(msg);
	msg->by_sendmsg = by_sendmsg;
	msg->aio = by_sendmsg && msg->type == PUBLISH ? NULL : aio;
	if (msg->aio != NULL)
		__atomic_store_n(&aio->unacknowledged, true, __ATOMIC_SEQ_CST);
}

/* The aio, if any, that waits for the answer to packet `id`. */
static nng_aio *forget(struct sock *s, uint16_t id)
{
	nng_msg *msg = s->unacked[id];
	if (msg == NULL)
		return NULL;
	nng_aio *aio = msg->aio;
	s->unacked[id] = NULL;
	nng_msg_free(msg);
	if (aio != NULL)
		__atomic_store_n(&aio->unacknowledged, false, __ATOMIC_SEQ_CST);
	return aio;
}

/* The connection is up. As there: one packet is being sent, 256 wait, and the oldest of them is lost to a new one. */
static int transmit(struct sock *s, nng_msg *msg, nng_aio *aio, bool by_sendmsg)
{
	if (msg->type == CONNECT) {
		if (s->connect != msg) {
			nng_msg_free(s->connect);
			s->connect = msg;
		}
		keep(msg);
		s->keep_alive = msg->keep_alive;
	} else if ((msg->type == PUBLISH && msg->qos > 0) || msg->type == SUBSCRIBE || msg->type == UNSUBSCRIBE)
		remember(s, msg, aio, by_sendmsg);
	else if (msg->type != PUBLISH && (msg->type < PUBACK || msg->type > PUBCOMP) && msg->type != PINGREQ)
		return EPROTONG; /* DISCONNECT too; the message stays the caller's */
	if (s->wire == NULL && !s->writing) {
		s->wire = msg;
		pthread_cond_broadcast(&s->changed);
	} else if (!put(&s->sending, msg)) {
		nng_msg *oldest = take(&s->sending);
		note(s, "dropped %d %u", oldest->type, oldest->id);
		nng_msg_free(oldest);
		put(&s->sending, msg);
	}
	return msg->type == SUBSCRIBE || msg->type == UNSUBSCRIBE ? -1 : 0;
}

static void answer(struct sock *s, int type, uint16_t id)
{
	nng_msg *msg;
	nng_mqtt_msg_alloc(&msg, 0);
	msg->type = type;
	msg->id = id;
	encode(msg);
	transmit(s, msg, NULL, false);
}

static bool write_all(int fd, const uint8_t *bytes, size_t length)
{
	while (length > 0) {
		ssize_t done = send(fd, bytes, length, MSG_NOSIGNAL);
		if (done <= 0)
			return false;
		bytes += done;
		length -= (size_t) done;
	}
	return true;
}

static void sent_publish(struct sock *s, nng_msg *msg)
{
	note(s, "publish %u %u", msg->id, msg->wire.buf[0] >> 1 & 3);
	s->sent++;
	s->sent_here++;
	if (s->sent == s->faults.abort_after)
		panic("pthread_mutex_lock: ", strerror(EINVAL));
	if (s->sent_here == s->faults.drop_after)
		shutdown(s->fd, SHUT_RDWR);
}

static void *sender(void *arg)
{
	struct sock *s = arg;
	lock(&s->lock);
	while (!s->ended) {
		if (!s->ready || (s->wire == NULL && !s->ping_due)) {
			pthread_cond_wait(&s->changed, &s->lock);
			continue;
		}
		nng_msg *msg = s->ping_due ? NULL : s->wire;
		int fd = s->fd;
		s->writing = true;
		if (msg == NULL)
			s->ping_due = false;
		else
			s->wire = NULL;
		pthread_mutex_unlock(&s->lock);
		if (msg != NULL && s->faults.send_delay > 0)
			usleep((useconds_t) s->faults.send_delay);
		bool done = msg == NULL ? write_all(fd, (const uint8_t *) "\xc0", 2) : write_all(fd, msg->wire.buf, msg->wire.length);
		lock(&s->lock);
		s->writing = false;
		pthread_cond_broadcast(&s->changed);
		if (msg == NULL) {
			if (s->wire == NULL)
				s->wire = take(&s->sending);
			continue; /* a PINGREQ is no send that completes */
		}
		if (done && s->ready) {
			s->idle = 0;
			if (msg->type == PUBLISH)
				sent_publish(s, msg);
			s->wire = take(&s->sending);
			pthread_mutex_unlock(&s->lock);
			if (s->send_cb != NULL)
				s->send_cb(NULL, s->send_arg);
			lock(&s->lock);
		}
		nng_msg_free(msg);
	}
	pthread_mutex_unlock(&s->lock);
	return NULL;
}

/* -- what comes in -------------------------------------------------------------------------------------------- */

static nng_aio *next_receiver(struct sock *s)
{
	nng_aio *aio = s->first_receiver;
	if (aio != NULL) {
		if ((s->first_receiver = aio->next) == NULL)
			s->last_receiver = &s->first_receiver;
		__atomic_store_n(&aio->receiving, false, __ATOMIC_SEQ_CST);
	}
	return aio;
}

/* The receiver to complete once the lock is released; NULL: it waits in the queue, or nobody will have it. */
static nng_aio *deliver(struct sock *s, nng_msg *msg)
{
	nng_aio *aio = next_receiver(s);
	if (aio != NULL) {
		aio->msg = msg;
		return aio;
	}
	if (!put(&s->received, msg)) {
		nng_msg_free(take(&s->received));
		put(&s->received, msg);
		note(s, "received_dropped");
		fputs("Warning! msg lost due to busy socket\n", stderr);
	}
	return NULL;
}

/* As there: an ack that comes while the callback runs waits until nng_recv_aio is called with the same aio. */
static void acknowledged(struct sock *s, nng_msg *msg)
{
	long number = ++s->acks;
	if ((s->faults.lose_ack > 0 && number % s->faults.lose_ack == 0) || (s->faults.lose_all_acks_after >= 0 && number > s->faults.lose_all_acks_after)) {
		note(s, "ack_lost %u", msg->id);
		nng_msg_free(msg);
	} else if (s->ack_aio == NULL)
		nng_msg_free(msg);
	else if (!nng_aio_busy(s->ack_aio))
		finish(s->ack_aio, 0, msg, false);
	else if (!put(&s->acked, msg))
		note(s, "ack_lost %u", msg->id);
}

static void handle(struct sock *s, nng_msg *msg)
{
	nng_aio *aio = NULL;
	int type = msg->type;
	bool delivered = false, lost = s->faults.no_connack || (s->faults.lose_refusal && msg->return_code != 0);
	lock(&s->lock);
	s->idle = s->pings = 0;
	if (type == CONNACK && !lost) {
		keep(msg); /* for the connect callback; As there: leaked where there is none */
		if (s->ack_aio != NULL && !nng_aio_busy(s->ack_aio))
			finish(s->ack_aio, 0, keep(msg), false);
		aio = deliver(s, msg);
	} else if (type == PUBACK || type == PUBCOMP) {
		forget(s, msg->id);
		acknowledged(s, msg);
	} else if (type == SUBACK || type == UNSUBACK) {
		if ((aio = forget(s, msg->id)) != NULL)
			aio->msg = msg;
		else
			nng_msg_free(msg);
	} else if (type == PUBLISH && msg->qos == 2) {
		nng_msg_free(s->unreleased[msg->id]);
		s->unreleased[msg->id] = msg;
		answer(s, PUBREC, msg->id);
	} else if (type == PUBLISH) {
		if (msg->qos == 1)
			answer(s, PUBACK, msg->id); /* before anybody has the message */
		delivered = true;
		if (s->first_receiver != NULL || s->recv_cb == NULL)
			aio = deliver(s, msg);
	} else if (type == PUBREL) {
		nng_msg *released = s->unreleased[msg->id];
		s->unreleased[msg->id] = NULL;
		if (released != NULL) { /* As there: a PUBREL of something unknown gets no PUBCOMP */
			answer(s, PUBCOMP, msg->id);
			aio = deliver(s, released);
		}
		nng_msg_free(msg);
	} else {
		if (type == PUBREC)
			answer(s, PUBREL, msg->id);
		nng_msg_free(msg);
	}
	pthread_mutex_unlock(&s->lock);
	if (aio != NULL)
		finish(aio, 0, NULL, false);
	if (type == CONNACK && !lost && s->connect_cb != NULL)
		s->connect_cb(msg, s->connect_arg);
	if (delivered && s->recv_cb != NULL)
		s->recv_cb(msg, s->recv_arg);
}

static int64_t now_us(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000LL + now.tv_nsec / 1000;
}

static void timer(struct sock *s)
{
	lock(&s->lock);
	s->idle += TIMER_SECONDS;
	if (s->connect != NULL && s->idle >= s->keep_alive) {
		if (s->pings > 1)
			shutdown(s->fd, SHUT_RDWR);
		s->ping_due = true;
		s->idle = 0;
		s->pings++;
		pthread_cond_broadcast(&s->changed);
	}
	pthread_mutex_unlock(&s->lock);
}

static void read_until_closed(struct sock *s, int fd)
{
	nng_mqtt_topic in = { 0, NULL };
	uint8_t chunk[65536];
	int64_t due = now_us() + TIMER_SECONDS * 1000000LL;
	for (;;) {
		int64_t left = due - now_us();
		if (left <= 0) {
			timer(s);
			due += TIMER_SECONDS * 1000000LL;
			continue;
		}
		struct pollfd waiting = { .fd = fd, .events = POLLIN };
		if (poll(&waiting, 1, (int) (left / 1000 + 1)) <= 0)
			continue;
		ssize_t count = recv(fd, chunk, sizeof chunk, 0);
		if (count <= 0)
			break;
		add(&in, chunk, (size_t) count);
		uint32_t at = 0;
		for (;;) {
			uint32_t length = 0, digit = 1;
			while (digit < 5 && at + digit < in.length) {
				length |= (in.buf[at + digit] & 127u) << (7 * (digit - 1));
				if (!(in.buf[at + digit++] & 128))
					break;
			}
			if (digit == 1 || (in.buf[at + digit - 1] & 128) || at + digit + length > in.length)
				break;
			handle(s, decoded(in.buf[at], in.buf + at + digit, length));
			at += digit + length;
		}
		memmove(in.buf, in.buf + at, in.length - at);
		in.length -= at;
	}
	free(in.buf);
}

/* -- connections ---------------------------------------------------------------------------------------------- */

static bool readable(const char *path, const char *marker)
{
	char text[65536];
	int fd = path == NULL ? -1 : open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
	if (fd >= 0)
		close(fd);
	if (length < 0)
		return false;
	text[length] = 0;
	return strstr(text, marker) != NULL && strstr(text, "ENCRYPTED") == NULL; /* As there: the key's password is not used */
}

/* A connected TCP socket, or -1 when the time for a handshake is over. */
static int attempt(struct sock *s)
{
	int timeout = (int) conf.qconnect_timeout * 1000;
	struct addrinfo *address = NULL, hints = { .ai_family = AF_INET, .ai_socktype = SOCK_STREAM };
	if (s->faults.no_handshake || (conf.tls.enable && !readable(conf.tls.cafile, "BEGIN CERTIFICATE"))) {
		poll(NULL, 0, timeout);
		return -1;
	}
	if (getaddrinfo(s->host, s->port, &hints, &address) != 0)
		return -1;
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), error = 0;
	socklen_t size = sizeof error;
	struct pollfd connecting = { .fd = fd, .events = POLLOUT };
	bool done = connect(fd, address->ai_addr, address->ai_addrlen) == 0
	    || (errno == EINPROGRESS && poll(&connecting, 1, timeout) == 1 && getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) == 0 && error == 0);
	freeaddrinfo(address);
	if (!done) {
		close(fd);
		return -1;
	}
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int) { 1 }, sizeof(int));
	return fd;
}

static void up(struct sock *s, int fd)
{
	nng_aio *aio;
	int result = 0;
	lock(&s->lock);
	note(s, "connected");
	s->fd = fd;
	s->ready = true;
	s->sent_here = 0;
	if (s->connect != NULL)
		transmit(s, s->connect, NULL, false);
	if ((aio = s->parked) != NULL) {
		s->parked = NULL;
		result = transmit(s, aio->msg, aio, false);
	}
	pthread_cond_broadcast(&s->changed);
	pthread_mutex_unlock(&s->lock);
	if (aio != NULL)
		finish(aio, result, NULL, false);
}

static void down(struct sock *s, int fd)
{
	nng_aio *aio;
	shutdown(fd, SHUT_RDWR);
	lock(&s->lock);
	note(s, "disconnected");
	s->ready = s->ping_due = false;
	while (s->writing)
		pthread_cond_wait(&s->changed, &s->lock);
	close(fd);
	nng_msg_free(s->wire);
	s->wire = NULL;
	s->idle = s->pings = 0;
	for (nng_msg *msg; (msg = take(&s->received)) != NULL;)
		nng_msg_free(msg);
	for (uint32_t id = 0; id < 65536; id++) {
		nng_msg *msg = s->unacked[id];
		/* As there: the aio of nng_sendmsg is long gone, and a second completion goes where it was. */
		if (msg != NULL && msg->by_sendmsg && msg->type == PUBLISH && s->faults.abort_on_loss)
			panic("pthread_mutex_lock: ", strerror(EINVAL));
		if ((aio = forget(s, (uint16_t) id)) != NULL)
			finish(aio, ECLOSED, NULL, false); /* As there: of a PUBLISH for the second time */
		nng_msg_free(s->unreleased[id]);
		s->unreleased[id] = NULL;
	}
	/* As there: with the lock held, so that whoever calls the library from this callback or this aio's aborts. */
	if (s->disconnect_cb != NULL)
		s->disconnect_cb(NULL, s->disconnect_arg);
	for (int count = 0; (aio = next_receiver(s)) != NULL; count++)
		finish(aio, count == 0 ? ECONNSHUT : ECLOSED, NULL, count == 0);
	pthread_mutex_unlock(&s->lock);
}

static void *network(void *arg)
{
	struct sock *s = arg;
	for (bool over = false; !over;) {
		int fd = attempt(s);
		if (fd >= 0) {
			up(s, fd);
			read_until_closed(s, fd);
			down(s, fd);
		}
		lock(&s->lock);
		if (fd < 0)
			note(s, "failed");
		over = s->ended = s->closed;
		pthread_cond_broadcast(&s->changed);
		pthread_mutex_unlock(&s->lock);
		if (!over)
			usleep((useconds_t) s->faults.retry);
	}
	return NULL;
}

static long number(const char *name, long otherwise)
{
	const char *text = getenv(name);
	return text == NULL || *text == 0 ? otherwise : atol(text);
}

static struct faults faults_told(void)
{
	const char *once = getenv("TESAIOT_STUB_ONCE");
	struct faults none = { .lose_all_acks_after = -1, .hang_after = -1, .retry = 1000000 };
	if (once != NULL && *once != 0) {
		int fd = open(once, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
		if (fd < 0)
			return none;
		close(fd);
	}
	return (struct faults) {
		.lose_ack = number("TESAIOT_STUB_LOSE_ACK", 0),
		.lose_all_acks_after = number("TESAIOT_STUB_LOSE_ALL_ACKS_AFTER", -1),
		.lose_refusal = number("TESAIOT_STUB_LOSE_REFUSAL", 0),
		.no_connack = number("TESAIOT_STUB_NO_CONNACK", 0),
		.no_handshake = number("TESAIOT_STUB_NO_HANDSHAKE", 0),
		.drop_after = number("TESAIOT_STUB_DROP_AFTER", 0),
		.abort_after = number("TESAIOT_STUB_ABORT_AFTER", 0),
		.abort_on_loss = number("TESAIOT_STUB_ABORT_ON_LOSS", 0),
		.abort_on_close = number("TESAIOT_STUB_ABORT_ON_CLOSE", 0),
		.hang_after = number("TESAIOT_STUB_HANG_AFTER", -1),
		.hang_on_close = number("TESAIOT_STUB_HANG_ON_CLOSE", 0),
		.hang_on_open = number("TESAIOT_STUB_HANG_ON_OPEN", 0),
		.send_delay = number("TESAIOT_STUB_SEND_DELAY", 0),
		.retry = number("TESAIOT_STUB_RETRY", none.retry),
	};
}

/* -- sockets -------------------------------------------------------------------------------------------------- */

static struct sock *found(uint32_t id)
{
	lock(&sockets_lock);
	struct sock *s = id > 0 && id <= SOCKETS ? sockets[id - 1] : NULL;
	pthread_mutex_unlock(&sockets_lock);
	return s;
}

/* As there: returns 0 whatever becomes of the handshake; what it finds at once is only a bad key. */
int nng_mqtt_quic_client_open_conf(nng_socket *socket, const char *url, conf_quic *settings)
{
	const void *api;
	const char *log = getenv("TESAIOT_STUB_LOG"), *host = strstr(url, "://");
	struct sock *s = calloc(1, sizeof *s);
	pthread_mutexattr_t checked;
	s->faults = faults_told();
	while (s->faults.hang_on_open)
		pause();
	conf = *settings;
	if (MsQuicOpenVersion(2, &api) != 0 || host == NULL || sscanf(host + 3, "%255[^:/]:%15[0-9]", s->host, s->port) != 2
	    || (conf.tls.enable && (!readable(conf.tls.certfile, "BEGIN CERTIFICATE") || !readable(conf.tls.keyfile, "PRIVATE KEY")))) {
		MsQuicClose(api);
		free(s);
		return -1;
	}
	pthread_mutexattr_init(&checked);
	pthread_mutexattr_settype(&checked, PTHREAD_MUTEX_ERRORCHECK);
	pthread_mutex_init(&s->lock, &checked);
	pthread_cond_init(&s->changed, NULL);
	s->next_id = 1;
	s->last_receiver = &s->first_receiver;
	s->log = log == NULL || *log == 0 ? -1 : open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
	lock(&sockets_lock);
	while (s->id < SOCKETS && sockets[s->id] != NULL)
		s->id++;
	if (s->id == SOCKETS)
		panic("more sockets than this library has room for", "");
	sockets[s->id] = s;
	socket->id = ++s->id;
	pthread_mutex_unlock(&sockets_lock);
	note(s, "open");
	start(sender, s);
	start(network, s);
	return 0;
}

int nng_mqtt_quic_client_open(nng_socket *socket, const char *url)
{
	conf_quic settings = { .qkeepalive = 30, .qconnect_timeout = 60, .qdiscon_timeout = 30, .qidle_timeout = 30 };
	return nng_mqtt_quic_client_open_conf(socket, url, &settings);
}

/* Not in the library: as if the keepalive timer had fired once more. */
void stub_timer(nng_socket socket)
{
	timer(found(socket.id));
}

/* As there: without a connection it waits until the next attempt is over, and then until that connection ends. */
int nng_close(nng_socket socket)
{
	struct sock *s = found(socket.id);
	if (s == NULL)
		return ECLOSED;
	if (s->faults.abort_on_close)
		panic("pthread_mutex_lock: ", strerror(EINVAL));
	while (s->faults.hang_on_close)
		pause();
	lock(&s->lock);
	s->closed = true;
	for (nng_aio *aio; (aio = next_receiver(s)) != NULL;)
		finish(aio, ECLOSED, NULL, false);
	for (nng_msg *msg; (msg = take(&s->sending)) != NULL;)
		nng_msg_free(msg);
	if (s->ready)
		shutdown(s->fd, SHUT_RDWR);
	while (!s->ended)
		pthread_cond_wait(&s->changed, &s->lock);
	note(s, "close");
	pthread_mutex_unlock(&s->lock);
	lock(&sockets_lock);
	sockets[socket.id - 1] = NULL; /* the memory stays: its threads may still look at it */
	pthread_mutex_unlock(&sockets_lock);
	return 0;
}

static int set_callback(nng_socket *socket, size_t at_cb, size_t at_arg, event_cb cb, void *arg)
{
	struct sock *s = found(socket->id);
	if (s == NULL)
		return -1;
	*(event_cb *) ((char *) s + at_cb) = cb;
	*(void **) ((char *) s + at_arg) = arg;
	return 0;
}

#define CALLBACK(name, cb, arg) \
	int nng_mqtt_quic_set_##name(nng_socket *s, event_cb f, void *a) { return set_callback(s, offsetof(struct sock, cb), offsetof(struct sock, arg), f, a); }
CALLBACK(connect_cb, connect_cb, connect_arg)
CALLBACK(disconnect_cb, disconnect_cb, disconnect_arg)
CALLBACK(msg_recv_cb, recv_cb, recv_arg)
CALLBACK(msg_send_cb, send_cb, send_arg)

/* As there: the callback is given the aio, and `arg` cannot be had back. */
int nng_mqtt_quic_ack_callback_set(nng_socket *socket, void (*callback)(void *), void *arg)
{
	struct sock *s = found(socket->id);
	(void) arg;
	if (s == NULL)
		return -1;
	nng_aio_alloc(&s->ack_aio, callback, NULL);
	s->ack_aio->arg = s->ack_aio;
	return 0;
}

/* As there: what cannot go out now is freed and "busy" (not a PUBLISH: 256 of those wait, and will get no ack). */
static int send_offline(struct sock *s, nng_msg *msg, nng_aio *aio)
{
	if (msg->type == CONNECT && s->parked == NULL) {
		s->parked = aio;
		return -1;
	}
	aio->msg = NULL;
	if (msg->type == PUBLISH) {
		msg->qos = 0; /* it is encoded already: what it says on the wire stays */
		if (put(&s->sending, msg))
			return 0;
	}
	nng_msg_free(msg);
	return EBUSYNG;
}

static void send_with(struct sock *s, nng_aio *aio, bool by_sendmsg)
{
	nng_msg *msg = aio->msg;
	if (!begin(aio))
		return;
	lock(&s->lock);
	if (msg->type == PUBLISH && s->called++ == s->faults.hang_after) {
		pthread_mutex_unlock(&s->lock);
		for (;;)
			pause();
	}
	if (s->closed) {
		pthread_mutex_unlock(&s->lock);
		nng_msg_free(msg);
		finish(aio, ECLOSED, NULL, false);
		return;
	}
	if ((msg->type == PUBLISH && msg->qos > 0) || msg->type == SUBSCRIBE || msg->type == UNSUBSCRIBE) {
		msg->id = (uint16_t) s->next_id;
		s->next_id = s->next_id % 65535 + 1;
	}
	encode(msg);
	note(s, "send %d %u", msg->type, msg->id);
	int result = s->ready ? transmit(s, msg, aio, by_sendmsg) : send_offline(s, msg, aio);
	pthread_mutex_unlock(&s->lock);
	if (result >= 0)
		finish(aio, result, NULL, false);
}

void nng_send_aio(nng_socket socket, nng_aio *aio)
{
	struct sock *s = found(socket.id);
	if (s != NULL && aio->msg != NULL)
		send_with(s, aio, false);
	else if (begin(aio))
		finish(aio, s == NULL ? ECLOSED : EINVALID, NULL, false);
}

int nng_sendmsg(nng_socket socket, nng_msg *msg, int flags)
{
	struct sock *s = found(socket.id);
	nng_aio aio = { .msg = msg };
	(void) flags;
	if (msg == NULL)
		return EINVALID;
	if (s == NULL)
		return ECLOSED;
	send_with(s, &aio, true);
	nng_aio_wait(&aio);
	return aio.result;
}

void nng_recv_aio(nng_socket socket, nng_aio *aio)
{
	struct sock *s = found(socket.id);
	nng_msg *msg;
	if (!begin(aio))
		return;
	if (s == NULL) {
		finish(aio, ECLOSED, NULL, false);
		return;
	}
	lock(&s->lock);
	if (s->ready && (s->closed || aio == s->ack_aio)) {
		int result = s->closed ? ECLOSED : (msg = take(&s->acked)) == NULL ? ECANCELLED : 0;
		pthread_mutex_unlock(&s->lock);
		finish(aio, result, result == 0 ? msg : NULL, false);
	} else if (s->ready && (msg = take(&s->received)) != NULL) {
		pthread_mutex_unlock(&s->lock);
		finish(aio, 0, msg, false);
	} else if (aio->receiving) {
		pthread_mutex_unlock(&s->lock);
		fputs("ERROR! former aio not finished!\n", stderr);
		aio->msg = NULL;
		finish(aio, EBUSYNG, NULL, false);
	} else { /* As there: the ack aio too, while there is no connection */
		__atomic_store_n(&aio->receiving, true, __ATOMIC_SEQ_CST);
		aio->next = NULL;
		*s->last_receiver = aio;
		s->last_receiver = &aio->next;
		pthread_mutex_unlock(&s->lock);
	}
}

int nng_recvmsg(nng_socket socket, nng_msg **msg, int flags)
{
	nng_aio aio = { .msg = NULL };
	(void) flags;
	nng_recv_aio(socket, &aio);
	nng_aio_wait(&aio);
	if (aio.result == 0)
		*msg = aio.msg;
	return aio.result;
}

const char *nng_version(void) { return "1.8.0"; }

const char *nng_strerror(int code)
{
	static const char *words[] = { [0] = "Hunky dory", [3] = "Invalid argument", [4] = "Resource busy", [7] = "Object closed", [9] = "Not supported", [13] = "Protocol error", [20] = "Operation canceled", [31] = "Connection shutdown" };
	return code >= 0 && code < 32 && words[code] != NULL ? words[code] : "Unknown error";
}
