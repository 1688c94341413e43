"""Crashes in a window: which event is one, and what it says in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from pytest_kdriver.kernel.bug_checks import describe_bug_check, name_of
from pytest_kdriver.kernel.caller import Caller, Callers
from pytest_kdriver.kernel.events import (
    Breakpoint,
    BugCheck,
    DebugPrint,
    MissingExport,
    ProcessDied,
    UnhandledException,
)
from pytest_kdriver.kernel.images import Images, Modules, has
from pytest_kdriver.kernel.log import Window
from pytest_kdriver.kernel.symbolizer import LoadSymbols
from pytest_kdriver.ntstatus import NTSTATUS

CrashEvent: TypeAlias = BugCheck | Breakpoint | UnhandledException | MissingExport | ProcessDied
_CRASH_EVENTS = (BugCheck, Breakpoint, UnhandledException, MissingExport, ProcessDied)
_OF_THE_GUEST = (BugCheck, Breakpoint)
"""Where they name no driver, they are everybody's."""

_BREAKPOINTS = {0x80000003: "breakpoint (int 3)", 0xC0000420: "assertion failed (int 2Ch)"}

_PANIC = re.compile(r"panicked at (.+:\d+:\d+)")
"""What the framework's panic handler prints before its bug check; std's words."""


_INSTRUCTION: Final = {
    **dict.fromkeys((0x1E, 0x3B, 0x7E, 0x8E, 0x1000007E, 0x1000008E), 1),
    **dict.fromkeys((0x50, 0xCC, 0xCD, 0xCE, 0xD5, 0xD6), 2),
    **dict.fromkeys((0xA, 0xC5, 0xD1), 3),
}
"""Which parameter of a bug check is the address of the instruction at fault, by Microsoft's bug check
reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crash:
    """What a crash comes down to. ``position`` is the event's in the log.

    ``address`` is where it was, as the guest tells it: for a call, of KeBugCheckEx too, the address that it
    would have returned to. ``instruction`` is an address in the instruction itself. ``stack`` has return
    addresses, innermost first. ``details`` are lines that say more than ``description``.
    """

    position: int
    code: int | None
    parameters: tuple[int, ...]
    address: int | None
    instruction: int | None
    description: str
    blamed: str | None = None
    stack: tuple[int, ...] = ()
    details: tuple[str, ...] = ()


def is_crash(event: object, driver: str) -> bool:
    """True if ``event`` says that ``driver``, or the guest as a whole, crashed."""
    if not isinstance(event, _CRASH_EVENTS):
        return False
    return event.driver == driver or (event.driver is None and isinstance(event, _OF_THE_GUEST))


def find_crash(
    window: Window,
    driver: str,
    start: int | None = None,
    *,
    breakpoints: bool = True,
    told_to: int = 0,
) -> Crash | None:
    """The first crash of ``driver`` from log position ``start`` on.

    The death of a process alone says little: what was said right after it, or of it by a sender that
    nobody knows, is looked for as well. An exception that ended the guest is told by its bug check.
    ``breakpoints`` may be passed over. What ended the guest before position ``told_to`` is known.
    """
    death: Crash | None = None
    for position, event in window.numbered(start, _CRASH_EVENTS):
        if not isinstance(event, _CRASH_EVENTS):
            continue
        if isinstance(event, Breakpoint) and not breakpoints:
            continue
        if event.driver is None and isinstance(event, _OF_THE_GUEST) and position < told_to:
            continue
        anonymous = event.driver is None and not isinstance(event, _OF_THE_GUEST)
        if not is_crash(event, driver) and not anonymous:
            continue
        crash = _crash(position, event)
        if isinstance(event, ProcessDied):
            death = death or crash
        elif not anonymous or death is not None:
            is_exception = isinstance(event, UnhandledException)
            return (_bug_check_of(crash, window) if is_exception else None) or crash
    return death


def _bug_check_of(exception: Crash, window: Window) -> Crash | None:
    """The guest's bug check behind an exception, which knows where that was."""
    for position, event in window.numbered(exception.position, (BugCheck,)):
        if isinstance(event, BugCheck) and event.driver is None:
            crash = _crash(position, event)
            if crash.address is None:
                crash = replace(crash, address=exception.address, instruction=exception.instruction)
            return crash
    return None


def locate_crash(crash: Crash, window: Window, driver: str, load_symbols: LoadSymbols) -> Crash:
    """``crash``, with the place in the source of ``driver`` in its description, where that is known.

    That is the first frame at its address in the driver's own source, inlined functions counted; for a
    panic, which bug-checks in the framework, what it printed. Where the kernel itself was at that address,
    it is the innermost return address in the driver. ``window`` is one with the load in it.
    """
    where = Modules(window.log, crash.position).where
    image = Images(window, driver).at(crash.position)
    callers = Callers(load_symbols)

    def place_of(address: int, instruction: int) -> Caller | None:
        if image is None or not has(image, address):
            return None
        return Caller(tuple(callers.frames(image, address, instruction)))

    place = None
    if crash.address is not None and crash.instruction is not None:
        place = place_of(crash.address, crash.instruction)
    called = [(address, place_of(address, address - 1)) for address in crash.stack]
    details = _details(crash, where, called)
    through = "at"
    if place is None:
        through = "called from"
        place = next((caller for _, caller in called if caller is not None), None)
    if place is None:
        return replace(crash, details=details)
    told = None if place.own_frames else _panic(crash, window, driver)
    if told is None:
        problem = load_symbols().problem
        told = f"{through} {place}" + (f"; no file and line: {problem}" if problem else "")
    return replace(crash, description=f"{crash.description}, {told}", details=details)


def _details(
    crash: Crash,
    where: Callable[[int], str | None],
    called: Sequence[tuple[int, Caller | None]],
) -> tuple[str, ...]:
    """What a bug check's parameters mean, whom the kernel blames, and the stack, line by line."""
    lines: list[str] = []
    if crash.code is not None:
        lines += describe_bug_check(crash.code, crash.parameters, where, blamed=crash.blamed)
    if crash.blamed is not None:
        lines.append(f"the kernel blames {crash.blamed}")
    if called:
        lines.append("stack:")
    for address, caller in called:
        at = where(address) or f"0x{address:X}"
        lines.append(f"    {at}" + (f"  {caller}" if caller and str(caller) != at else ""))
    return tuple(lines)


def _panic(crash: Crash, window: Window, driver: str) -> str | None:
    """What the driver's last words before a bug check say of where it panicked.

    Where the source can't tell whose words they are, the kernel's own come behind them.
    """
    last = None
    for position, event in window.numbered(None, (DebugPrint,)):
        if position < crash.position and isinstance(event, DebugPrint):
            panic = _PANIC.match(event.text)
            if event.driver == driver or (event.driver is None and panic is not None):
                last = panic
    return last[0] if last else None


def _crash(position: int, event: CrashEvent) -> Crash:
    parameters: tuple[int, ...] = ()
    code: int | None = None
    address: int | None = None
    instruction: int | None = None
    match event:
        case BugCheck():
            code, parameters, address = event.code, event.parameters, event.caller
            instruction = address - 1 if address is not None else None
            at = _INSTRUCTION.get(code)
            if address is None and at is not None and len(parameters) > at:
                address = instruction = parameters[at]
        case Breakpoint():
            code, address, instruction = event.code, event.address, event.address
        case UnhandledException():
            code, address, instruction = event.code, event.address, event.address
            parameters = (event.access[1],) if event.access else ()
        case MissingExport():
            address, instruction = event.address, event.address - 1
        case ProcessDied():
            code = event.exit_code
    return Crash(
        position=position,
        code=code,
        parameters=parameters,
        address=address,
        instruction=instruction,
        description=describe(event),
        blamed=event.blamed if isinstance(event, BugCheck) else None,
        stack=event.stack if isinstance(event, BugCheck) else (),
    )


def describe(event: CrashEvent) -> str:
    """A crash in one line."""
    match event:
        case BugCheck():
            parameters = ", ".join(f"0x{value:X}" for value in event.parameters)
            name = name_of(event.code)
            named = f"0x{event.code:X} {name}" if name else f"0x{event.code:X}"
            return f"bug check {named} ({parameters})"
        case Breakpoint():
            kind = _BREAKPOINTS.get(event.code, f"breakpoint {NTSTATUS(event.code)}")
            return f"{kind} at address 0x{event.address:X}, which without a debugger is a bug check"
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
