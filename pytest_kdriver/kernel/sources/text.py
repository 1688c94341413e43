r"""Debug output as text on a serial port: each line is a print.

A kernel that has no KD on its port, or was not told to use it, may write what is printed as text. ReactOS
does (``/DEBUG /DEBUGPORT=COM1``), and a bug check ends at the prompt of its own debugger::

    (/ntoskrnl/mm/ARM3/sysldr.c:170) Loading: \SystemRoot\bug.sys at FFFFF88004EBE000 with 7 pages
    *** Fatal System Error: 0xdeadbeef
                           (0x0000000000000001,0x0000000000000002,0x0000000000000003,0x0000000000000004)
    Entered debugger on embedded INT3 at 0x0010:0xFFFFF80000587D22.
    <bug.sys:1029>
    kdb:>

The forms are those of its source: ke/bug.c, kdbg/kdb.c, kdbg/kdb_cli.c and mm/ARM3/sysldr.c of ntoskrnl, and
sdk/lib/rtl/assert.c. Nothing says who printed a line, so a driver that prints one of these is believed. An
exception that nobody handles is told as the bug check that it becomes.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import PureWindowsPath
from typing import Final

from pytest_kdriver.kernel.bug_checks import parse_fatal
from pytest_kdriver.kernel.events import (
    Breakpoint,
    BugCheck,
    DebugPrint,
    Event,
    ImageLoaded,
    ImageUnloaded,
)
from pytest_kdriver.kernel.images import has

LINE_WAITS: Final = 0.25
"""Seconds after which what is no whole line is told as it is."""

BUG_CHECK_WAITS: Final = 2.0
"""Seconds from a bug check's text on that its backtrace is waited for; a prompt ends it at once."""

LINE_MOST: Final = 4096
"""Bytes. A longer line is told in pieces, and not looked at."""

_BUG_CHECK_LINES: Final = 64
_STACK_MOST: Final = 32
_IMAGES_MOST: Final = 1024
_ANSWERS_MOST: Final = 4096
_PAGE: Final = 4096

_FATAL: Final = "*** Fatal System Error:"
_PROMPT: Final = re.compile(
    rb"(?P<debugger>kdb:> )|(?P<pager>--- Press q to abort[^\r\n]{0,80}? ---)|(?P<assertion>Break "
    rb"repeatedly, break Once, Ignore, terminate Process or terminate Thread \(boipt\)\? )"
)
_ANSWERS: Final = {
    "debugger": b"cont\r",  # a breakpoint is stepped over, an exception goes on to be a bug check
    "pager": b"q",
    "assertion": b"o\r",  # break once: as a breakpoint
}
_LOADING: Final = re.compile(
    r"\(/ntoskrnl/mm/ARM3/sysldr\.c:\d{1,6}\) Loading: (\S.{0,500}) at ([0-9A-F]{8,16})"
    r" with ([0-9a-f]{1,6}) pages"
)
_UNLOADED: Final = re.compile(
    r"\(/ntoskrnl/mm/ARM3/sysldr\.c:\d{1,6}\) Leaking driver: (\S.{0,500})"
)
_INT3: Final = re.compile(
    r"Entered debugger on embedded INT3 at 0x[0-9A-Fa-f]{1,4}:0x([0-9A-Fa-f]{1,16})\."
)
_FRAME: Final = re.compile(r"<([^<>:]{1,100}): ?([0-9a-f]{1,16})(?: \([^<>]*\))?>")

_BREAKPOINT: Final = 0x80000003


@dataclass(slots=True)
class _BugCheckText:
    time: float
    lines: list[str] = field(default_factory=list)
    told: bool = False


class SerialText:
    """Makes events of serial text, and answers its prompts; a ``Source``.

    The line breaks, CR LF on the wire, are the guest's LF again. At the prompt behind a bug check nothing is
    answered: the guest stays there. Another prompt of the debugger is answered by "cont", a pager by "q", an
    assertion by "o", break once. ReactOS listens to that with ``/KDSERIAL`` only.
    """

    def __init__(self) -> None:
        self._line = bytearray()
        self._told = 0
        """So much of the line was told when it did not go on."""
        self._whole = True
        """The line is here from its first byte on."""
        self._since: float | None = None
        """When the first byte came that is not told yet."""
        self._bug_check: _BugCheckText | None = None
        self._images: OrderedDict[str, ImageLoaded] = OrderedDict()
        self._answers = bytearray()

    def receive_data(self, data: bytes, now: float) -> list[Event]:
        """The events of ``data``, and those that are due at ``now``; ``Source`` says more."""
        events: list[Event] = []
        self._do_what_is_due(now, events)
        *ended, last = data.split(b"\n")
        for piece in ended:
            self._add(piece, now, events)
            self._end_line(now, events)
        self._add(last, now, events)
        return events

    def attach(self, now: float) -> None:  # noqa: ARG002 -- as the KD session's, which counts from there
        """Take up a guest that was put back to a snapshot: what was half told is void, images stay."""
        self._line.clear()
        self._told = 0
        self._whole = True
        self._since = None
        self._bug_check = None
        self._answers.clear()

    def data_to_send(self) -> bytes:
        """The answers to prompts."""
        answers = bytes(self._answers)
        self._answers.clear()
        return answers

    def next_deadline(self) -> float | None:
        """When a cut line, or a bug check without a prompt, has waited long enough."""
        deadlines = []
        if self._since is not None:
            deadlines.append(self._since + LINE_WAITS)
        if self._bug_check is not None and not self._bug_check.told:
            deadlines.append(self._bug_check.time + BUG_CHECK_WAITS)
        return min(deadlines, default=None)

    def _do_what_is_due(self, now: float, events: list[Event]) -> None:
        if self._since is not None and now >= self._since + LINE_WAITS:
            end = len(self._line) - self._line.endswith(b"\r")  # the line's end may be cut, too
            self._tell(end, now, events)
        if self._bug_check is not None and now >= self._bug_check.time + BUG_CHECK_WAITS:
            self._tell_bug_check(now, events)

    def _add(self, piece: bytes, now: float, events: list[Event]) -> None:
        """Add to the line what has no line's end in it."""
        if not piece:
            return
        self._line += piece
        if self._since is None:
            self._since = now
        if self._whole and (prompt := _PROMPT.match(self._line)):
            end, kind = prompt.end(), str(prompt.lastgroup)
            self._tell(end, now, events)
            self._drop(end, now)
            self._answer(kind, now, events)
        while len(self._line) > LINE_MOST:
            self._tell(LINE_MOST, now, events)
            self._drop(LINE_MOST, now)

    def _end_line(self, now: float, events: list[Event]) -> None:
        if self._line.endswith(b"\r"):
            del self._line[-1]
        self._line += b"\n"
        self._tell(len(self._line), now, events)
        if self._whole:
            self._read(self._line.decode("utf-8", "backslashreplace").rstrip(), now, events)
        self._drop(len(self._line), now)
        self._whole = True

    def _tell(self, end: int, now: float, events: list[Event]) -> None:
        """Tell the line up to ``end``, less what was told of it before."""
        if end > self._told:
            events.append(DebugPrint(now, None, bytes(self._line[self._told : end])))
            self._told = end
        self._since = None

    def _drop(self, end: int, now: float) -> None:
        """Forget the line up to ``end``; what stands behind is no whole line."""
        del self._line[:end]
        self._told = 0
        self._whole = False
        self._since = now if self._line else None

    def _answer(self, kind: str, now: float, events: list[Event]) -> None:
        if kind == "debugger" and self._bug_check is not None:
            self._tell_bug_check(now, events)
            self._bug_check = None
        elif len(self._answers) < _ANSWERS_MOST:
            self._answers += _ANSWERS[kind]

    def _read(self, line: str, now: float, events: list[Event]) -> None:
        """Look at a whole line for more than a print."""
        if _FATAL in line:
            self._tell_bug_check(now, events)
            self._bug_check = _BugCheckText(now)
        if self._bug_check is not None:
            if len(self._bug_check.lines) < _BUG_CHECK_LINES:
                self._bug_check.lines.append(line)
        elif int3 := _INT3.fullmatch(line):
            address = int(int3[1], 16)
            events.append(Breakpoint(now, self._driver_at(address), _BREAKPOINT, address))
        if loading := _LOADING.fullmatch(line):
            path = PureWindowsPath(loading[1])
            base, size = int(loading[2], 16), int(loading[3], 16) * _PAGE
            image = ImageLoaded(now, path.stem, base, size, loading[1])
            self._images[path.name.lower()] = image
            self._images.move_to_end(path.name.lower())
            if len(self._images) > _IMAGES_MOST:
                self._images.popitem(last=False)
            events.append(image)
        elif unloaded := _UNLOADED.fullmatch(line):
            gone = self._images.pop(unloaded[1].lower(), None)
            if gone is not None:
                events.append(ImageUnloaded(now, gone.driver, gone.base, gone.path))

    def _tell_bug_check(self, now: float, events: list[Event]) -> None:
        """Tell the bug check that text was gathered of, if it is one, and was not told."""
        text = self._bug_check
        if text is None or text.told:
            return
        text.told = True
        fatal = parse_fatal("\n".join(text.lines))
        if fatal is not None:
            code, parameters, blamed = fatal
            stack = self._stack(text.lines)
            events.append(BugCheck(now, None, code, parameters, blamed=blamed, stack=stack))

    def _stack(self, lines: list[str]) -> tuple[int, ...]:
        """The backtrace's addresses: of the frames in images that were seen being loaded."""
        frames = [frame for line in lines if (frame := _FRAME.fullmatch(line))]
        known = [(self._images.get(frame[1].lower()), int(frame[2], 16)) for frame in frames]
        return tuple(image.base + offset for image, offset in known if image)[:_STACK_MOST]

    def _driver_at(self, address: int) -> str | None:
        return next((i.driver for i in self._images.values() if has(i, address)), None)
