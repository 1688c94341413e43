"""The pump: from a socket through a source into the log, to the end and beyond."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from pytest_kdriver.kernel.events import DebugPrint, Event, KernelMessage
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.kernel.sources.wine import FRAME_HEADER
from pytest_kdriver.targets.pump import MessagePump


@dataclass
class FakeSource:
    """Makes a print of each frame; breaks at a message that asks for it."""

    senders: list[int] = field(default_factory=list)

    def receive_data(self, data: bytes, now: float) -> list[Event]:
        events: list[Event] = []
        while data:
            length, sender = FRAME_HEADER.unpack_from(data)
            message = data[FRAME_HEADER.size : FRAME_HEADER.size + length]
            data = data[FRAME_HEADER.size + length :]
            if message == b"break":
                raise ValueError("it broke")
            self.senders.append(sender)
            events.append(DebugPrint(now, None, message))
        return events

    def data_to_send(self) -> bytes:
        return b""

    def next_deadline(self) -> float | None:
        return None


Pumped = tuple[socket.socket, KernelLog, MessagePump, FakeSource]


@pytest.fixture
def pumped() -> Iterator[Pumped]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    log, source = KernelLog(), FakeSource()
    pump = MessagePump(ours, source, log, "test")
    with theirs:
        yield theirs, log, pump, source
    pump.close()


def printed(log: KernelLog, count: int) -> list[bytes]:
    window = log.window(None, 0)
    window.wait_for(lambda at, _: at + 1 >= count, 30.0)
    return [event.raw for event in window.of(DebugPrint)]


def test_each_message_arrives_whole_with_its_sender(pumped: Pumped) -> None:
    theirs, log, _, source = pumped
    messages = [b"%d\n" % number for number in range(2000)]
    for message in messages:
        theirs.send(message)
    assert printed(log, 2000) == messages
    assert set(source.senders) == {os.getpid()}


def test_what_has_arrived_is_read_before_it_closes(pumped: Pumped) -> None:
    theirs, log, pump, _ = pumped
    for _ in range(100):
        theirs.send(b"x")
    pump.close()
    assert len(log) == 100


def test_a_source_that_breaks_is_told_and_holds_up_nobody(pumped: Pumped) -> None:
    theirs, log, pump, _ = pumped
    theirs.send(b"break")
    theirs.settimeout(30)
    for _ in range(10_000):  # more than the socket holds
        theirs.send(b"y" * 100)
    pump.close()
    assert pump.failure == "ValueError: it broke"
    (told,) = log.read()
    assert isinstance(told, KernelMessage)
    assert told.text == "the kernel log ends here: ValueError: it broke"


def test_it_rests_when_nobody_is_left_to_talk(pumped: Pumped) -> None:
    theirs, log, pump, _ = pumped
    theirs.send(b"last")
    theirs.close()
    assert printed(log, 1) == [b"last"]
    before = time.process_time()
    log.wait(1, time.monotonic() + 0.3)
    assert time.process_time() - before < 0.2
    pump.close()


def test_who_catches_up_has_all_that_was_written_before(pumped: Pumped) -> None:
    theirs, log, pump, _ = pumped
    for number in range(1000):
        theirs.send(b"%d" % number)
        pump.catch_up()
        assert len(log) == number + 1


def test_who_catches_up_does_not_wait_for_what_is_written_meanwhile(pumped: Pumped) -> None:
    theirs, log, pump, _ = pumped
    done = threading.Event()

    def flood() -> None:
        while not done.is_set():
            theirs.send(b"more")

    writer = threading.Thread(target=flood)
    writer.start()
    try:
        log.window(None, 0).wait_for(lambda at, _: at > 100, 30.0)
        for _ in range(20):
            pump.catch_up()
    finally:
        done.set()
        writer.join()
    assert len(log) > 100


def test_to_catch_up_with_one_that_has_nothing_more_to_say_is_no_wait(pumped: Pumped) -> None:
    theirs, log, pump, _ = pumped
    theirs.send(b"last")
    theirs.shutdown(socket.SHUT_RDWR)
    pump.catch_up()
    pump.catch_up()
    assert [event.raw for event in log.window(None, 0).of(DebugPrint)] == [b"last"]
