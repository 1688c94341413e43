"""The kernel log and its windows: order, attribution, waiting, and events that went to disk."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_kdriver.kernel import log as log_module
from pytest_kdriver.kernel.events import (
    BugCheck,
    DebugPrint,
    DriverInit,
    Event,
    KernelMessage,
    PoolAllocated,
    UnhandledException,
)
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.ntstatus import NTSTATUS


def prints(count: int, driver: str | None = "a", start: int = 0) -> list[Event]:
    return [DebugPrint(float(i), driver, b"%d\n" % i) for i in range(start, start + count)]


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "SEGMENT_EVENTS", 8)


def test_a_window_has_its_driver_s_events_and_nobody_s() -> None:
    log = KernelLog()
    log.append(prints(1))
    window = log.window("a")
    log.append([*prints(1, "a"), *prints(1, "b"), *prints(1, None)])
    assert [event.driver for event in window.events()] == ["a", None]
    assert len(list(log.window(None, 0).events())) == 4


def test_a_closed_window_takes_nothing_more_in() -> None:
    log = KernelLog()
    window = log.window("a")
    log.append(prints(2))
    window.close()
    log.append(prints(2))
    assert len(list(window.events())) == 2
    assert window.stop == 2


@pytest.mark.usefixtures("small_segments")
def test_old_events_go_to_disk_and_come_back_the_same(tmp_path: Path) -> None:
    events: list[Event] = [
        *prints(100),
        DriverInit(1.0, "a", 7, NTSTATUS(0xC0DE1234)),
        BugCheck(1.0, None, 0xE2, (1, 2, 3, 4)),
        UnhandledException(1.0, "a", 0xC0000005, 16, ("write", 16)),
        PoolAllocated(1.0, "a", 1, 2, b"rust", "PagedPool", 3),
        *prints(100, start=100),
    ]
    log = KernelLog(tmp_path / "deep" / "spill")
    for event in events:
        log.append([event])
    assert (tmp_path / "deep" / "spill").stat().st_size > 0
    assert list(log.read()) == events
    assert list(log.read(50, 60)) == events[50:60]
    assert len(log) == len(events)


@pytest.mark.usefixtures("small_segments")
def test_what_is_in_memory_is_bounded(tmp_path: Path) -> None:
    log = KernelLog(tmp_path / "spill")
    log.append(prints(1000))
    in_memory = sum(len(s.events) for s in log._segments if s.events is not None)
    assert in_memory <= 8 * (log_module.SEGMENTS_IN_MEMORY + 1)


def test_few_long_lines_go_to_disk_too(tmp_path: Path) -> None:
    log = KernelLog(tmp_path / "spill")
    long = DebugPrint(0.0, "a", b"x" * (1 << 18))
    for _ in range(40):
        log.append([long])
    in_memory = sum(len(s.events) for s in log._segments if s.events is not None)
    assert in_memory < 40
    assert list(log.read()) == [long] * 40


@pytest.mark.usefixtures("small_segments")
def test_a_log_that_can_t_be_written_says_so_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = KernelLog(tmp_path / "file" / "spill")  # its folder can't be made
    log.append(prints(100))
    told = [event for event in log.read() if isinstance(event, KernelMessage)]
    assert [event.raw for event in log.read() if isinstance(event, DebugPrint)] == [
        b"%d\n" % i for i in range(100)
    ]
    assert len(told) == 1
    assert "it stays in memory" in told[0].text
    assert len(list(log.read())) == len(log)


@pytest.mark.usefixtures("small_segments")
def test_a_full_disk_is_told_and_loses_nothing() -> None:
    full = Path("/dev/full")
    log = KernelLog(full)
    log.append(prints(100))
    assert len([event for event in log.read() if isinstance(event, DebugPrint)]) == 100
    assert any("No space left" in e.text for e in log.read() if isinstance(e, KernelMessage))


def test_waiting_ends_with_the_event() -> None:
    log = KernelLog()
    window = log.window("a")
    thread = threading.Timer(0.05, lambda: log.append(prints(3)))
    thread.start()
    found = window.wait_for(lambda _, e: isinstance(e, DebugPrint) and e.raw == b"2\n", 30.0)
    thread.join()
    assert found == (2, DebugPrint(2.0, "a", b"2\n"))


def test_waiting_ends_with_the_time_and_with_the_log() -> None:
    log = KernelLog()
    window = log.window("a")
    begin = time.monotonic()
    assert window.wait_for(lambda _p, _e: True, 0.05) is None
    assert time.monotonic() - begin >= 0.05
    log.close()
    assert window.wait_for(lambda _p, _e: True, 30.0) is None
    assert log.closed


def test_another_driver_s_events_do_not_end_the_waiting() -> None:
    log = KernelLog()
    window = log.window("a")
    log.append(prints(5, "b"))
    assert window.wait_for(lambda _p, _e: True, 0.05) is None


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", None]), max_size=60),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_any_part_reads_as_a_list_would(
    tmp_path_factory: pytest.TempPathFactory, drivers: list[str | None], start: int, stop: int
) -> None:
    events = [DebugPrint(float(i), driver, b"") for i, driver in enumerate(drivers)]
    log = KernelLog(tmp_path_factory.mktemp("log") / "spill")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_module, "SEGMENT_EVENTS", 4)
        log.append(events)
    assert list(log.read(start, stop)) == events[start:stop]
