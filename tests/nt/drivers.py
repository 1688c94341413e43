"""The scripts of the simulated NT's drivers: those of ``drivers/`` again, as far as its tests need them.

An image names its script in a section of its own; ``image`` makes one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pytest_kdriver import ctl_code
from pytest_kdriver.image.pe import Image
from pytest_kdriver.ntstatus import NTSTATUS
from tests.nt.guest import Kernel, Script
from tests.pe_builder import DATA, WRITABLE, Section, build

SECTION = ".script"

RUST = 0x52555354
"""What the framework's panic handler bug-checks with."""

SYSTEM_SERVICE_EXCEPTION, SYSTEM_THREAD_EXCEPTION_NOT_HANDLED = 0x3B, 0x7E
DRIVER_VERIFIER_DETECTED_VIOLATION = 0xC4

PRINT, HANG, LEAK, CRASH = (ctl_code(0x804 + number) for number in range(4))
"""The control codes of ``drivers/echo``."""

FAULT_AT, BREAKPOINT_AT, HANGS_AT = 0x1010, 0x1020, 0x1030
"""Where in each image it happens."""

FAR = 0x21010
SIZES = {"large": 0x40000}
"""Bytes of .data in memory, where they are not a page."""


def image(script: str) -> bytes:
    """An image that has the simulated NT run ``script``; it is not signed."""
    data = Section(b".data", b"", DATA | WRITABLE, SIZES.get(script, 0x1000))
    return build(
        imports={"ntoskrnl.exe": ["DbgPrint"]},
        code=bytes(0x100),
        sections=[Section(b".script", script.encode(), DATA), data],
        pointers=1,
    )


def write_images(folder: Path) -> None:
    """An image of each script, named after it."""
    for name in SCRIPTS:
        (folder / f"{name}.sys").write_bytes(image(name))


def find_script(found: Image, file: str) -> Callable[[Kernel], Script] | None:
    """The script that an image names; None where it names none."""
    for section in found.sections:
        if section.name == SECTION:
            name = found.read(section.address, section.size).rstrip(b"\0").decode()
            return SCRIPTS[name]
    return None


class Driver:
    """What has nothing to do, and no device."""

    can_unload = True

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def entry(self) -> int:
        return NTSTATUS.STATUS_SUCCESS

    def unload(self) -> None:
        pass

    def control(self, code: int, data: bytes) -> tuple[int, bytes]:
        return NTSTATUS.STATUS_INVALID_DEVICE_REQUEST, b""


class Hello(Driver):
    def entry(self) -> int:
        self.kernel.print("Hello, world!\n")
        return NTSTATUS.STATUS_SUCCESS

    def unload(self) -> None:
        self.kernel.print("Bye bye!\n")


class Refuses(Driver):
    """Fails with ``Status``, and leaves ``Blocks`` blocks behind."""

    def entry(self) -> int:
        for _ in range(_number(self.kernel, "Blocks", 0)):
            self.kernel.allocate(b"refu", 100)
        return _number(self.kernel, "Status", NTSTATUS.STATUS_UNSUCCESSFUL)


class Leaks(Driver):
    """Leaks ``Blocks`` blocks of ``Bytes`` bytes and the tag ``Tag`` in each load.

    ``Late`` is how many more are freed behind the unload.
    """

    def entry(self) -> int:
        kernel = self.kernel
        tag = str(kernel.parameter("Tag", "leak")).encode().ljust(4)
        size = _number(kernel, "Bytes", 64)
        kept = kernel.allocate(tag, 4096)
        for _ in range(_number(kernel, "Blocks", 1)):
            kernel.allocate(tag, size)
        for _ in range(_number(kernel, "Late", 0)):
            kernel.free_later(kernel.allocate(tag, size))
        kernel.free(kept)
        return NTSTATUS.STATUS_SUCCESS


class Panics(Driver):
    """Brings the machine down ``Where`` and ``How`` it is told."""

    def entry(self) -> int:
        if self.kernel.parameter("Where", "init") == "init":
            self.bring_down()
        return NTSTATUS.STATUS_SUCCESS

    def unload(self) -> None:
        if self.kernel.parameter("Where", "init") == "cleanup":
            self.bring_down()

    def bring_down(self) -> None:
        kernel = self.kernel
        match kernel.parameter("How", "panic"):
            case "panic":
                kernel.print("about to panic\n")
                kernel.print("panicked at panics/src/lib.rs:76:17:\nas it was told\n")
                kernel.bug_check(RUST, 0, 0, 0, 0)
            case "page-fault":
                kernel.print("about to write to address 0x10\n")
                kernel.fault(FAULT_AT, then=SYSTEM_THREAD_EXCEPTION_NOT_HANDLED)
            case "unhandled":
                kernel.fault_unhandled(FAULT_AT)
            case "bug-check":
                kernel.print("about to bug-check\n")
                kernel.bug_check(0xE2E2, 1, 2, 3, 4)
            case "verifier":
                kernel.print("about to leave 3 blocks to the verifier\n")
                kernel.bug_check(
                    DRIVER_VERIFIER_DETECTED_VIOLATION,
                    *(0x62, kernel.base + 0x2000, 0, 3),
                    blamed="panics.sys",
                )
            case "int3":
                kernel.print("about to hit a breakpoint\n")
                kernel.breakpoint(BREAKPOINT_AT)
            case "int2c":
                kernel.print("about to fail an assertion\n")
                kernel.assertion(BREAKPOINT_AT)


class Large(Driver):
    """Faults far behind its image's begin, where other drivers' images may have been before."""

    def entry(self) -> int:
        self.kernel.fault(FAR, then=SYSTEM_THREAD_EXCEPTION_NOT_HANDLED)


class Stubborn(Driver):
    """Does not unload, or never comes back."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.how = kernel.parameter("How", "no-unload")
        self.can_unload = self.how != "no-unload"

    def entry(self) -> int:
        if self.how == "slow-init":
            self.hang()
        while self.how == "flood":
            self.kernel.print("and again\n")
        return NTSTATUS.STATUS_SUCCESS

    def unload(self) -> None:
        if self.how == "slow-cleanup":
            self.hang()

    def hang(self) -> None:
        self.kernel.print("slow\n")
        self.kernel.hang(HANGS_AT)


class Echo(Driver):
    """A device that misbehaves as it is told."""

    def entry(self) -> int:
        self.kernel.create_device("Echo")
        return NTSTATUS.STATUS_SUCCESS

    def control(self, code: int, data: bytes) -> tuple[int, bytes]:
        kernel = self.kernel
        if code == PRINT:
            kernel.print(f"{data.decode()}\n")
        elif code == HANG:
            kernel.print("hanging\n")
            kernel.hang(HANGS_AT)
        elif code == LEAK:
            kernel.allocate(b"echo", int.from_bytes(data, "little"))
        elif code == CRASH and data[0] == 1:
            kernel.fault(FAULT_AT, then=SYSTEM_SERVICE_EXCEPTION)
        elif code == CRASH:
            kernel.bug_check(0xE2E2, 1, 2, 3, 4)
        else:
            return NTSTATUS.STATUS_INVALID_DEVICE_REQUEST, b""
        return NTSTATUS.STATUS_SUCCESS, b""


def _number(kernel: Kernel, name: str, default: int) -> int:
    value = kernel.parameter(name, default)
    assert isinstance(value, int)
    return value


SCRIPTS: dict[str, Callable[[Kernel], Script]] = {
    "hello": Hello,
    "refuses": Refuses,
    "leaks": Leaks,
    "panics": Panics,
    "large": Large,
    "stubborn": Stubborn,
    "echo": Echo,
}
