"""When the socket is left to fill: a table of reads, on a clock of our own."""

from __future__ import annotations

from tesaiot_connect.client.coalesce import Coalescer


class Reads:
    """Feeds a coalescer; sleeps as it is told."""

    def __init__(self) -> None:
        self.now = 100.0
        self.coalescer = Coalescer(self.now)

    def read(self, gap: float, messages: int, *, size: int = 100, acknowledged: bool = False) -> float:
        self.now += gap
        pause = self.coalescer.pause(size, messages, acknowledged, self.now)
        if pause:
            self.now += 2 * pause  # a late timer must not count as a gap
            self.coalescer.resumed(self.now)
        return pause


def test_a_lone_message_is_never_late() -> None:
    reads = Reads()
    assert not any(reads.read(0.001, 1) for _ in range(1000))


def test_a_stream_of_messages_is_read_a_millisecond_at_a_time() -> None:
    reads = Reads()
    assert reads.read(0.00001, 1) == 0.001
    assert all(reads.read(0.0, 64) == 0.001 for _ in range(1000))


def test_a_thin_stream_is_read_four_milliseconds_at_a_time() -> None:
    reads = Reads()
    pauses = [reads.read(0.00001, 1), *(reads.read(0.0, 20) for _ in range(4))]
    assert pauses == [0.001, 0.002, 0.004, 0.004, 0.004]
    assert reads.read(0.0, 100) == 0.004  # plenty: as it is
    assert reads.read(0.0, 200) == 0.001  # too much: shorter


def test_a_stream_that_runs_dry_is_read_at_once_again() -> None:
    reads = Reads()
    assert [reads.read(0.0, 20) for _ in range(4)][-1] == 0.004
    assert not reads.read(0.0, 10)  # in four milliseconds


def test_pausing_ends_when_it_gains_nothing() -> None:
    reads = Reads()
    assert reads.read(0.00001, 1)
    assert not reads.read(0.0, 1)  # one message in a whole millisecond
    assert not reads.read(0.001, 1)


def test_a_large_read_is_followed_at_once() -> None:
    reads = Reads()
    assert not reads.read(0.00001, 600, size=70_000)


def test_a_sender_with_a_small_window_is_hardly_ever_made_to_wait() -> None:
    reads = Reads()
    pauses = sum(reads.read(0.0001, 20, acknowledged=True) > 0 for _ in range(10_000))
    assert pauses <= 10_000 / 256 + 1


def test_a_large_window_is_found_out() -> None:
    reads = Reads()
    pauses = 0
    for _ in range(1000):  # a message at a time, many when there was a pause
        paused = reads.read(0.00003, 45 if reads.coalescer._paused else 1, acknowledged=True)
        pauses += paused > 0
    assert pauses > 700


def test_a_window_that_shrinks_is_found_out_too() -> None:
    reads = Reads()
    assert not reads.read(0.001, 100, acknowledged=True)
    assert reads.read(0.00001, 100, acknowledged=True)
    assert not reads.read(0.0, 20, acknowledged=True)
    assert not reads.read(0.00001, 20, acknowledged=True)
