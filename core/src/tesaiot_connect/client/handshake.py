"""What a client says first, and what it makes of a no.

Owns: CONNECT from the options, and the words for refusals and disconnections.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from ..errors import Disconnected, Refused
from ..message import Message
from ..mqtt.events import Closed
from ..mqtt.packets import V5, Connect, Will
from ..mqtt.properties import P
from ..mqtt.reasons import TO_CONNACK_V3, R, words
from ..protocols import Credentials
from .options import ClientOptions
from .refusals import meaning

_PERMANENT = frozenset(
    (
        R.BAD_USER_NAME_OR_PASSWORD,
        R.NOT_AUTHORIZED,
        R.CLIENT_IDENTIFIER_NOT_VALID,
        R.BANNED,
        R.BAD_AUTHENTICATION_METHOD,
        R.UNSUPPORTED_PROTOCOL_VERSION,
    )
)

_EXPIRY_WITHIN_RUN = 600
"""Seconds the broker keeps a session that is only meant to outlive a reconnect."""
_SHOWN = 300
"""Characters of the broker's words that a message has."""


def connect_packet(
    options: ClientOptions,
    credentials: Credentials,
    *,
    client_id: str,
    version: int,
    keep_session: bool,
    first: bool,
) -> Connect:
    """CONNECT as the options want it. `keep_session`: beyond this run. `first`: of this run. Raises Refused
    for enhanced authentication in MQTT 3.1.1, which has none."""
    if version != V5 and credentials.method is not None:
        raise Refused(
            f"MQTT 3.1.1 has no authentication by {credentials.method}, which the login asks for",
            fix='set `protocol` to "auto" or "5", or log in with a password, a token or a certificate',
            reason_code=R.BAD_AUTHENTICATION_METHOD,
            permanent=True,
        )
    properties: dict[P, Any] = {}
    if version == V5:
        expiry = min(int(options.session_expiry), 0xFFFFFFFF)
        properties = {
            P.SESSION_EXPIRY: expiry if keep_session else min(expiry, _EXPIRY_WITHIN_RUN),
            P.RECEIVE_MAXIMUM: options.receive_maximum,
            P.MAXIMUM_PACKET_SIZE: int(options.maximum_packet_size),
        }
        if options.topic_aliases:
            properties[P.TOPIC_ALIAS_MAXIMUM] = options.topic_aliases
        if credentials.method is not None:
            properties[P.AUTH_METHOD] = credentials.method
            if credentials.data is not None:
                properties[P.AUTH_DATA] = credentials.data
    will = options.will
    return Connect(
        client_id=client_id,
        version=version,
        clean_start=not keep_session and (first or version != V5),
        keepalive=ceil(options.keepalive),
        username=credentials.username,
        password=credentials.password,
        will=None
        if will is None
        else Will(Message(will.topic, will.payload.encode(), will.qos, will.retain), int(will.delay)),
        properties=properties,
    )


def explain(
    closed: Closed,
    *,
    broker: str,
    client_id: str,
    accepted: bool,
    origin: str,
    may_fall_back: bool,
    version: int = V5,
    fix: str = "",
) -> Disconnected:
    """`accepted`: CONNACK had said yes. `origin`: where the credentials were set, "" if nowhere.
    `fix`: what the transport advised, if it was the transport that broke.

    With `may_fall_back` a silent end before CONNACK counts as a refusal of the protocol
    version, and so does an answer that is not MQTT 5: a 3.1.1 broker that is spoken to in MQTT 5
    answers with a CONNACK of its own version, or closes without a word.
    """
    code = closed.reason_code
    if code is None or not closed.by_peer:
        if code == R.PACKET_TOO_LARGE:
            fix = "raise `maximum_packet_size`"
        if accepted:
            return Disconnected(f"{broker}: {closed.text}", fix=fix)
        if may_fall_back and (closed.by_peer or code is not None):
            return Refused(
                f"{broker} closed the connection without a CONNACK"
                if closed.by_peer
                else f"{broker} did not answer in MQTT 5: {closed.text}",
                reason_code=R.UNSUPPORTED_PROTOCOL_VERSION,
            )
        return Disconnected(
            f"{broker}: {closed.text}, before CONNACK",
            fix=fix or "check that this port speaks MQTT, and the broker's log for why it refused",
        )
    server = _shown(closed.properties.get(P.SERVER_REFERENCE, ""))
    cause, fix = meaning(code, accepted=accepted, client_id=client_id, origin=origin, server=server)
    what = "ended the connection" if accepted else "refused the connection"
    said = words(code)
    if version != V5 and not accepted:
        said = f"{said.partition(' (')[0]} (MQTT 3.1.1 return code {TO_CONNACK_V3.get(R(code), 3)})"
    if closed.text and closed.text != words(code):
        said += f", {_shown(closed.text)}"
    return Refused(
        f"the broker at {broker} {what}: {said}: {cause}",
        fix=fix,
        reason_code=code,
        permanent=code in _PERMANENT and not accepted,
    )


def _shown(text: str) -> str:
    """What the broker wrote, fit for a log and a terminal."""
    return "".join(c if c.isprintable() else " " for c in text[:_SHOWN]).strip()
