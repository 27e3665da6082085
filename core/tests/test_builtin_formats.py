"""Serializers, topic patterns, the generator: everything that is pure."""

from __future__ import annotations

import asyncio
import itertools
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from tesaiot_connect.builtin import (
    GeneratorSource,
    JsonSerializer,
    MsgpackSerializer,
    RawPayload,
    generator as generator_module,
)
from tesaiot_connect.errors import EndOfInput, PayloadError
from tesaiot_connect.message import Message, Undecodable
from tesaiot_connect.pipeline import Routes, TopicFields
from tesaiot_connect.protocols import RawSerializer, Serializer

BAD_JSON = [
    b"", b" ", b"{", b"[1,", b"2]", b"{}{}", b"tru", b"NaN", b"[Infinity]", b"01", b'"\xff"', b'{"\xff":1}',
    b'"\xed\xa0\x80"', b'"\\ud800"', b"\xef\xbb\xbf1", b'"a\nb"',
    b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000,
]  # fmt: skip
GOOD_JSON = [
    b"1",
    b' {"a" : [1, 2.5, null]} ',
    b'"\xc3\xa9"',
    b"123456789012345678901234567890",
    b'"\\u00e9"',
]


@pytest.mark.parametrize("decode", [JsonSerializer().decode, JsonSerializer().decode_raw])
@pytest.mark.parametrize("payload", BAD_JSON)
def test_bad_json_becomes_undecodable_in_its_place(decode: Any, payload: bytes) -> None:
    first, bad, last = decode([b"1", payload, b'"x"'])
    assert type(bad) is Undecodable
    assert bad.payload == payload
    assert isinstance(bad.error, PayloadError)
    assert msgspec.json.decode(msgspec.json.encode([first, last])) == [1, "x"]


@pytest.mark.parametrize("payload", GOOD_JSON)
def test_good_json_is_the_same_decoded_and_raw(payload: bytes) -> None:
    (value,) = JsonSerializer().decode([payload])
    (raw,) = JsonSerializer().decode_raw([payload])
    assert type(raw) is msgspec.Raw
    assert msgspec.json.decode(raw) == value == msgspec.json.decode(payload)


def test_payloads_cannot_join_hands() -> None:
    for decode in (JsonSerializer().decode, JsonSerializer().decode_raw):
        assert [type(value) for value in decode([b"[1,", b"2]"])] == [Undecodable, Undecodable]


@given(st.lists(st.binary(max_size=40)))
def test_no_bytes_make_a_serializer_raise(payloads: list[bytes]) -> None:
    for serializer in (JsonSerializer(), MsgpackSerializer(), RawPayload()):
        assert len(serializer.decode(payloads)) == len(payloads)
    for raw, value in zip(
        JsonSerializer().decode_raw(payloads), JsonSerializer().decode(payloads), strict=True
    ):
        if type(value) is not Undecodable:
            assert type(raw) is msgspec.Raw


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.lists(_values, max_size=5))
def test_what_is_encoded_is_decoded(values: list[Any]) -> None:
    for serializer in (JsonSerializer(), MsgpackSerializer()):
        assert serializer.decode(serializer.encode(values)) == values


def test_nan_is_not_json() -> None:
    assert JsonSerializer().encode([math.nan, math.inf]) == [b"null", b"null"]


def test_an_encoding_error_names_the_value() -> None:
    for serializer in (JsonSerializer(), MsgpackSerializer(), RawPayload()):
        with pytest.raises(PayloadError, match="object object"):
            serializer.encode([b"fine", object()])


def test_msgpack_refuses_what_is_none() -> None:
    good, bad, deep = MsgpackSerializer().decode([b"\x81\xa1a\x01", b"\x81", b"\x91" * 100_000])
    assert good == {"a": 1}
    assert type(bad) is type(deep) is Undecodable


def test_raw_is_bytes_both_ways() -> None:
    assert RawPayload().decode([b"\xff", b""]) == [b"\xff", b""]
    assert RawPayload().encode(["é", b"\xff", msgspec.Raw(b"1")]) == ["é".encode(), b"\xff", b"1"]


def test_all_are_serializers() -> None:
    assert isinstance(JsonSerializer(), RawSerializer)
    for serializer in (MsgpackSerializer(), RawPayload()):
        assert isinstance(serializer, Serializer)
        assert not isinstance(serializer, RawSerializer)


# --- topic fields -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "topic", "fields"),
    [
        (
            "device/{device_id}/telemetry/{sensor_type}",
            "device/d/telemetry/t",
            {"device_id": "d", "sensor_type": "t"},
        ),
        ("device/{device_id}/telemetry/{sensor_type}", "device/d/telemetry", {}),
        ("device/{device_id}/telemetry/{sensor_type}", "device/d/telemetry/t/x", {}),
        ("device/{device_id}/telemetry/{sensor_type}", "device/d/state/t", {}),
        ("a/{x}", "a/", {"x": ""}),
        ("a/+/{x}", "a/b/c", {"x": "c"}),
        ("a/{x}/#", "a/b", {"x": "b"}),
        ("a/{x}/#", "a/b/c/d", {"x": "b"}),
        ("a/{x}/{rest...}", "a/b/c/d", {"x": "b", "rest": "c/d"}),
        ("a/{x}/{rest...}", "a/b", {}),
        ("{all...}", "a/b", {"all": "a/b"}),
        ("plain", "plain", {}),
    ],
)
def test_topic_fields(pattern: str, topic: str, fields: dict[str, str]) -> None:
    assert TopicFields.parse(pattern).match(topic) == fields
    assert Routes(pattern).route(topic).fields == fields


@pytest.mark.parametrize(
    ("pattern", "wrong"),
    [
        ("a/{b}/{b}", "twice"),
        ("a/{time}", "column"),
        ("a/{}", "not a field"),
        ("a/{b c}", "not a field"),
        ("a/x{b}", "whole level"),
        ("a/#/b", "only at the end"),
        ("a/{b...}/c", "only at the end"),
    ],
)
def test_wrong_patterns_are_explained(pattern: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        TopicFields.parse(pattern)


def test_names_of_a_pattern() -> None:
    assert TopicFields.parse("a/{b}/{c...}").names == ("b", "c")


def test_the_route_cache_is_bounded_and_right() -> None:
    routes = Routes("{a}/{b}", limit=10)
    for size in (1, 9, 3, 25, 10):
        messages = [Message(f"{size}/{n}", b"") for n in range(size)]
        records = routes.records(messages, 1.0, range(size))
        assert [record.route.fields for record in records] == [
            {"a": str(size), "b": str(n)} for n in range(size)
        ]
        assert [record.value for record in records] == list(range(size))
        assert len(routes._known) <= 10
    assert routes.route("x/y") is routes.route("x/y")


# --- the generator ------------------------------------------------------------------------


def read_all(recipe: GeneratorSource) -> list[Message]:
    async def main() -> list[Message]:
        messages: list[Message] = []
        async with recipe.open() as reader:
            while True:
                try:
                    messages += (await reader.read()).batch.messages
                except EndOfInput:
                    return messages

    return asyncio.run(main())


def test_the_generator_speaks_like_the_platforms_devices() -> None:
    messages = read_all(GeneratorSource(devices=2, rate=0, count=6))
    assert [one.topic for one in messages] == [
        f"device/sim-000{device}/telemetry/{sensor}"
        for sensor in ("temperature", "humidity", "pressure")
        for device in (1, 2)
    ]
    value = msgspec.json.decode(messages[0].payload)
    assert list(value) == ["value", "unit", "timestamp"]
    assert value["unit"] == "celsius"
    assert 15 < value["value"] < 35
    assert len(value["timestamp"]) == len("2025-12-09T10:30:45.000Z")
    assert value["timestamp"].endswith("Z")
    assert messages[0].qos == 1

    messages = read_all(GeneratorSource(devices=2, rate=0, count=2, layout="device"))
    assert [one.topic for one in messages] == ["devices/sim-0001/telemetry", "devices/sim-0002/telemetry"]
    value = msgspec.json.decode(messages[0].payload)
    assert list(value) == ["timestamp", "data"]
    assert list(value["data"]) == ["temperature", "humidity"]
    assert len(value["timestamp"]) == len("2025-12-09T10:30:45.123456Z")


def test_generated_values_come_from_the_seed_alone() -> None:
    def values(seed: int) -> list[float]:
        recipe = GeneratorSource(rate=0, count=2500, seed=seed)
        return [msgspec.json.decode(one.payload)["value"] for one in read_all(recipe)]

    assert values(1) == values(1)
    assert values(1) != values(2)
    assert len(values(1)) == 2500


def test_time_stamps_follow_the_rate() -> None:
    recipe = GeneratorSource(devices=1, rate=4, layout="device")
    stamps = [
        msgspec.json.decode(one.payload)["timestamp"]
        for one in itertools.islice(generator_module.messages(recipe, 0.0), 4)
    ]
    assert [stamp[17:-1] for stamp in stamps] == ["00.250000", "00.500000", "00.750000", "01.000000"]


def test_a_rate_is_kept_and_batches_catch_up() -> None:
    async def main() -> tuple[float, int]:
        loop = asyncio.get_running_loop()
        recipe = GeneratorSource(rate=5000, count=1000)
        async with recipe.open() as reader:
            started, reads = loop.time(), 0
            while True:
                try:
                    await reader.read()
                except EndOfInput:
                    return loop.time() - started, reads
                reads += 1

    seconds, reads = asyncio.run(main())
    assert seconds >= 0.19  # never faster than the rate
    assert reads <= 100  # batches, not a sleep a message


def test_once_gives_one_of_each() -> None:
    assert len(read_all(GeneratorSource(devices=4, rate=0).once())) == 12
    assert len(read_all(GeneratorSource(devices=4, rate=0, layout="device").once())) == 4
    assert len(read_all(GeneratorSource(rate=0, count=7).once())) == 7
