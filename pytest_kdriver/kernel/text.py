"""Events as lines that a person reads: a failed test's report, and the last lines in an error."""

from __future__ import annotations

from collections import deque

from pytest_kdriver.kernel.bugcheck import describe
from pytest_kdriver.kernel.events import (
    BugCheck,
    DebugPrint,
    DriverInit,
    DriverInitCalled,
    DriverLoadFailed,
    DriverUnload,
    DriverUnloadCalled,
    Event,
    ImageLoaded,
    KernelMessage,
    MissingExport,
    ProcessDied,
    UnhandledException,
)
from pytest_kdriver.kernel.log import Window


def kernel_lines(window: Window, most: int) -> list[str]:
    """The last ``most`` lines of a window, each with its seconds since the first. Pool calls are left out."""
    lines: deque[str] = deque(maxlen=most)
    begin: float | None = None
    for event in window.events():
        begin = event.time if begin is None else begin
        lines += [f"{event.time - begin:8.3f}  {line}" for line in describe_event(event)]
    return list(lines)


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
        case BugCheck() | UnhandledException() | MissingExport() | ProcessDied():
            return [f"{event.driver or '?'}: {describe(event)}"]
        case KernelMessage():
            return [f"{event.driver or '?'}: {event.text}"]
        case _:
            return []
