"""Crashes in a window: which event is one, and what it says in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from pytest_kdriver.kernel.events import BugCheck, MissingExport, ProcessDied, UnhandledException
from pytest_kdriver.kernel.log import Window
from pytest_kdriver.ntstatus import NTSTATUS

CrashEvent: TypeAlias = BugCheck | UnhandledException | MissingExport | ProcessDied
_CRASH_EVENTS = (BugCheck, UnhandledException, MissingExport, ProcessDied)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crash:
    """What a crash comes down to. ``position`` is the event's in the log."""

    position: int
    code: int | None
    parameters: tuple[int, ...]
    address: int | None
    description: str


def is_crash(event: object, driver: str) -> bool:
    """True if ``event`` says that ``driver``, or the guest as a whole, crashed."""
    if not isinstance(event, _CRASH_EVENTS):
        return False
    return event.driver == driver or (event.driver is None and isinstance(event, BugCheck))


def find_crash(window: Window, driver: str, start: int | None = None) -> Crash | None:
    """The first crash of ``driver`` from log position ``start`` on.

    The death of a process alone says little: what was said right after it, or of it by a sender that
    nobody knows, is looked for as well.
    """
    death: Crash | None = None
    for position, event in window.numbered(start, _CRASH_EVENTS):
        if not isinstance(event, _CRASH_EVENTS):
            continue
        anonymous = event.driver is None and not isinstance(event, BugCheck)
        if not is_crash(event, driver) and not anonymous:
            continue
        crash = _crash(position, event)
        if isinstance(event, ProcessDied):
            death = death or crash
        elif not anonymous or death is not None:
            return crash
    return death


def _crash(position: int, event: CrashEvent) -> Crash:
    parameters: tuple[int, ...] = ()
    code: int | None = None
    address: int | None = None
    match event:
        case BugCheck():
            code, parameters = event.code, event.parameters
        case UnhandledException():
            code, address = event.code, event.address
            parameters = (event.access[1],) if event.access else ()
        case MissingExport():
            address = event.address
        case ProcessDied():
            code = event.exit_code
    return Crash(
        position=position,
        code=code,
        parameters=parameters,
        address=address,
        description=describe(event),
    )


def describe(event: CrashEvent) -> str:
    """A crash in one line."""
    match event:
        case BugCheck():
            parameters = ", ".join(f"0x{value:X}" for value in event.parameters)
            return f"bug check 0x{event.code:X} ({parameters})"
        case UnhandledException() if event.access is not None:
            kind, touched = event.access
            return f"page fault: {kind} access to 0x{touched:X} at address 0x{event.address:X}"
        case UnhandledException():
            return f"unhandled exception {NTSTATUS(event.code)} at address 0x{event.address:X}"
        case MissingExport():
            return (
                f"call from address 0x{event.address:X} to {event.module}!{event.name}, "
                "which this kernel does not export"
            )
        case ProcessDied():
            code = (
                "unknown exit code"
                if event.exit_code is None
                else f"exit code 0x{event.exit_code:X}"
            )
            return f"the process that ran the driver ended ({code})"
