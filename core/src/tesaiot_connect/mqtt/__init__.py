"""The MQTT engine: 3.1.1 and 5.0, client and server, sans-IO.

Bytes in, events out; messages in, bytes out. Rules of the room: no asyncio, socket, ssl, time
or pluggy; time is an argument (`now`, seconds of any monotonic clock); no input from the peer
raises anything but `ProtocolError`, loops, or allocates beyond the packet-size limit.
"""
