"""The platform's message routing, alone and in a broker."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
import shutil
import sqlite3
from pathlib import Path

import pytest
from engine_peer import EnginePeer

from tesaiot_connect.message import Message, Properties
from tesaiot_connect.sandbox.routing import UNITS, Routing
from tesaiot_connect.server import Broker, BrokerOptions, ListenerSpec
from tesaiot_connect.testing import Network

REPORT = b'{"timestamp": "2025-12-09T10:30:45.123456Z", "data": {"temperature": 25.50, "humidity": 55.3}}'


def test_a_report_brings_about_its_readings() -> None:
    routing = Routing()
    found = routing([Message("devices/d-1/telemetry", REPORT, 1, True)])
    assert [(one.topic, one.qos, one.retain) for one in found] == [
        ("device/d-1/telemetry/temperature", 1, False),
        ("device/d-1/telemetry/humidity", 1, False),
    ]
    assert [json.loads(one.payload) for one in found] == [
        {"value": 25.5, "unit": "celsius", "timestamp": "2025-12-09T10:30:45.123456Z"},
        {"value": 55.3, "unit": "percent", "timestamp": "2025-12-09T10:30:45.123456Z"},
    ]
    assert b'"value":25.50' in found[0].payload, "numbers go through as they were written"
    assert routing.readings == 2


def test_values_of_any_kind_and_sensors_without_a_unit() -> None:
    data = {"door": "open", "motion": True, "position": {"lat": 13.7}, "spectrum": [1, 2], "nothing": None}
    report = json.dumps({"timestamp": 1733740245, "data": data}).encode()
    found = [json.loads(one.payload) for one in Routing()([Message("devices/d/telemetry", report)])]
    assert [one["value"] for one in found] == list(data.values())
    assert {one["unit"] for one in found} == {""}
    assert {one["timestamp"] for one in found} == {1733740245}


def test_without_a_timestamp_the_present_one() -> None:
    (found,) = Routing()([Message("devices/d/telemetry", b'{"data": {"co2": 400}}')])
    written = json.loads(found.payload)
    assert written["unit"] == UNITS["co2"]
    passed = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(written["timestamp"])
    assert datetime.timedelta(0) <= passed < datetime.timedelta(minutes=1)


@pytest.mark.parametrize(
    "topic", ["devices/telemetry", "devices//telemetry", "devices/d/telemetry/x", "device/d/telemetry", "t"]
)
def test_other_topics_are_left_alone(topic: str) -> None:
    assert Routing()([Message(topic, REPORT)]) == []


@pytest.mark.parametrize(
    "payload",
    [
        b"not json",
        b"\xff\xfe",
        b"[]",
        b"25.5",
        b'{"timestamp": "now"}',
        b'{"data": 5}',
        b'{"data": {"a/b": 1}}',
        b'{"data": {"#": 1}}',
        b'{"data": {"": 1}}',
        b'{"data": {"nul\\u0000": 1}}',
        b'{"data": {"line\\n": 1}}',
        b'{"data": {"half\\ud800": 1}}',
        b'{"data": {"a": "\xff"}}',
        b'{"data": {"a": NaN}}',
        b'{"data": {"a": 1}, "timestamp": "' + 65 * b"9" + b'"}',
        b'{"data": {"a": 1}, "timestamp": ' + 400 * b"9" + b"}",
        b'{"data": {"a": 1}, "timestamp": true}',
        json.dumps({"data": {str(n): 1 for n in range(1001)}}).encode(),
        b'{"data": {"a": ' + 100_000 * b"[" + 100_000 * b"]" + b"}}",
        b'{"data": {"' + 65_520 * b"a" + b'": 1}}',
    ],
    ids=lambda payload: payload[:16].decode("latin1"),
)
def test_what_is_no_report_is_said_once(payload: bytes, caplog: pytest.LogCaptureFixture) -> None:
    routing = Routing()
    with caplog.at_level(logging.WARNING):
        assert routing([Message("devices/d/telemetry", payload)] * 3) == []
    (record,) = caplog.records
    assert "d: " in record.getMessage()
    assert len(routing([Message("devices/d/telemetry", REPORT)])) == 2, "the next one is routed"


def test_readings_take_little_more_room_than_their_report() -> None:
    """Neither its timestamp nor its properties may be multiplied by its sensors."""
    properties = Properties(
        message_expiry=60, user=(("key", "x" * 60_000),) * 10, correlation_data=b"y" * 60_000
    )
    report = json.dumps({"timestamp": "9" * 64, "data": {f"s{n}": "v" * 900 for n in range(1000)}}).encode()
    found = Routing()([Message("devices/d/telemetry", report, 2, True, properties)])
    assert len(found) == 1000 and found[0].qos == 2
    assert sum(len(one.payload) + len(one.topic) for one in found) < len(report) + 1000 * 150
    assert {one.properties for one in found} == {Properties(message_expiry=60)}


def test_a_timestamp_goes_through_as_it_is() -> None:
    for timestamp in (b"1733740245123456789", b"1733740245.25", b'"2025-12-09"'):
        report = b'{"data": {"a": 1, "a": 2}, "timestamp": ' + timestamp + b"}"
        (found,) = Routing()([Message("devices/d/telemetry", report)])
        assert found.payload == b'{"value":2,"unit":"","timestamp":' + timestamp + b"}"


def test_taking_back_a_retained_report_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    assert Routing()([Message("devices/d/telemetry", b"", 1, True)]) == []
    assert not caplog.records


def test_in_a_broker_readings_are_as_safe_as_the_report(tmp_path: Path) -> None:
    """Nobody subscribes to the report itself: its acknowledgement waits for the readings alone."""

    async def main() -> list[Message]:
        transport, file = Network().transport(), tmp_path / "broker.db"
        broker = Broker(BrokerOptions(state_file=file), derive=Routing())
        async with asyncio.timeout(60), broker.serving([ListenerSpec("here", transport)]):
            reader = await EnginePeer.open(transport, "reader", expiry=1000, clean=False)
            await reader.connack()
            await reader.subscribe("device/+/telemetry/#")
            reader.connection.abort()
            while broker.stats.clients:
                await asyncio.sleep(0.001)
            writer = await EnginePeer.open(transport, "d")
            await writer.connack()
            await writer.publish(Message("devices/d/telemetry", REPORT, 1))
            killed = tmp_path / "killed"  # what a kill would leave now
            killed.mkdir()
            for one in tmp_path.glob("broker.db*"):
                shutil.copy(one, killed)
            with contextlib.closing(sqlite3.connect(killed / file.name)) as database:
                assert database.execute("SELECT count(*) FROM queue").fetchone() == (2,)
            assert broker.stats.received == 1
            reader = await EnginePeer.open(transport, "reader", expiry=1000, clean=False)
            await reader.connack()
            return await reader.received(2)

    assert [one.topic.rpartition("/")[2] for one in asyncio.run(main())] == ["temperature", "humidity"]
