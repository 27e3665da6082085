"""Side-by-side benchmark: our pipeline against other clients doing the same job, in one run on one machine.

The job: subscribe to device/+/telemetry/#, parse each payload as JSON, append topic and value as a JSON
line to a file. Peers get the same JSON library, a buffered file and, on asyncio, uvloop.

Feeds: *flood*, a raw-socket feeder in C that is the broker itself (the client's own ceiling, in messages
per second until the last line is in the file and, at QoS 1, everything is acknowledged), and *mosquitto*
in between (CPU of the client's process per message, counted from the moment it is subscribed).

Repetitions of ours and a peer alternate; figures are medians. `--quick` is a smoke test, not a measure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from drop_in.cases import rows as drop_in_rows
from negotiation.cases import rows as negotiation_rows
from nng.cases import rows as nng_rows
from quic.cases import rows as quic_rows
from ws.cases import rows as ws_rows

HERE = Path(__file__).resolve().parent
MARKER = b"sensor-last"
BIN = Path(sys.executable).parent

PIPELINE = """
[connections.bench]
client_id = "bench-ours"
endpoints = ["mqtt://127.0.0.1:{port}"]

[sources.telemetry]
type = "mqtt"
connection = "bench"
subscribe = ["device/+/telemetry/#"]
qos = {qos}

[sinks.file]
type = "jsonl"
path = "{output}"

[pipelines.bench]
from = "telemetry"
to = ["file"]
"""


class Run(NamedTuple):
    rate: float
    """Messages per second."""
    cpu: float
    """Microseconds of CPU per message."""
    memory: float
    """Peak resident set, MiB."""


class Contender(NamedTuple):
    name: str
    command: Callable[[int, int, Path, int], list[str]]
    """Port, QoS, output file, message count -> command line."""
    to_stdout: bool = False


def ours(port: int, qos: int, output: Path, _count: int) -> list[str]:
    config = output.with_suffix(".toml")
    config.write_text(PIPELINE.format(port=port, qos=qos, output=output.as_posix()))
    return [str(BIN / "tesaiot-connect"), "run", str(config)]


def peer(script: str) -> Callable[[int, int, Path, int], list[str]]:
    return lambda port, qos, output, _count: [
        sys.executable,
        str(HERE / "peers" / script),
        str(port),
        str(qos),
        str(output),
    ]


def mosquitto_sub(port: int, qos: int, _output: Path, count: int) -> list[str]:
    tool = shutil.which("mosquitto_sub") or "mosquitto_sub"
    return [tool, "-p", str(port), "-q", str(qos), "-t", "device/+/telemetry/#", "-v", "-C", str(count + 1)]


OURS = Contender("tesaiot-connect", ours)
GMQTT = Contender("gmqtt", peer("gmqtt_jsonl.py"))
PAHO = Contender("paho-mqtt", peer("paho_jsonl.py"))
AIOMQTT = Contender("aiomqtt", peer("aiomqtt_jsonl.py"))
MOSQUITTO_SUB = Contender("mosquitto_sub", mosquitto_sub, to_stdout=True)


class BenchError(Exception):
    pass


def pin(core: int) -> Callable[[], None] | None:
    """Keep feed and client on cores of their own, where there are two and the system can."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        return None
    return lambda: os.sched_setaffinity(0, {cores[core % len(cores)]})


def cpu_of(pid: int) -> float:
    """Seconds of CPU that a running process has used, all threads."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def peak_memory_of(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise BenchError("no VmHWM")


def line_from(pipe: IO[bytes], process: subprocess.Popen[bytes], word: str, seconds: float = 120) -> str:
    """The next line of an unbuffered pipe that holds `word`; watches that the client lives."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if select.select([pipe], [], [], 0.1)[0]:
            line = pipe.readline().decode()
            if word in line:
                return line
            if not line:
                raise BenchError(f"the feed of {process.args!r} ended")
        elif process.poll() is not None:
            raise BenchError(f"{process.args!r} ended early with {process.returncode}")
    raise BenchError(f"{process.args!r} was not served in {seconds:.0f} s")


def ends_with_marker(output: Path) -> bool:
    """Whether the marker message is in the last lines of the file."""
    try:
        with output.open("rb") as file:
            file.seek(max(0, output.stat().st_size - 4096))
            return MARKER in file.read()
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def client(contender: Contender, command: list[str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    errors = output.with_suffix(".stderr")
    with errors.open("wb") as stderr, output.open("wb") as file:
        stdout = file if contender.to_stdout else stderr
        with subprocess.Popen(command, stdout=stdout, stderr=stderr, preexec_fn=pin(1)) as process:
            try:
                yield process
            except BaseException:
                sys.stderr.write(errors.read_text(errors="replace")[-2000:])
                raise
            finally:
                process.terminate()
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()


def until_written(process: subprocess.Popen[bytes], output: Path, seconds: float, *, exits: bool) -> float:
    """When the last message was in the file; for a contender that exits then, when it had exited."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if exits:
            # WNOWAIT: leave it to be reaped, its usage is wanted
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return time.monotonic()
        elif ends_with_marker(output):
            return time.monotonic()
        elif process.poll() is not None:
            raise BenchError(f"{process.args!r} ended early with {process.returncode}")
        time.sleep(0.002)
    raise BenchError(f"{process.args!r} did not write everything in {seconds:.0f} s")


def lines_in(output: Path) -> int:
    with output.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def check_complete(output: Path, count: int, contender: Contender) -> None:
    if (lines := lines_in(output)) != count + 1:
        raise BenchError(f"{contender.name} wrote {lines} of {count + 1} messages")


def flood(contender: Contender, feeder: Path, qos: int, count: int, folder: Path) -> Run:
    output = folder / f"flood-{contender.name}.jsonl"
    command = [str(feeder), "serve", str(qos), str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, preexec_fn=pin(0)) as feed:
        assert feed.stdout is not None
        try:
            port = int(feed.stdout.readline().split()[1])
            with client(contender, contender.command(port, qos, output, count), output) as process:
                report = line_from(feed.stdout, process, "acked").split()
                done = until_written(process, output, 120, exits=False)
                done = max(done, float(report[5]))
                cpu, memory = cpu_of(process.pid), peak_memory_of(process.pid)
        finally:
            feed.kill()
    check_complete(output, count, contender)
    return Run(count / (done - float(report[1])), cpu / count * 1e6, memory)


@contextlib.contextmanager
def mosquitto(folder: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A broker whose output tells when somebody has subscribed."""
    tool = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin") or "mosquitto"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\nmax_inflight_messages 0\n"
        "log_dest stderr\nlog_type subscribe\nset_tcp_nodelay true\n"
    )
    command = [tool, "-c", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, bufsize=0, preexec_fn=pin(0)) as broker:
        try:
            deadline = time.monotonic() + 10
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                if time.monotonic() > deadline:
                    raise BenchError("mosquitto did not start")
            yield port, broker
        finally:
            broker.terminate()
            broker.wait()


def behind_mosquitto(
    contender: Contender, feeder: Path, qos: int, count: int, folder: Path, rate: float
) -> Run:
    output = folder / f"mosquitto-{contender.name}.jsonl"
    with mosquitto(folder) as (port, broker):
        assert broker.stderr is not None
        with client(contender, contender.command(port, qos, output, count), output) as process:
            line_from(broker.stderr, process, "device/+/telemetry/#")
            before = cpu_of(process.pid)
            command = [str(feeder), "publish", str(port), str(qos), str(count), str(rate)]
            report = subprocess.run(
                command, check=True, text=True, stdout=subprocess.PIPE, preexec_fn=pin(0)
            ).stdout.split()
            done = until_written(process, output, 120, exits=contender.to_stdout)
            if contender.to_stdout:
                _, _, usage = os.wait4(process.pid, 0)
                process.returncode = 0
                cpu, memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
            else:
                cpu, memory = cpu_of(process.pid), peak_memory_of(process.pid)
    check_complete(output, count, contender)
    return Run(count / (done - float(report[1])), (cpu - before) / count * 1e6, memory)


class Case(NamedTuple):
    name: str
    peer: Contender
    measure: Callable[[Contender, int], Run]
    count: int
    peer_count: int
    repetitions: int
    figure: str
    unit: str


def cases(feeder: Path, folder: Path, scale: float, repetitions: int, rate: float) -> list[Case]:
    def scaled(count: int) -> int:
        return max(2000, int(count * scale))

    def flooded(qos: int) -> Callable[[Contender, int], Run]:
        return lambda contender, count: flood(contender, feeder, qos, count, folder)

    def brokered(qos: int) -> Callable[[Contender, int], Run]:
        return lambda contender, count: behind_mosquitto(contender, feeder, qos, count, folder, rate)

    few = max(1, repetitions // 2)
    big, small, slow = scaled(1_500_000), scaled(500_000), scaled(150_000)
    cpu, cpu_slow = scaled(400_000), scaled(60_000)
    return [
        Case("flood-qos0-jsonl", GMQTT, flooded(0), big, small, repetitions, "rate", "messages/s"),
        Case("flood-qos1-jsonl", GMQTT, flooded(1), big, small, repetitions, "rate", "messages/s"),
        Case("flood-qos0-jsonl-paho", PAHO, flooded(0), big, slow, few, "rate", "messages/s"),
        Case("flood-qos1-jsonl-paho", PAHO, flooded(1), big, slow, few, "rate", "messages/s"),
        Case("flood-qos0-jsonl-aiomqtt", AIOMQTT, flooded(0), big, slow, few, "rate", "messages/s"),
        Case("flood-qos1-jsonl-aiomqtt", AIOMQTT, flooded(1), big, slow, few, "rate", "messages/s"),
        Case("mosquitto-qos0-cpu", GMQTT, brokered(0), cpu, cpu, repetitions, "cpu", "us/message"),
        Case(
            "mosquitto-qos0-cpu-mosquitto_sub",
            MOSQUITTO_SUB,
            brokered(0),
            cpu,
            cpu,
            repetitions,
            "cpu",
            "us/message",
        ),
        Case("mosquitto-qos0-cpu-paho", PAHO, brokered(0), cpu, cpu_slow, few, "cpu", "us/message"),
        Case("mosquitto-qos0-cpu-aiomqtt", AIOMQTT, brokered(0), cpu, cpu_slow, few, "cpu", "us/message"),
        Case("mosquitto-qos1-cpu", GMQTT, brokered(1), cpu // 4, cpu // 4, few, "cpu", "us/message"),
    ]


def measured(case: Case, peaks: dict[str, float], progress: bool) -> dict[str, object]:
    ours_figures, peer_figures = [], []
    for _ in range(case.repetitions):
        for contender, count, figures in (
            (OURS, case.count, ours_figures),
            (case.peer, case.peer_count, peer_figures),
        ):
            run = case.measure(contender, count)
            figures.append(getattr(run, case.figure))
            peaks[contender.name] = max(peaks.get(contender.name, 0.0), run.memory)
            if progress:
                print(
                    f"\r\x1b[K{case.name}: {contender.name} {figures[-1]:,.2f} {case.unit}",
                    end="",
                    flush=True,
                )
    return row(
        case.name, statistics.median(ours_figures), statistics.median(peer_figures), case.peer.name, case.unit
    )


def row(case: str, ours_figure: float, peer_figure: float, peer_name: str, unit: str) -> dict[str, object]:
    return {
        "case": case,
        "ours": round(ours_figure, 3),
        "peer": round(peer_figure, 3),
        "peer_name": peer_name,
        "ratio": round(ours_figure / peer_figure, 3),
        "unit": unit,
    }


def show(one: dict[str, object]) -> str:
    figures = f"{one['ours']:>14,.2f} {one['peer']:>14,.2f} {one['ratio']:>8.2f}"
    return f"{one['case']!s:<34}{figures}  {one['unit']!s:<12}{one['peer_name']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the message counts")
    parser.add_argument(
        "--rate", type=float, default=0, help="messages/s into mosquitto; 0 is as fast as it takes"
    )
    parser.add_argument("--quick", action="store_true", help="one small repetition, to see that it works")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "latest.json")
    arguments = parser.parse_args()
    if sys.platform != "linux":
        print("The benchmark reads /proc: run it on Linux.", file=sys.stderr)
        return 2
    scale, repetitions = (0.02, 1) if arguments.quick else (arguments.scale, arguments.repetitions)
    rows: list[dict[str, object]] = []
    peaks: dict[str, float] = {}
    progress = sys.stdout.isatty()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        feeder = folder / "feeder"
        subprocess.run(["gcc", "-O2", "-Wall", "-o", str(feeder), str(HERE / "feeder.c")], check=True)
        heads = f"{'ours':>14} {'peer':>14} {'ratio':>8}"
        print(f"{'case':<34}{heads}  {'unit':<12}peer")
        for case in cases(feeder, folder, scale, repetitions, arguments.rate):
            if arguments.only in case.name:
                rows.append(measured(case, peaks, progress))
                print(("\r\x1b[K" if progress else "") + show(rows[-1]), flush=True)
        for more in (quic_rows, nng_rows, ws_rows, drop_in_rows, negotiation_rows):
            for one in more(folder, repetitions, scale, arguments.only, pin):
                rows.append(one)
                print(show(one), flush=True)
        if GMQTT.name in peaks:
            rows.append(row("peak-memory", peaks[OURS.name], peaks[GMQTT.name], GMQTT.name, "MiB"))
            print(show(rows[-1]))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"\nratio is ours over the peer's; written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
