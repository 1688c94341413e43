"""What can go wrong, as exceptions.

::

    KdriverError
    ├── ConfigError             kdriver.toml, [tool.kdriver], an option or a marker says what can't be
    ├── BuildError              cargo, rustc or the linker said no; its output is in the message
    ├── ImageError              the driver's file can't be what is meant (not there, not a PE file, ...)
    ├── DumpError               a file is no crash dump of a 64-bit Windows, or is cut
    ├── TargetError             the target can't be had, or can't be used any more
    │   └── CapabilityError     the target can't show or do this at all; also a ``pytest.skip`` reason
    ├── KernelLogError          what a source of the kernel log sent makes no sense
    ├── LinkError               the byte stream to the agent broke
    ├── AgentError              the agent answered, and the answer is an error
    │   ├── AgentProtocolError  the agent's bytes make no sense
    │   └── NotImplementedByGuest   this guest does not have the call (Wine: NtLoadDriver)
    └── DriverError             the driver under test did something that a test should hear of
        ├── StartFailed         DriverEntry, or the loader before it, answered with an error
        ├── StopFailed          the stop was refused for a reason of its own
        │   └── UnloadRefused   the driver has no DriverUnload
        ├── DeviceError         a device's read, write or ioctl, or its opening, came back with an error
        ├── DriverTimeout       a Driver call was not over by its deadline
        ├── DriverCrashed       the driver took its process, or the guest, with it
        ├── PoolError           at the end of a test the driver's pool use is not what it should be
        └── NoSuchLine          an expected line did not come (also an ``AssertionError``)

Each message says which target and which phase, what was seen, and what to do next. The same facts are
attributes, for those who catch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_kdriver.ntstatus import NTSTATUS
    from pytest_kdriver.win32error import Win32Error


class KdriverError(Exception):
    """Anything this package raises on purpose."""


class ConfigError(KdriverError):
    """A setting that can't be: the message says which, where it stands, and what is allowed."""


class BuildError(KdriverError):
    """A package could not be built. ``output`` is what cargo printed."""

    def __init__(self, message: str, *, output: str = "") -> None:
        super().__init__(f"{message}\n{output}".rstrip())
        self.output = output


class ImageError(KdriverError):
    """A driver's file that can't be loaded, whatever the target."""


class DumpError(KdriverError):
    """A file that is no crash dump, or one that can't be read here; the message says why."""


class TargetError(KdriverError):
    """A target that can't be had or used. ``target`` is its name."""

    def __init__(self, message: str, *, target: str = "") -> None:
        super().__init__(f"target {target!r}: {message}" if target else message)
        self.target = target


class CapabilityError(TargetError):
    """The target has no way of knowing or doing this. ``capability`` is its name."""

    def __init__(self, message: str, *, target: str = "", capability: str) -> None:
        super().__init__(message, target=target)
        self.capability = capability


class KernelLogError(KdriverError):
    """Bytes that are not what this source of the kernel log sends; nothing after them can be trusted."""


class LinkError(KdriverError):
    """The byte stream to the agent is gone, or could not be made."""


class AgentError(KdriverError):
    """The agent could not do what it was asked for.

    ``operation`` is the request, ``code`` what the guest's system said (a ``Win32Error`` or an
    ``NTSTATUS``; None where the agent itself refused).
    """

    def __init__(
        self, message: str, *, operation: str = "", code: Win32Error | NTSTATUS | None = None
    ) -> None:
        told = f"{operation}: {message}" if operation else message
        super().__init__(f"{told}: {code}" if code is not None else told)
        self.operation = operation
        self.code = code


class AgentProtocolError(AgentError):
    """Bytes that are no frame of the agent's protocol, or a reply that fits no request."""


class NotImplementedByGuest(AgentError):
    """The guest's system does not have this call."""


class DriverError(KdriverError):
    """Something about the driver under test.

    ``driver`` is its service's name, ``target`` the target's, ``lines`` the last lines of the kernel
    log, oldest first.
    """

    def __init__(
        self, message: str, *, driver: str, target: str, lines: Sequence[str] = ()
    ) -> None:
        text = f"{driver} on {target}: {message}"
        if lines:
            text += "\nlast lines of the kernel log:\n" + "\n".join(f"    {line}" for line in lines)
        super().__init__(text)
        self.driver = driver
        self.target = target
        self.lines = tuple(lines)


class StartFailed(DriverError):
    """The driver did not start. ``status`` is DriverEntry's own, or the loader's where it never ran."""

    def __init__(
        self,
        message: str,
        *,
        status: NTSTATUS,
        driver: str,
        target: str,
        lines: Sequence[str] = (),
    ) -> None:
        super().__init__(message, driver=driver, target=target, lines=lines)
        self.status = status


class StopFailed(DriverError):
    """The driver did not stop. ``code`` is what the guest answered."""

    def __init__(
        self,
        message: str,
        *,
        code: Win32Error | NTSTATUS | None = None,
        driver: str,
        target: str,
        lines: Sequence[str] = (),
    ) -> None:
        super().__init__(message, driver=driver, target=target, lines=lines)
        self.code = code


class UnloadRefused(StopFailed):
    """The driver has no DriverUnload, so it stays until the guest ends."""


class DeviceError(DriverError):
    """A device answered with an error, or can't be used (``status`` is STATUS_INVALID_HANDLE then).

    ``data`` is what came with it: STATUS_BUFFER_OVERFLOW, say, brings as much as there was room for.
    """

    def __init__(
        self,
        message: str,
        *,
        status: NTSTATUS,
        data: bytes = b"",
        driver: str,
        target: str,
        lines: Sequence[str] = (),
    ) -> None:
        super().__init__(message, driver=driver, target=target, lines=lines)
        self.status = status
        self.data = data


class DriverTimeout(DriverError):
    """A Driver call was not over after ``timeout`` seconds.

    ``phase`` says which: "install", "start", "stop", "uninstall"; "open", "read", "write", "ioctl", "close".
    """

    def __init__(
        self,
        message: str,
        *,
        phase: str,
        timeout: float,
        driver: str,
        target: str,
        lines: Sequence[str] = (),
    ) -> None:
        super().__init__(message, driver=driver, target=target, lines=lines)
        self.phase = phase
        self.timeout = timeout


class DriverCrashed(DriverError):
    """The driver crashed.

    ``code`` is the bug check's or the exception's code (None where nobody said one), ``parameters`` its
    parameters, ``address`` where it happened as far as known.
    """

    def __init__(
        self,
        message: str,
        *,
        code: int | None = None,
        parameters: Sequence[int] = (),
        address: int | None = None,
        driver: str,
        target: str,
        lines: Sequence[str] = (),
    ) -> None:
        super().__init__(message, driver=driver, target=target, lines=lines)
        self.code = code
        self.parameters = tuple(parameters)
        self.address = address


class PoolError(DriverError):
    """Leaks, double frees, frees with the wrong tag: the message has the table."""


class NoSuchLine(DriverError, AssertionError):
    """A line that a test waits for did not come; the message says what did."""
