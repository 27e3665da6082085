/* A libnng as distributions have it: NNG without MQTT and without QUIC. */

#include <stddef.h>

const char *
nng_version(void)
{
	return "1.10.1";
}

const char *
nng_strerror(int code)
{
	return code == 0 ? "Hunky dory" : code == 9 ? "Not supported" : "Unknown error";
}

int
nng_stream_dialer_alloc(void **dialer, const char *url)
{
	(void) dialer;
	(void) url;
	return 9; /* NNG_ENOTSUP: no such scheme here */
}
