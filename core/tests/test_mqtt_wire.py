"""Packets against the bytes the standard asks for, so that encoding and decoding cannot be wrong together."""

from __future__ import annotations

import pytest
from engine_bytes import raw

from tesaiot_connect.errors import ProtocolError
from tesaiot_connect.message import Message, Properties
from tesaiot_connect.mqtt import codec, properties as t
from tesaiot_connect.mqtt.decoder import Acks, Decoder, Publishes
from tesaiot_connect.mqtt.flow import Flow, PeerLimits
from tesaiot_connect.mqtt.packets import (
    Auth,
    Connack,
    Connect,
    Disconnect,
    Ping,
    SubackPacket,
    Subscribe,
    Subscription,
    Unsubscribe,
    Will,
)
from tesaiot_connect.mqtt.properties import P
from tesaiot_connect.mqtt.reasons import R
from tesaiot_connect.mqtt.session import Session

CLIENT, SERVER = True, False


def decode(data, *, from_client, version=5, alias_maximum=0):
    """The one item these bytes hold; raises the ProtocolError they deserve."""
    decoder = Decoder(from_client=from_client, version=version, topic_alias_maximum=alias_maximum)
    items = decoder.feed(data)
    assert len(items) <= 1
    assert not items or decoder.buffered == 0
    if items and isinstance(items[0], ProtocolError):
        raise items[0]
    return items[0]


def published(message, *, version=5, server=False, aliases=0):
    flow = Flow(0, Session(), Decoder(from_client=server), send_buffer=1 << 20, server=server)
    flow.start(version, PeerLimits(topic_alias_maximum=aliases))
    assert flow.publish([message], [1]) == 1
    assert flow.refused == {}
    return flow.take()


CONNECT_V5 = raw(
    "10 45 | 0004 4d515454 05 f6 003c | 10 11 00000e10 21 0014 26 0001 6b 0002 7676"
    "| 0003 646576 | 10 01 01 02 0000003c 08 0001 72 18 00000005"
    "| 0003 612f62 0004 676f6e65 | 0002 6d65 | 0003 00ff10"
)
CONTROL = [
    pytest.param(
        CLIENT,
        5,
        codec.encode_connect,
        Connect(
            client_id="dev",
            keepalive=60,
            username="me",
            password=b"\x00\xff\x10",
            will=Will(
                Message(
                    "a/b",
                    b"gone",
                    2,
                    True,
                    Properties(payload_format=1, message_expiry=60, response_topic="r"),
                ),
                5,
            ),
            properties={P.SESSION_EXPIRY: 3600, P.RECEIVE_MAXIMUM: 20, P.USER: [("k", "vv")]},
        ),
        None,
        id="CONNECT 5 with everything",
    ),
    pytest.param(
        CLIENT,
        4,
        codec.encode_connect,
        Connect(client_id="c", version=4, clean_start=False, keepalive=10, will=Will(Message("w", b"x", 1))),
        raw("10 13 | 0004 4d515454 04 0c 000a | 0001 63 | 0001 77 0001 78"),
        id="CONNECT 3.1.1 with a will",
    ),
    pytest.param(
        CLIENT,
        4,
        codec.encode_connect,
        Connect(client_id="c", version=3),
        raw("10 0f | 0006 4d514973 6470 03 02 003c | 0001 63"),
        id="CONNECT 3.1",
    ),
    pytest.param(
        CLIENT,
        4,
        codec.encode_connect,
        Connect(client_id="b", version=4, bridge=True),
        raw("10 0d | 0004 4d515454 84 02 003c | 0001 62"),
        id="CONNECT of a bridge",
    ),
    pytest.param(
        SERVER,
        5,
        lambda one: codec.encode_connack(one, 5),
        Connack(session_present=True, properties={P.TOPIC_ALIAS_MAXIMUM: 10, P.MAXIMUM_QOS: 1}),
        raw("20 08 01 00 05 22000a 2401"),
        id="CONNACK 5",
    ),
    pytest.param(
        SERVER,
        5,
        lambda one: codec.encode_connack(one, 5),
        Connack(reason_code=R.USE_ANOTHER_SERVER, properties={P.SERVER_REFERENCE: "b:1"}),
        raw("20 09 00 9c 06 1c 0003 623a31"),
        id="CONNACK 5 that names another server",
    ),
    pytest.param(
        SERVER,
        4,
        lambda one: codec.encode_connack(one, 4),
        Connack(reason_code=R.NOT_AUTHORIZED),
        raw("20 02 00 05"),
        id="CONNACK 3.1.1",
    ),
    pytest.param(
        CLIENT,
        5,
        lambda one: codec.encode_subscribe(one, 5),
        Subscribe(
            packet_id=10,
            subscriptions=(
                Subscription("a/+", 2, no_local=True, retain_as_published=True, retain_handling=2),
                Subscription("$share/g/#", 0),
            ),
            properties={P.SUBSCRIPTION_ID: [300]},
        ),
        raw("82 19 000a 03 0b ac02 0003 612f2b 2e 000a 2473686172652f672f23 00"),
        id="SUBSCRIBE 5",
    ),
    pytest.param(
        CLIENT,
        4,
        lambda one: codec.encode_subscribe(one, 4),
        Subscribe(packet_id=1, subscriptions=(Subscription("#", 1),)),
        raw("82 06 0001 0001 23 01"),
        id="SUBSCRIBE 3.1.1",
    ),
    pytest.param(
        SERVER,
        5,
        lambda one: codec.encode_suback(0x90, one, 5),
        SubackPacket(packet_id=10, codes=b"\x02\x87", properties={P.REASON_STRING: "no"}),
        raw("90 0a 000a 05 1f 0002 6e6f 02 87"),
        id="SUBACK 5",
    ),
    pytest.param(
        SERVER,
        4,
        lambda one: codec.encode_suback(0x90, one, 4),
        SubackPacket(packet_id=10, codes=b"\x02\x80"),
        raw("90 04 000a 02 80"),
        id="SUBACK 3.1.1",
    ),
    pytest.param(
        CLIENT,
        5,
        lambda one: codec.encode_unsubscribe(one, 5),
        Unsubscribe(packet_id=11, filters=("a", "b/#"), properties={P.USER: [("", "")]}),
        raw("a2 10 000b 05 26 0000 0000 0001 61 0003 622f23"),
        id="UNSUBSCRIBE 5",
    ),
    pytest.param(
        CLIENT,
        4,
        lambda one: codec.encode_unsubscribe(one, 4),
        Unsubscribe(packet_id=11, filters=("a",)),
        raw("a2 05 000b 0001 61"),
        id="UNSUBSCRIBE 3.1.1",
    ),
    pytest.param(
        SERVER,
        5,
        lambda one: codec.encode_suback(0xB0, one, 5),
        SubackPacket(packet_id=11, codes=b"\x00\x11"),
        raw("b0 05 000b 00 00 11"),
        id="UNSUBACK 5",
    ),
    pytest.param(
        SERVER,
        4,
        lambda one: codec.encode_suback(0xB0, one, 4),
        SubackPacket(packet_id=11, codes=b""),
        raw("b0 02 000b"),
        id="UNSUBACK 3.1.1",
    ),
    pytest.param(
        CLIENT,
        5,
        lambda one: codec.encode_disconnect(one, 5),
        Disconnect(reason_code=4, properties={P.SESSION_EXPIRY: 1}),
        raw("e0 07 04 05 11 00000001"),
        id="DISCONNECT 5 with will",
    ),
    pytest.param(
        CLIENT, 5, lambda one: codec.encode_disconnect(one, 5), Disconnect(), raw("e0 00"), id="DISCONNECT 5"
    ),
    pytest.param(
        SERVER,
        5,
        lambda one: codec.encode_disconnect(one, 5),
        Disconnect(reason_code=0x8E),
        raw("e0 01 8e"),
        id="DISCONNECT 5 with a code alone",
    ),
    pytest.param(
        CLIENT,
        4,
        lambda one: codec.encode_disconnect(one, 4),
        Disconnect(),
        raw("e0 00"),
        id="DISCONNECT 3.1.1",
    ),
    pytest.param(
        CLIENT,
        5,
        codec.encode_auth,
        Auth(reason_code=0x18, properties={P.AUTH_METHOD: "S", P.AUTH_DATA: b"\x00\x01"}),
        raw("f0 0b 18 09 15 0001 53 16 0002 0001"),
        id="AUTH",
    ),
]


@pytest.mark.parametrize(("side", "version", "encode", "packet", "wire"), CONTROL)
def test_control_packets_match_the_standard(side, version, encode, packet, wire):
    wire = CONNECT_V5 if wire is None else wire
    assert encode(packet).hex(" ") == wire.hex(" ")
    assert decode(wire, from_client=side, version=version) == packet


def test_pings():
    assert decode(b"\xc0\x00", from_client=True) == Ping()
    assert decode(b"\xd0\x00", from_client=False) == Ping()


PUBLISHES = [
    (5, Message("a/b", b"hi"), "30 08 0003 612f62 00 6869"),
    (5, Message("a/b", b"", 0, True), "31 06 0003 612f62 00"),
    (5, Message("a/b", b"hi", 1), "32 0a 0003 612f62 0001 00 6869"),
    (5, Message("a/b", b"hi", 2, True), "35 0a 0003 612f62 0001 00 6869"),
    (4, Message("a/b", b"hi", 1), "32 09 0003 612f62 0001 6869"),
    (4, Message("a/b", b"hi"), "30 07 0003 612f62 6869"),
    (
        5,
        Message(
            "q",
            b"?",
            0,
            False,
            Properties(
                payload_format=1,
                message_expiry=7,
                content_type="t",
                response_topic="r",
                correlation_data=b"\x00",
                user=(("a", "1"), ("a", "2")),
            ),
        ),
        (
            "30 26 0001 71 21 01 01 02 00000007 03 0001 74 08 0001 72 09 0001 00"
            "26 0001 61 0001 31 26 0001 61 0001 32 3f"
        ),
    ),
]


@pytest.mark.parametrize(("version", "message", "wire"), PUBLISHES)
def test_publish_matches_the_standard(version, message, wire):
    assert published(message, version=version).hex(" ") == raw(wire).hex(" ")
    found = decode(raw(wire), from_client=True, version=version)
    assert found == Publishes([message], [1 if message.qos else 0], message.qos == 2)


def test_subscription_identifiers_go_from_server_to_client_only():
    message = Message("q", b"", 0, False, Properties(subscription_ids=(1, 200)))
    wire = raw("30 09 0001 71 05 0b 01 0b c801")
    assert published(message, server=True) == wire
    assert decode(wire, from_client=False).messages == [message]
    assert published(message, server=False) == raw("30 04 0001 71 00")
    with pytest.raises(ProtocolError) as error:
        decode(wire, from_client=True)
    assert error.value.reason_code == R.PROTOCOL_ERROR


def test_topic_aliases_on_the_wire():
    flow = Flow(0, Session(), Decoder(from_client=False), send_buffer=1 << 20, server=False)
    flow.start(5, PeerLimits(topic_alias_maximum=1))
    first, second = Message("a", b"1"), Message("b", b"2", 1)
    again = Message("a", b"3", 0, False, Properties(content_type="t"))
    assert flow.publish([first, second, first, again], [1, 2, 3, 4]) == 4
    wire = flow.take()
    assert wire == raw(
        "30 08 0001 61 03 230001 31 | 32 07 0001 62 0001 00 32 | 30 07 0000 03 230001 31"
        "| 30 0b 0000 07 03 0001 74 230001 33"
    )
    assert decode(wire, from_client=True, alias_maximum=1).messages == [first, second, first, again]


def test_acknowledgements_come_out_in_runs_with_their_reasons():
    wire = raw("40 02 0001 | 40 03 0002 10 | 40 04 0003 97 00 | 50 02 0004 | 62 03 0005 92 | 70 02 0006")
    items = Decoder(from_client=True, version=5).feed(wire)
    assert items == [
        Acks(t.PUBACK, [1, 2, 3], {2: 0x10, 3: 0x97}),
        Acks(t.PUBREC, [4], {}),
        Acks(t.PUBREL, [5], {5: 0x92}),
        Acks(t.PUBCOMP, [6], {}),
    ]


def test_an_acknowledgement_may_explain_itself():
    wire = raw("50 0a 0004 97 06 1f 0003 627965")
    assert decode(wire, from_client=False) == Acks(t.PUBREC, [4], {4: 0x97})


@pytest.mark.parametrize(
    ("size", "wire"),
    [
        (3, "03"),
        (127, "7f"),
        (128, "8001"),
        (16383, "ff7f"),
        (16384, "808001"),
        (2097151, "ffff7f"),
        (2097152, "80808001"),
    ],
)
def test_remaining_length(size, wire):
    encoded = published(Message("t", bytes(size - 3)), version=4)
    assert encoded == b"\x30" + raw(wire) + b"\0\1t" + bytes(size - 3)
    decoder = Decoder(from_client=True, version=4, maximum_packet_size=1 << 22)
    assert decoder.feed(encoded)[0].messages[0].payload == bytes(size - 3)


MALFORMED = [
    # fixed header (sections 2.1.3, 2.1.4)
    ("type 0", CLIENT, 5, "00 00", 0x81),
    ("remaining length of five bytes", CLIENT, 5, "30 80808080 01", 0x81),
    ("remaining length not in its shortest form", CLIENT, 5, "c0 8000", 0x81),
    ("PINGREQ with flags", CLIENT, 5, "c1 00", 0x81),
    ("SUBSCRIBE with flags 0", CLIENT, 5, "80 06 0001 00 0001 61 00", 0x81),
    ("UNSUBSCRIBE with flags 0", CLIENT, 5, "a0 06 0001 00 0001 61", 0x81),
    ("PUBREL with flags 0", CLIENT, 5, "60 02 0001", 0x81),
    ("PUBACK with flags 2", CLIENT, 5, "42 02 0001", 0x81),
    ("CONNECT with flags", CLIENT, 5, "11 0d 0004 4d515454 05 02 003c 00 0000", 0x81),
    ("PINGREQ with a body", CLIENT, 5, "c0 01 00", 0x81),
    ("PINGRESP from a client", CLIENT, 5, "d0 00", 0x82),
    ("PINGREQ from a server", SERVER, 5, "c0 00", 0x82),
    ("CONNACK from a client", CLIENT, 5, "20 03 00 00 00", 0x82),
    ("SUBSCRIBE from a server", SERVER, 5, "82 07 0001 00 0001 61 00", 0x82),
    ("AUTH in 3.1.1", CLIENT, 4, "f0 00", 0x82),
    # strings (section 1.5.4) and packet identifiers (2.2.1)
    ("surrogate in a topic", CLIENT, 5, "30 06 0003 eda080 00", 0x81),
    ("truncated UTF-8", CLIENT, 5, "30 04 0001 c3 00", 0x81),
    ("overlong UTF-8", CLIENT, 5, "30 05 0002 c080 00", 0x81),
    ("null in a topic", CLIENT, 5, "30 04 0001 00 00", 0x81),
    ("packet identifier 0 in PUBLISH", CLIENT, 5, "32 06 0001 61 0000 00", 0x82),
    ("packet identifier 0 in PUBACK", CLIENT, 5, "40 02 0000", 0x82),
    ("packet identifier 0 in PUBREC with reason", CLIENT, 5, "50 03 0000 00", 0x82),
    ("packet identifier 0 in SUBSCRIBE", CLIENT, 5, "82 07 0000 00 0001 61 00", 0x82),
    ("packet identifier 0 in SUBACK", SERVER, 5, "90 04 0000 00 00", 0x82),
    # CONNECT (3.1)
    ("another protocol", CLIENT, 5, "10 0d 0004 4d515458 05 02 003c 00 0000", 0x84),
    ("protocol level 6", CLIENT, 5, "10 0d 0004 4d515454 06 02 003c 00 0000", 0x84),
    ("protocol level 3 with the name of 4", CLIENT, 5, "10 0c 0004 4d515454 03 02 003c 0000", 0x84),
    ("reserved connect flag", CLIENT, 5, "10 0d 0004 4d515454 05 03 003c 00 0000", 0x81),
    ("will QoS 3", CLIENT, 5, "10 14 0004 4d515454 05 1e 003c 00 0000 00 0001 77 0001 78", 0x81),
    ("will QoS without a will", CLIENT, 5, "10 0d 0004 4d515454 05 0a 003c 00 0000", 0x81),
    ("will retain without a will", CLIENT, 5, "10 0d 0004 4d515454 05 22 003c 00 0000", 0x81),
    ("3.1.1 password without user name", CLIENT, 4, "10 0f 0004 4d515454 04 42 003c 0001 63 0001 70", 0x81),
    ("bytes behind CONNECT", CLIENT, 5, "10 0e 0004 4d515454 05 02 003c 00 0000 00", 0x81),
    ("CONNECT ends early", CLIENT, 5, "10 0b 0004 4d515454 05 02 003c 00", 0x81),
    ("will topic with a wildcard", CLIENT, 4, "10 12 0004 4d515454 04 06 003c 0000 0001 23 0001 78", 0x90),
    (
        "authentication data without a method",
        CLIENT,
        5,
        "10 11 0004 4d515454 05 02 003c 04 16 0001 78 0000",
        0x82,
    ),
    # CONNACK (3.2)
    ("CONNACK flags", SERVER, 5, "20 03 02 00 00", 0x81),
    ("CONNACK with an undefined reason", SERVER, 5, "20 03 00 8b 00", 0x81),
    ("CONNACK 3.1.1 with code 6", SERVER, 4, "20 02 00 06", 0x81),
    ("CONNACK refuses with a session", SERVER, 5, "20 03 01 87 00", 0x82),
    ("CONNACK 3.1.1 refuses with a session", SERVER, 4, "20 02 01 05", 0x82),
    ("CONNACK with maximum QoS 2", SERVER, 5, "20 05 00 00 02 2402", 0x82),
    # PUBLISH (3.3)
    ("QoS 3", CLIENT, 5, "36 06 0001 61 0001 00", 0x81),
    ("DUP with QoS 0", CLIENT, 5, "38 04 0001 61 00", 0x81),
    ("topic with #", CLIENT, 5, "30 04 0001 23 00", 0x90),
    ("topic with +", SERVER, 4, "30 03 0001 2b", 0x90),
    ("3.1.1 without a topic", CLIENT, 4, "30 03 0000 61", 0x90),
    ("no topic, no alias", CLIENT, 5, "30 03 0000 00", 0x82),
    ("no topic, no alias, other properties", CLIENT, 5, "30 05 0000 02 0100", 0x82),
    ("topic beyond the packet", CLIENT, 5, "30 04 0009 61 00", 0x81),
    ("no properties", CLIENT, 5, "30 03 0001 61", 0x81),
    ("properties beyond the packet", CLIENT, 5, "30 05 0001 61 09 01", 0x81),
    ("no packet identifier", CLIENT, 5, "32 04 0001 61 00", 0x81),
    ("an alias where none is allowed", CLIENT, 5, "30 07 0001 61 03 230001", 0x94),
    ("alias 0", CLIENT, 5, "30 07 0001 61 03 230000", 0x94),
    ("response topic with a wildcard", CLIENT, 5, "30 08 0001 61 04 08 0001 2b", 0x82),
    ("subscription identifier 0", SERVER, 5, "30 06 0001 61 02 0b00", 0x82),
    ("payload format 2", CLIENT, 5, "30 06 0001 61 02 0102", 0x82),
    ("payload format twice", CLIENT, 5, "30 08 0001 61 04 0101 0101", 0x82),
    ("a property of CONNECT in PUBLISH", CLIENT, 5, "30 07 0001 61 03 210001", 0x81),
    ("an unknown property", CLIENT, 5, "30 06 0001 61 02 0401", 0x81),
    ("a property cut off", CLIENT, 5, "30 07 0001 61 03 020000", 0x81),
    # acknowledgements (3.4 to 3.7)
    ("PUBACK too short", CLIENT, 5, "40 01 00", 0x81),
    ("PUBACK with an undefined reason", CLIENT, 5, "40 03 0001 92", 0x81),
    ("PUBREL with a reason of PUBACK", CLIENT, 5, "62 03 0001 10", 0x81),
    ("PUBACK 3.1.1 with a reason", CLIENT, 4, "40 03 0001 00", 0x81),
    ("PUBACK with bytes behind", CLIENT, 5, "40 05 0001 00 00 00", 0x81),
    # SUBSCRIBE and its answers (3.8 to 3.11)
    ("no filters", CLIENT, 5, "82 03 0001 00", 0x82),
    ("no filters 3.1.1", CLIENT, 4, "82 02 0001", 0x82),
    ("requested QoS 3", CLIENT, 5, "82 07 0001 00 0001 61 03", 0x81),
    ("reserved subscription options", CLIENT, 5, "82 07 0001 00 0001 61 40", 0x81),
    ("retain handling 3", CLIENT, 5, "82 07 0001 00 0001 61 30", 0x81),
    ("options of MQTT 5 in 3.1.1", CLIENT, 4, "82 06 0001 0001 61 04", 0x81),
    ("no local on a shared subscription", CLIENT, 5, "82 10 0001 00 000a 2473686172652f672f61 04", 0x82),
    ("a filter without options", CLIENT, 5, "82 06 0001 00 0001 61", 0x81),
    ("an empty filter", CLIENT, 5, "82 06 0001 00 0000 00", 0x8F),
    ("subscription identifier 0 in SUBSCRIBE", CLIENT, 5, "82 09 0001 02 0b00 0001 61 00", 0x82),
    ("two subscription identifiers", CLIENT, 5, "82 0b 0001 04 0b01 0b02 0001 61 00", 0x82),
    ("SUBACK with an undefined reason", SERVER, 5, "90 04 0001 00 03", 0x81),
    ("SUBACK 3.1.1 with a code of MQTT 5", SERVER, 4, "90 03 0001 87", 0x81),
    ("SUBACK without a code", SERVER, 5, "90 03 0001 00", 0x81),
    ("UNSUBACK without a code", SERVER, 5, "b0 03 0001 00", 0x81),
    ("UNSUBACK 3.1.1 with a code", SERVER, 4, "b0 03 0001 00", 0x81),
    ("UNSUBSCRIBE without filters", CLIENT, 5, "a2 03 0001 00", 0x82),
    # DISCONNECT and AUTH (3.14, 3.15)
    ("DISCONNECT with an undefined reason", CLIENT, 5, "e0 01 05", 0x81),
    ("DISCONNECT 3.1.1 with a body", CLIENT, 4, "e0 01 00", 0x81),
    ("DISCONNECT with bytes behind", CLIENT, 5, "e0 03 00 00 00", 0x81),
    ("AUTH without a method", CLIENT, 5, "f0 02 18 00", 0x82),
    ("AUTH with an undefined reason", CLIENT, 5, "f0 06 87 04 15 0001 61", 0x81),
]


@pytest.mark.parametrize(
    ("side", "version", "wire", "code"), [pytest.param(*one[1:], id=one[0]) for one in MALFORMED]
)
def test_malformed_packets_are_refused_with_the_right_reason(side, version, wire, code):
    with pytest.raises(ProtocolError) as error:
        decode(raw(wire), from_client=side, version=version)
    assert f"0x{error.value.reason_code:02x}" == f"0x{code:02x}", error.value


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "a#",
        "#/a",
        "a/#/b",
        "+a",
        "a/b+",
        "$share",
        "$share/",
        "$share/g",
        "$share/g/",
        "$share//a",
        "$share/+/a",
        "\0",
    ],
)
def test_invalid_filters_are_never_sent(bad):
    if bad == "$share":
        codec.encode_unsubscribe(Unsubscribe(packet_id=1, filters=(bad,)), 5)  # a plain filter of one level
        return
    for encode in (
        lambda: codec.encode_subscribe(Subscribe(packet_id=1, subscriptions=(Subscription(bad),)), 5),
        lambda: codec.encode_unsubscribe(Unsubscribe(packet_id=1, filters=(bad,)), 5),
    ):
        with pytest.raises(ProtocolError) as error:
            encode()
        assert error.value.reason_code in (R.TOPIC_FILTER_INVALID, R.MALFORMED_PACKET)


@pytest.mark.parametrize(
    "encode",
    [
        lambda: codec.encode_subscribe(Subscribe(packet_id=1, subscriptions=()), 5),
        lambda: codec.encode_unsubscribe(Unsubscribe(packet_id=1, filters=()), 4),
        lambda: codec.encode_subscribe(
            Subscribe(packet_id=1, subscriptions=(Subscription("$share/g/a", no_local=True),)), 5
        ),
        lambda: codec.encode_subscribe(
            Subscribe(packet_id=1, subscriptions=(Subscription("a"),), properties={P.SUBSCRIPTION_ID: [0]}), 5
        ),
        lambda: codec.encode_connect(Connect(client_id="a", version=4, password=b"secret")),
        lambda: codec.encode_connect(Connect(client_id="a", properties={P.RECEIVE_MAXIMUM: 0})),
        lambda: codec.encode_connect(Connect(client_id="a", properties={P.REQUEST_PROBLEM_INFO: 2})),
        lambda: codec.encode_connect(Connect(client_id="a", will=Will(Message("a/#", b"")))),
        lambda: codec.encode_connect(Connect(client_id="a", will=Will(Message("a", bytes(65536))))),
        lambda: codec.encode_connect(Connect(client_id="\ud800")),
        lambda: codec.encode_connect(Connect(client_id="a\0b")),
        lambda: codec.encode_connect(Connect(client_id="a" * 65536)),
    ],
)
def test_what_the_standard_forbids_is_not_encoded(encode):
    with pytest.raises(ProtocolError):
        encode()


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (Message("", b""), R.TOPIC_NAME_INVALID),
        (Message("a/+", b""), R.TOPIC_NAME_INVALID),
        (Message("#", b"", 1), R.TOPIC_NAME_INVALID),
        (Message("a\0", b""), R.TOPIC_NAME_INVALID),
        (Message("\udfff", b""), R.TOPIC_NAME_INVALID),
        (Message("t" * 65536, b"", 2), R.TOPIC_NAME_INVALID),
        (Message("t", b"", 0, False, Properties(response_topic="a/#")), R.PAYLOAD_FORMAT_INVALID),
        (Message("t", b"", 1, False, Properties(message_expiry=1 << 32)), R.PAYLOAD_FORMAT_INVALID),
        (Message("t", b"", 1, False, Properties(payload_format=2)), R.PAYLOAD_FORMAT_INVALID),
        (Message("t", b"", 1, False, Properties(user=(("k", "v" * 65536),))), R.PAYLOAD_FORMAT_INVALID),
    ],
)
def test_a_message_that_cannot_be_published_is_refused_with_its_key_and_sends_nothing(message, code):
    flow = Flow(0, Session(), Decoder(from_client=False), send_buffer=1 << 20, server=False)
    flow.start(5, PeerLimits(topic_alias_maximum=5))
    assert flow.publish([message, Message("ok", b"")], [7, 8]) == 2
    assert flow.refused == {7: code}
    assert flow.session.outbound == {}
    assert flow.take() == raw("30 08 0002 6f6b 03 230001")


def test_a_payload_beyond_what_a_packet_can_hold_is_refused():
    flow = Flow(0, Session(), Decoder(from_client=False), send_buffer=1 << 20, server=False)
    flow.start(5, PeerLimits())
    assert flow.publish([Message("t", bytes(268_435_456))], [1]) == 1
    assert flow.refused == {1: R.PACKET_TOO_LARGE}
    assert flow.take() == b""


@pytest.mark.parametrize("version", [4, 5])
def test_a_decoder_stops_behind_connect_and_goes_on_in_its_version(version):
    gap = "" if version == 4 else "00"
    connect = codec.encode_connect(Connect(client_id="c", version=version))
    decoder = Decoder(from_client=True, version=9 - version)
    publish = raw(f"30 {4 + version - 4:02x} 0001 61 {gap} 78")
    assert [type(item) for item in decoder.feed(connect + publish)] == [Connect]
    assert decoder.feed(b"") == [Publishes([Message("a", b"x")], [0], False)]
