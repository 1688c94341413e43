"""The kernel log: everything that was seen happening in the guest's kernel, in order.

One writer side (the pump, and the target for what only it can see), many readers. Old events go to a
file, in segments, so that a driver that prints for an hour costs disk and not memory; reading them back
is no different from reading new ones.
"""

from __future__ import annotations

import errno
import operator
import os
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, TypeVar, cast, get_args

from pytest_kdriver.kernel.events import DebugPrint, Event, KernelMessage

E = TypeVar("E", bound=Event)

SEGMENT_EVENTS: Final = 4096
SEGMENT_BYTES: Final = 1 << 20
"""A segment is closed at so many events, or bytes of text, whichever comes first."""

SEGMENTS_IN_MEMORY: Final = 4

_KINDS: Final = get_args(Event)
_KIND_OF: Final = {kind: number for number, kind in enumerate(_KINDS)}
_FIELDS_OF: Final = {
    kind: operator.attrgetter(*(field.name for field in fields(kind))) for kind in _KINDS
}


@dataclass(slots=True)
class _Segment:
    start: int
    events: list[Event] | None
    offset: int = 0
    length: int = 0
    kinds: frozenset[type[Event]] | None = None
    """The kinds of its events, known once it is closed."""

    def may_have(self, kinds: Collection[type[object]]) -> bool:
        return not kinds or self.kinds is None or not self.kinds.isdisjoint(kinds)


class KernelLog:
    """An append-only, thread-safe, bounded log of events. A position in it is a number of events.

    ``spill`` is the file for old events, made when first needed. It is held open for as long as the log
    lives, so that it can be read even when it was removed. Without it, or where the disk is full,
    everything stays in memory.
    """

    def __init__(self, spill: Path | None = None) -> None:
        self._spill = spill
        self._file: int | None = None
        self._file_size = 0
        self._segments: list[_Segment] = [_Segment(0, [])]
        self._bytes = 0
        self._length = 0
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return self._length

    @property
    def closed(self) -> bool:
        """Nothing more will come."""
        return self._closed

    def append(self, events: Sequence[Event]) -> None:
        """Add ``events`` at the end, and wake those who wait."""
        if not events:
            return
        with self._changed:
            for event in events:
                last = self._segments[-1]
                assert last.events is not None
                last.events.append(event)
                if type(event) is DebugPrint:
                    self._bytes += len(event.raw)
                elif type(event) is KernelMessage:
                    self._bytes += len(event.text)
                if len(last.events) >= SEGMENT_EVENTS or self._bytes >= SEGMENT_BYTES:
                    self._close_segment(last)
            self._length += len(events)
            self._changed.notify_all()

    def close(self) -> None:
        """Say that nothing more will come. What is there can still be read."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Event]:
        """The events from position ``start`` up to ``stop``, or up to the end as it is now."""
        for _, event in self.numbered(start, stop):
            yield event

    def numbered(
        self, start: int = 0, stop: int | None = None, kinds: Collection[type[object]] = ()
    ) -> Iterator[tuple[int, Event]]:
        """The same, each with its position; where ``kinds`` are named, those alone.

        What was spilled and has none of them is not read back.
        """
        with self._changed:
            stop = self._length if stop is None else min(stop, self._length)
            segments = [
                (segment, segment.events) for segment in self._segments if segment.start < stop
            ]
        for number, (segment, in_memory) in enumerate(segments):
            following = segments[number + 1][0].start if number + 1 < len(segments) else stop
            if following <= start or not segment.may_have(kinds):
                continue
            events = in_memory if in_memory is not None else self._load(segment)
            first = max(start - segment.start, 0)
            for position, event in enumerate(
                events[first : stop - segment.start], segment.start + first
            ):
                if not kinds or type(event) in kinds:
                    yield position, event

    def wait(self, position: int, deadline: float) -> bool:
        """Wait until the log is longer than ``position``; False at ``deadline`` (monotonic) or the end."""
        with self._changed:
            while self._length <= position and not self._closed:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
            return self._length > position

    def window(self, driver: str | None, start: int | None = None) -> Window:
        """What comes from now, or from ``start``, on. See ``Window``."""
        return Window(self, driver, self._length if start is None else start)

    def _close_segment(self, last: _Segment) -> None:
        assert last.events is not None
        self._bytes = 0
        last.kinds = frozenset(map(type, last.events))
        self._segments.append(_Segment(last.start + len(last.events), []))
        if len(self._segments) > SEGMENTS_IN_MEMORY:
            self._spill_segment(self._segments[-1 - SEGMENTS_IN_MEMORY])

    def _spill_segment(self, segment: _Segment) -> None:
        if self._spill is None or segment.events is None:
            return
        data = pickle.dumps([(_KIND_OF[type(e)], _FIELDS_OF[type(e)](e)) for e in segment.events])
        try:
            if self._file is None:
                self._spill.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
                self._file = os.open(self._spill, flags, 0o600)
                weakref.finalize(self, os.close, self._file)
            written = os.pwrite(self._file, data, self._file_size)
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._stop_spilling(error)
            return
        segment.offset, segment.length = self._file_size, len(data)
        segment.events = None
        self._file_size += len(data)

    def _stop_spilling(self, error: OSError) -> None:
        path, self._spill = self._spill, None
        told = f"the kernel log can't be written to {path} ({error.strerror}): it stays in memory"
        last = self._segments[-1].events
        assert last is not None
        last.append(KernelMessage(time.monotonic(), None, told))
        self._length += 1

    def _load(self, segment: _Segment) -> list[Event]:
        assert self._file is not None
        data = os.pread(self._file, segment.length, segment.offset)
        return [_KINDS[kind](*values) for kind, values in pickle.loads(data)]  # noqa: S301 -- ours


class Window:
    """The part of a log that belongs to one test, or to one start..stop of a driver.

    It holds what is attributed to ``driver`` and what no source can attribute; all of it where
    ``driver`` is None. It grows with the log until it is closed.
    """

    def __init__(self, log: KernelLog, driver: str | None, start: int) -> None:
        self.log = log
        self.driver = driver
        self.start = start
        self._stop: int | None = None

    @property
    def stop(self) -> int:
        """The position behind its last event, as far as that is known now."""
        return len(self.log) if self._stop is None else self._stop

    def close(self) -> None:
        """Take nothing more in."""
        if self._stop is None:
            self._stop = len(self.log)

    def events(self, start: int | None = None) -> Iterator[Event]:
        """The window's events so far, in order, from log position ``start`` on."""
        for _, event in self.numbered(start):
            yield event

    def numbered(
        self, start: int | None = None, kinds: Collection[type[object]] = ()
    ) -> Iterator[tuple[int, Event]]:
        """The same, each with its position in the log; where ``kinds`` are named, those alone."""
        begin = self.start if start is None else max(start, self.start)
        for position, event in self.log.numbered(begin, self._stop, kinds):
            if self.driver is None or event.driver is None or event.driver == self.driver:
                yield position, event

    def of(self, kind: type[E], start: int | None = None) -> Iterator[E]:
        """The window's events of one kind."""
        return (cast("E", event) for _, event in self.numbered(start, (kind,)))

    def wait_for(
        self, wanted: Callable[[int, Event], bool], timeout: float, start: int | None = None
    ) -> tuple[int, Event] | None:
        """The first event from ``start`` on that is ``wanted``, with its position. None: not in time."""
        deadline = time.monotonic() + timeout
        position = self.start if start is None else start
        while True:
            seen = len(self.log)
            for at, event in self.numbered(position):
                if wanted(at, event):
                    return at, event
            position = max(position, min(seen, self.stop))
            if self._stop is not None or not self.log.wait(position, deadline):
                return None
