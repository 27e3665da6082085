"""URLs of endpoints: read, shown to people, and given back."""

from __future__ import annotations

import pytest

from tesaiot_connect import Url


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("mqtts://broker.example:8883", "mqtts://broker.example:8883"),
        ("wss://[::1]:443/mqtt", "wss://[::1]:443/mqtt"),
        ("unix:///run/mqtt.sock", "unix:///run/mqtt.sock"),
        ("wss://h/mqtt?token=abc&v=1", "wss://h/mqtt?***"),
        ("wss://h/mqtt?abc", "wss://h/mqtt?***"),
        ("wss://h?abc", "wss://h?***"),
    ],
)
def test_a_query_is_kept_and_not_shown(text: str, shown: str) -> None:
    url = Url.parse(text)
    assert str(url) == f"{url}" == shown
    assert url.reveal() == text
    assert Url.parse(url.reveal()) == url
