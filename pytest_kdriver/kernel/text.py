"""Events as lines that a person reads: a failed test's report, and the last lines in an error."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator

from pytest_kdriver.kernel.crash import describe
from pytest_kdriver.kernel.events import (
    Breakpoint,
    BugCheck,
    DebugPrint,
    DriverInit,
    DriverInitCalled,
    DriverLoadFailed,
    DriverUnload,
    DriverUnloadCalled,
    Event,
    ImageLoaded,
    ImageUnloaded,
    KernelMessage,
    MissingExport,
    ProcessDied,
    ProcessorState,
    UnhandledException,
)
from pytest_kdriver.kernel.images import Modules
from pytest_kdriver.kernel.log import Window

LOOKED_AT = 20_000
"""So many of a window's last events are looked at, so that an error behind a flood does not take seconds."""

LAST_LINES = 12
"""How many lines of the kernel log an error shows."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(line: str) -> str:
    r"""``line`` without what a terminal would act on: control characters are shown as ``\xNN``."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", line)


def kernel_lines(window: Window, most: int) -> list[str]:
    """The last ``most`` lines of a window, each with its seconds. Pool calls are left out.

    The seconds count from the first event that was looked at, of at most ``LOOKED_AT``.
    """
    return list(deque(all_lines(window, window.stop - LOOKED_AT), maxlen=most))


def all_lines(window: Window, start: int | None = None) -> Iterator[str]:
    """All lines of a window from log position ``start`` on, as ``kernel_lines`` has them."""
    begin: float | None = None
    for position, event in window.numbered(start):
        begin = event.time if begin is None else begin
        if isinstance(event, ProcessorState):
            lines = _processor(event, Modules(window.log, position))
        else:
            lines = describe_event(event)
        for line in lines:
            yield f"{event.time - begin:8.3f}  {printable(line)}"


def _processor(state: ProcessorState, modules: Modules) -> list[str]:
    """Where a processor is, and what it was called by."""
    at, *stack = (modules.where(a) or f"0x{a:X}" for a in (state.address, *state.stack))
    return [f"processor {state.processor} is at {at}", *(f"    {caller}" for caller in stack)]


def describe_event(event: Event) -> list[str]:
    """An event in words; nothing for those that would only be noise."""
    match event:
        case DebugPrint():
            return [f"{event.driver or '?'}: {line}" for line in event.lines]
        case DriverInitCalled():
            return [f"{event.driver}: DriverEntry is called, at 0x{event.entry:X}"]
        case DriverInit():
            return [f"{event.driver}: DriverEntry returned {event.status}"]
        case DriverLoadFailed():
            return [f"{event.driver}: the load failed with {event.status}"]
        case DriverUnloadCalled():
            return [f"{event.driver}: DriverUnload is called"]
        case DriverUnload():
            return [f"{event.driver}: DriverUnload returned"]
        case ImageLoaded():
            return [f"{event.driver}: lies at 0x{event.base:X}, {event.size} bytes"]
        case ImageUnloaded():
            return [f"{event.driver}: is gone from 0x{event.base:X}"]
        case ProcessorState():
            return [f"processor {event.processor} is at 0x{event.address:X}"]
        case BugCheck() | Breakpoint() | UnhandledException() | MissingExport() | ProcessDied():
            return [f"{event.driver or '?'}: {describe(event)}"]
        case KernelMessage():
            return [f"{event.driver or '?'}: {event.text}"]
        case _:
            return []
