"""The DbgPrint view of a window: what a driver printed, line by line."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence

from pytest_kdriver.errors import NoSuchLine
from pytest_kdriver.kernel.crash import is_crash
from pytest_kdriver.kernel.events import DebugPrint, Event
from pytest_kdriver.kernel.log import Window

DEFAULT_TIMEOUT = 5.0
"""Seconds that ``expect`` and ``wait_for`` wait. What was printed during a Driver call is there already."""

_SHOWN = 30


class DbgPrint:
    """What was printed in a window: by the driver, and by nobody knows whom.

    One call in the guest gives one or more lines, calls are never joined. ``expect`` and ``wait_for``
    move a cursor, so that each finds what comes after the last one's line; nothing else does.
    """

    def __init__(
        self,
        window: Window,
        *,
        driver: str,
        target: str,
        on_crash: Callable[[], BaseException | None],
    ) -> None:
        self._window = window
        self._driver = driver
        self._target = target
        self._on_crash = on_crash
        self._position = window.start
        self._skip = 0

    @property
    def lines(self) -> list[str]:
        r"""All lines so far. Bytes that are not UTF-8 show as ``\xNN``."""
        return [line for event in self._window.of(DebugPrint) for line in event.lines]

    @property
    def raw(self) -> list[bytes]:
        """Each call's text as the guest encoded it."""
        return [event.raw for event in self._window.of(DebugPrint)]

    @property
    def events(self) -> Iterator[DebugPrint]:
        """The calls themselves, with time, component and level."""
        return self._window.of(DebugPrint)

    def expect(self, line: str, *, timeout: float = DEFAULT_TIMEOUT) -> str:
        """Wait for the next whole line equal to ``line``, and move the cursor behind it.

        ``timeout`` is in seconds. Raises ``NoSuchLine``, and ``DriverCrashed`` as soon as the driver
        crashes.
        """
        return self._wait(lambda text: text == line, repr(line), timeout)

    def wait_for(self, pattern: str, *, timeout: float = DEFAULT_TIMEOUT) -> str:
        """Wait for the next line that matches ``pattern`` (fnmatch), move the cursor, give the line."""
        matches = re.compile(fnmatch.translate(pattern)).match
        return self._wait(lambda text: matches(text) is not None, f"matching {pattern!r}", timeout)

    def fnmatch_lines(self, patterns: Sequence[str]) -> None:
        """Check that lines matching ``patterns`` (fnmatch) were printed, in this order, others between.

        Raises ``NoSuchLine``.
        """
        self._in_order([fnmatch.translate(pattern) for pattern in patterns], patterns)

    def re_match_lines(self, patterns: Sequence[str]) -> None:
        """The same with regular expressions, matched at the start of a line."""
        self._in_order(patterns, patterns)

    def no_fnmatch_line(self, pattern: str) -> None:
        """Check that no line matches ``pattern`` (fnmatch). Raises ``NoSuchLine`` naming one that does."""
        matches = re.compile(fnmatch.translate(pattern)).match
        for line in self.lines:
            if matches(line):
                raise self._error(f"a line matches {pattern!r}, and none should: {line!r}")

    def _in_order(self, expressions: Sequence[str], shown: Sequence[str]) -> None:
        lines = iter(self.lines)
        for expression, pattern in zip(expressions, shown, strict=True):
            matches = re.compile(expression).match
            if not any(matches(line) for line in lines):
                raise self._error(f"no line matching {pattern!r}" + _printed(self.lines))

    def _wait(self, fits: Callable[[str], bool], wanted: str, timeout: float) -> str:
        crash: BaseException | None = None

        def interesting(position: int, event: Event) -> bool:
            nonlocal crash
            if isinstance(event, DebugPrint):
                return any(fits(line) for line in self._unread(position, event))
            if is_crash(event, self._driver):
                crash = self._on_crash()
            return crash is not None

        found = self._window.wait_for(interesting, timeout, self._position)
        if found is None:
            left = [
                line
                for position, event in self._window.numbered(self._position)
                if isinstance(event, DebugPrint)
                for line in self._unread(position, event)
            ]
            raise self._error(f"no line {wanted} within {timeout:g} s" + _printed(left))
        position, event = found
        if not isinstance(event, DebugPrint):
            assert crash is not None
            raise crash
        unread = self._unread(position, event)
        at = next(number for number, line in enumerate(unread) if fits(line))
        self._skip = at + 1 + (self._skip if position == self._position else 0)
        self._position = position
        return unread[at]

    def _unread(self, position: int, event: DebugPrint) -> list[str]:
        """The event's lines behind the cursor."""
        return event.lines[self._skip :] if position == self._position else event.lines

    def _error(self, message: str) -> NoSuchLine:
        return NoSuchLine(message, driver=self._driver, target=self._target)


def _printed(lines: Sequence[str]) -> str:
    if not lines:
        return "; nothing was printed"
    shown = "".join(f"\n    {line}" for line in lines[-_SHOWN:])
    more = f" (the last {_SHOWN} of {len(lines)} lines)" if len(lines) > _SHOWN else ""
    return f"; what was printed{more}:{shown}"
