"""What a kernel's own debugger tells of a crash, as one crash of the driver's."""

from __future__ import annotations

import pytest

from pytest_kdriver.kernel.crash import Crash, find_crash, locate_crash
from pytest_kdriver.kernel.events import (
    Breakpoint,
    BugCheck,
    Event,
    ImageLoaded,
    ImageUnloaded,
    ProcessorState,
    UnhandledException,
)
from pytest_kdriver.kernel.images import Modules
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.kernel.text import kernel_lines
from pytest_kdriver.source_frame import SourceFrame
from pytest_kdriver.targets.libvirt.domain import logged_panic

NT = ImageLoaded(0.0, "ntoskrnl", 0xFFFFF80000000000, 0x1000000, r"\SystemRoot\ntoskrnl.exe")
HELLO = ImageLoaded(1.0, "hello", 0xFFFFF80710000000, 0x8000, r"\??\C:\kdriver\0\hello.sys")
IN_HELLO = HELLO.base + 0x1234
IN_NT = NT.base + 0x4321
CALLED = HELLO.base + 0x2000


class Lines:
    """A symbolizer that knows one line of the driver's."""

    problem = None

    def locate(self, offset: int) -> tuple[SourceFrame, ...]:
        return (SourceFrame("hello::read", "/work/hello/src/lib.rs", 0x10 + offset // 0x1000),)


def log_of(*events: Event) -> KernelLog:
    log = KernelLog()
    log.append([NT, HELLO, *events])
    return log


def crash_of(*events: Event, breakpoints: bool = True) -> Crash | None:
    window = log_of(*events).window("hello", 1)
    crash = find_crash(window, "hello", breakpoints=breakpoints)
    return None if crash is None else locate_crash(crash, window, "hello", Lines)


def test_a_bug_check_that_names_its_instruction_is_found_in_the_driver_s_source() -> None:
    crash = crash_of(BugCheck(2.0, None, 0xD1, (0, 2, 1, IN_HELLO), stack=(CALLED, IN_NT)))
    assert crash is not None
    assert crash.code == 0xD1
    assert crash.description.startswith("bug check 0xD1 DRIVER_IRQL_NOT_LESS_OR_EQUAL (0x0, 0x2, ")
    assert ", at " in crash.description
    assert "hello/src/lib.rs:17" in crash.description
    assert crash.address == IN_HELLO
    *_, stack, first, second = crash.details
    assert stack == "stack:"
    assert first.startswith("    hello+0x2000  ")
    assert "lib.rs:17" in first, "the call's line, not that of where it returns to"
    assert second == "    ntoskrnl+0x4321"


def test_one_in_the_kernel_names_the_driver_s_call() -> None:
    crash = crash_of(BugCheck(2.0, None, 0xA, (8, 2, 0, IN_NT), stack=(IN_NT, CALLED)))
    assert crash is not None
    assert ", called from " in crash.description
    assert "lib.rs:17" in crash.description


def test_one_of_another_driver_s_is_told_with_whom_the_kernel_blames() -> None:
    crash = crash_of(BugCheck(2.0, None, 0xC2, (7, 0, 0, 0), blamed="other.sys"))
    assert crash is not None
    assert "the kernel blames other.sys" in crash.details
    assert "lib.rs" not in crash.description


def test_an_exception_and_the_bug_check_behind_it_are_one_crash() -> None:
    crash = crash_of(
        UnhandledException(2.0, "hello", 0xC0000005, IN_HELLO),
        BugCheck(2.0, None, 0x1E, (0xC0000005, IN_HELLO, 0, 0)),
    )
    assert crash is not None
    assert crash.code == 0x1E
    assert crash.address == IN_HELLO


def test_a_breakpoint_is_a_crash_unless_it_is_allowed() -> None:
    event = Breakpoint(2.0, "hello", 0x80000003, IN_HELLO)
    crash = crash_of(event)
    assert crash is not None
    assert crash.description.startswith("breakpoint (int 3) at address 0xFFFFF80710001234, which")
    assert "lib.rs:17" in crash.description
    assert crash_of(event, breakpoints=False) is None


def test_a_breakpoint_of_the_kernel_s_is_everybody_s_and_one_of_another_driver_s_its_own() -> None:
    assert crash_of(Breakpoint(2.0, None, 0xC0000420, IN_NT)) is not None
    assert crash_of(Breakpoint(2.0, "other", 0x80000003, 1)) is None


class TestModules:
    def test_know_what_lay_where_at_a_moment(self) -> None:
        other = ImageLoaded(3.0, "other", HELLO.base + 0x1000, 0x1000, "other.sys")
        log = log_of(ImageUnloaded(2.0, "hello", HELLO.base, HELLO.path), other)
        assert Modules(log, 2).where(IN_HELLO) == "hello+0x1234"
        assert Modules(log, 3).where(IN_HELLO) is None
        assert Modules(log, 4).where(IN_HELLO) == "other+0x234"
        assert Modules(log, 4).where(0x10) is None
        assert Modules(log, 4).where(NT.base + NT.size) is None


def test_processors_are_told_by_image_and_offset() -> None:
    log = log_of(ProcessorState(2.0, None, 1, IN_HELLO, (IN_NT, 0x77)))
    *_, at, caller, unknown = kernel_lines(log.window("hello", 0), 10)
    assert at.endswith("processor 1 is at hello+0x1234")
    assert caller.endswith("    ntoskrnl+0x4321")
    assert unknown.endswith("    0x77")


@pytest.mark.parametrize(
    ("log", "panic"),
    [
        (
            # A line of a domain's log, from a mail to QEMU's list.
            "panic hyper-v: arg1='0x3e', arg2='0x46d359bbdff', arg3='0x56d359bbdff', arg4='0x0', "
            "arg5='0x0'\n",
            (0x3E, 0x46D359BBDFF, 0x56D359BBDFF, 0, 0),
        ),
        ("2026-01-01 shutting down, reason=destroyed\n", None),
        ("panic hyper-v: arg1='0x3e'\n", None),
    ],
)
def test_the_panic_in_a_domain_s_log(log: str, panic: tuple[int, ...] | None) -> None:
    assert logged_panic(f"started\n{log}more\n") == panic
