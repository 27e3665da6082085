"""What a broker's no means to the person who set up the client.

Owns: the words for every reason code that a broker may put into CONNACK and DISCONNECT (MQTT 5
sections 3.2.2.2 and 3.14.2.1; the return codes of 3.1.1 stand for some of them). Rule: each has a
cause and a fix, in the keys that a person can set.
"""

from __future__ import annotations

from ..mqtt.reasons import R

Told = tuple[str, str]
"""Cause and fix. `{client_id}`, `{server}` (where the broker sends us, or a word for it) and
`{login}` (where the credentials are set, and what to do there) are filled in."""

_REPORT = "one of the two implementations is at fault: keep the log, and report it with the broker's name"
_OTHER_SERVER = "use the endpoint it names: {server}"
_RATE = "wait: we go on trying; give restarted clients a larger `reconnect.min`, or raise the broker's limit"
_QUOTA = "wait, disconnect other clients of this account, or have its quota at the broker raised"

_EITHER: dict[int, Told] = {
    R.UNSPECIFIED_ERROR: ("it does not say why", "see the broker's log at this time for {client_id!r}"),
    R.IMPLEMENTATION_SPECIFIC: (
        "what was asked for is right, and this broker does not do it",
        "see the broker's log at this time for what it does not accept",
    ),
    R.BAD_USER_NAME_OR_PASSWORD: ("it does not know this user name with this password", "{login}"),
    R.SERVER_UNAVAILABLE: (
        "it runs, and takes no clients at present",
        "wait: we go on trying; if it stays so, see the broker's log",
    ),
    R.SERVER_BUSY: (
        "it has more to do than it can",
        "wait: we go on trying; if it stays so, the broker needs more resources or fewer clients",
    ),
    R.QUOTA_EXCEEDED: ("a limit of this account or client is reached", _QUOTA),
    R.USE_ANOTHER_SERVER: ("another server is to be used for now", _OTHER_SERVER),
    R.SERVER_MOVED: ("it has moved for good", _OTHER_SERVER),
    R.CONNECTION_RATE_EXCEEDED: ("connections come faster than it allows", _RATE),
}

REFUSED: dict[int, Told] = {
    **_EITHER,
    R.MALFORMED_PACKET: (
        "it cannot read our CONNECT",
        'check that it is an MQTT broker; if so, try `protocol = "3.1.1"`',
    ),
    R.PROTOCOL_ERROR: (
        "it takes something in our CONNECT for a violation",
        'see the broker\'s log; try `protocol = "3.1.1"`',
    ),
    R.UNSUPPORTED_PROTOCOL_VERSION: (
        "it does not speak this version of MQTT",
        'set `protocol` to "auto", or to the version that it speaks',
    ),
    R.CLIENT_IDENTIFIER_NOT_VALID: (
        "it does not accept the client_id {client_id!r}",
        "set another `client_id`: the one that is registered for this device, or up to 23 letters and digits",
    ),
    R.NOT_AUTHORIZED: ("this client may not connect", "{login}"),
    R.BANNED: (
        "an operator, or a rule against failed attempts, keeps this client out",
        "have the ban on {client_id!r}, its user or this address lifted at the broker",
    ),
    R.BAD_AUTHENTICATION_METHOD: (
        "it does not offer the authentication method that was asked for",
        "{login}; use a method that the broker has, or a plain password or token",
    ),
    R.TOPIC_NAME_INVALID: ("it does not accept the topic of our will", "set another `will.topic`"),
    R.PACKET_TOO_LARGE: (
        "our CONNECT is larger than it accepts",
        "shorten `will.payload` or the credentials, or raise the broker's maximum packet size",
    ),
    R.PAYLOAD_FORMAT_INVALID: (
        "the payload of our will is not of the form it is said to have",
        "change `will.payload`",
    ),
    R.RETAIN_NOT_SUPPORTED: (
        "it keeps no retained messages, and our will wants to be one",
        "set `will.retain = false`",
    ),
    R.QOS_NOT_SUPPORTED: ("it does not offer the QoS of our will", "set a lower `will.qos`"),
}

ENDED: dict[int, Told] = {
    **_EITHER,
    R.SUCCESS: ("it closes without an error", "nothing to do: we connect again; if it stays so, see its log"),
    R.MALFORMED_PACKET: ("it could not read what we sent", _REPORT),
    R.PROTOCOL_ERROR: ("it takes what we sent for a violation", _REPORT),
    R.NOT_AUTHORIZED: (
        "this client may not stay, or did what it may not do",
        "{login}; check too which topics it may use",
    ),
    R.SERVER_SHUTTING_DOWN: ("it stops or restarts", "wait: we go on trying until it is back"),
    R.BAD_AUTHENTICATION_METHOD: ("it does not offer the authentication method in use", "{login}"),
    R.KEEP_ALIVE_TIMEOUT: (
        "it heard nothing from this client for one and a half times `keepalive`",
        "check the network; lower `keepalive` where a NAT or a proxy forgets idle connections",
    ),
    R.SESSION_TAKEN_OVER: (
        "another connection came with the client_id {client_id!r}",
        "another client uses the client_id {client_id!r}: give each its own",
    ),
    R.TOPIC_FILTER_INVALID: ("it does not accept a topic filter", "change the filters in `subscribe`"),
    R.TOPIC_NAME_INVALID: ("it does not accept the topic of a message", "publish to topics that it accepts"),
    R.RECEIVE_MAXIMUM_EXCEEDED: ("more messages were in flight than it allows", _REPORT),
    R.TOPIC_ALIAS_INVALID: ("a topic alias was not one of those it allows", _REPORT),
    R.PACKET_TOO_LARGE: (
        "a message was larger than it accepts",
        "publish smaller messages, or raise the broker's maximum packet size",
    ),
    R.MESSAGE_RATE_TOO_HIGH: (
        "messages come faster than it allows",
        "publish fewer, larger messages, or raise the broker's limit",
    ),
    R.ADMINISTRATIVE_ACTION: (
        "an operator ended it",
        "ask the broker's operator why; meanwhile we connect again",
    ),
    R.PAYLOAD_FORMAT_INVALID: (
        "a payload is not of the form that its message says",
        "publish text in UTF-8 where the payload format indicator is 1",
    ),
    R.RETAIN_NOT_SUPPORTED: ("it keeps no retained messages", "publish without `retain`"),
    R.QOS_NOT_SUPPORTED: ("it does not offer the QoS of a message", "publish with a lower QoS"),
    R.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED: (
        "it offers no shared subscriptions",
        "subscribe without $share/<group>/ in front of the filter",
    ),
    R.MAXIMUM_CONNECT_TIME: (
        "a connection may not last longer there",
        "nothing to do: we connect again; the broker's configuration has the limit",
    ),
    R.SUBSCRIPTION_IDENTIFIERS_NOT_SUPPORTED: (
        "it offers no subscription identifiers",
        "read each set of filters over a connection of its own",
    ),
    R.WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED: (
        "it offers no wildcards in subscriptions",
        "subscribe to whole topics, without + and #",
    ),
}

_UNKNOWN: Told = ("brokers do not give this reason here", "see the broker's log, and its manual for the code")


def meaning(code: int, *, accepted: bool, client_id: str, origin: str, server: str) -> Told:
    """Cause and fix of a code. `accepted`: after CONNACK. `origin`: where the credentials are set,
    "" if nowhere. `server`: the Server Reference, "" if there is none."""
    first, second = (ENDED, REFUSED) if accepted else (REFUSED, ENDED)
    cause, fix = first.get(code) or second.get(code) or _UNKNOWN
    known = {
        "client_id": client_id,
        "login": f"check {origin}" if origin else "set `auth` for this connection",
        "server": server or "none is named, so ask its operator",
    }
    return cause.format_map(known), fix.format_map(known)
