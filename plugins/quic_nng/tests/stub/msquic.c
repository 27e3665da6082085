/* A libmsquic that nanosdk.c can be loaded against: it has the two functions, and there is no QUIC behind them. */

static const char table[] = "no QUIC here";

unsigned
MsQuicOpenVersion(unsigned version, const void **api)
{
	if (version != 2)
		return 22; /* QUIC_STATUS_INVALID_PARAMETER */
	*api = table;
	return 0;
}

void
MsQuicClose(const void *api)
{
	(void) api;
}
