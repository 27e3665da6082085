"""Topic names and topic filters (MQTT 5 section 4.7).

Owns: validity, matching, and the parts of a shared subscription. Rule: everything here is pure.
"""

from __future__ import annotations

from ..errors import ProtocolError
from .reasons import R


def check_topic(topic: str) -> None:
    """Raises ProtocolError unless `topic` may be published to (MQTT 5 section 4.7.3)."""
    if not topic or "+" in topic or "#" in topic or "\0" in topic:
        why = ": + and # are for subscriptions" if "+" in topic or "#" in topic else ""
        raise ProtocolError(f"invalid topic name {topic!r}{why}", reason_code=R.TOPIC_NAME_INVALID)
    if len(topic) > 16383 and len(topic.encode()) > 65535:
        raise ProtocolError("a topic name is longer than 65535 bytes", reason_code=R.TOPIC_NAME_INVALID)


def check_filter(topic_filter: str) -> None:
    """Raises ProtocolError unless `topic_filter` may be subscribed to (MQTT 5 section 4.7.1)."""
    name = topic_filter
    if name.startswith("$share/"):
        parts = name.split("/", 2)
        if len(parts) < 3 or not parts[1] or not parts[2] or "+" in parts[1] or "#" in parts[1]:
            raise ProtocolError(
                f"invalid shared subscription {topic_filter!r}: write $share/<group>/<filter>",
                reason_code=R.TOPIC_FILTER_INVALID,
            )
        name = parts[2]
    if not name or "\0" in name or (len(name) > 16383 and len(name.encode()) > 65535):
        raise ProtocolError(f"invalid topic filter {topic_filter!r}", reason_code=R.TOPIC_FILTER_INVALID)
    if "+" in name or "#" in name:
        levels = name.split("/")
        for level in levels:
            if len(level) > 1 and ("+" in level or "#" in level):
                raise ProtocolError(
                    f"invalid topic filter {topic_filter!r}: a wildcard takes a whole level",
                    reason_code=R.TOPIC_FILTER_INVALID,
                )
        if "#" in levels[:-1]:
            raise ProtocolError(
                f"invalid topic filter {topic_filter!r}: # stands only at the end",
                reason_code=R.TOPIC_FILTER_INVALID,
            )


def split_shared(topic_filter: str) -> tuple[str | None, str]:
    """The group and the filter of a shared subscription; (None, filter) for another."""
    if topic_filter.startswith("$share/"):
        _, group, name = topic_filter.split("/", 2)
        return group, name
    return None, topic_filter


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a topic matches a valid, unshared filter. Wildcards do not match a leading $."""
    if topic_filter == topic:
        return True
    levels = topic_filter.split("/")
    if topic.startswith("$") and levels[0] in ("+", "#"):
        return False
    parts = topic.split("/")
    for index, level in enumerate(levels):
        if level == "#":
            return True
        if index >= len(parts) or (level != "+" and level != parts[index]):
            return False
    return len(levels) == len(parts)
