"""An open handle to a driver's device: reads, writes, ioctls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

from pytest_kdriver.errors import ConfigError
from pytest_kdriver.guest.agent import IO_MARGIN, Agent, IoOutcome, IoResult
from pytest_kdriver.guest.frames import MAX_BODY
from pytest_kdriver.ntstatus import NTSTATUS

Buffer: TypeAlias = bytes | bytearray | memoryview
"""What is sent to a device: its bytes, whatever its items are."""

FILE_DEVICE_UNKNOWN: Final = 0x22
METHOD_BUFFERED: Final = 0
FILE_ANY_ACCESS: Final = 0

MAX_INPUT: Final = MAX_BODY - 64
"""Bytes that fit into one request to the agent, beside the numbers that go with them."""

MAX_OUTPUT: Final = 16 << 20
"""Bytes that the agent has room for."""

_LARGEST_CODE: Final = 0xFFFF_FFFF


def ctl_code(
    function: int,
    *,
    device_type: int = FILE_DEVICE_UNKNOWN,
    method: int = METHOD_BUFFERED,
    access: int = FILE_ANY_ACCESS,
) -> int:
    """An ioctl's code, as the macro CTL_CODE of the WDK makes it.

    ``function`` is below 0x1000 (a driver's own: from 0x800 on), ``device_type`` below 0x10000, ``method``
    0 to 3, ``access`` 0 to 3. Raises ``ValueError``.
    """
    for name, value, end in (
        ("function", function, 0x1000),
        ("device_type", device_type, 0x10000),
        ("method", method, 4),
        ("access", access, 4),
    ):
        if not 0 <= value < end:
            raise ValueError(f"{name} is 0x{value:X}; it is below 0x{end:X}")
    return device_type << 16 | access << 14 | function << 2 | method


class Perform(Protocol):
    """How a device has its I/O done: by its driver, who judges what came of it."""

    def __call__(
        self,
        device: Device,
        phase: str,
        what: str,
        io: Callable[[Agent, float], IoResult],
        timeout: float | None,
        /,
    ) -> bytes:
        """What the driver gave. ``phase`` is "read", "write" or "ioctl"; ``what`` says it in full."""
        ...


class Device:
    """An open handle to a device. Nobody constructs it: ``Driver.device`` does.

    Its methods may be called from several threads at once: a thread's ioctl may wait for what another one's
    sets off. ``timeout`` is in seconds, by default the driver's. An error that the driver answers raises
    ``DeviceError``; what does not fit into one request is a ``ValueError``. I/O that is not over in time is
    cancelled and raises ``DriverTimeout``; where the driver does not let it be cancelled it is cut short.
    ``DriverCrashed`` comes from here too.
    """

    def __init__(self, path: str, handle: int, generation: int, perform: Perform) -> None:
        self.path = path
        self.handle = handle
        self.generation = generation
        self.closed = False
        self._perform = perform

    def __repr__(self) -> str:
        return f"<Device {self.path}{' (closed)' if self.closed else ''}>"

    def read(self, length: int, *, timeout: float | None = None) -> bytes:
        """Read at most ``length`` bytes."""
        _check("length", length, MAX_OUTPUT)
        return self._perform(
            self,
            "read",
            f"read of {length} bytes from {self.path}",
            lambda agent, limit: agent.read_device(self.handle, length, time_limit=limit),
            timeout,
        )

    def write(self, data: Buffer, *, timeout: float | None = None) -> int:
        """Write ``data``; how many bytes of it the driver says that it took."""
        data = _bytes(data)
        taken = 0

        def write(agent: Agent, limit: float) -> IoResult:
            nonlocal taken
            result = agent.write_device(self.handle, data, time_limit=limit)
            taken = result.count
            return result

        self._perform(self, "write", f"write of {len(data)} bytes to {self.path}", write, timeout)
        return taken

    def ioctl(
        self, code: int, data: Buffer = b"", *, output_size: int = 0, timeout: float | None = None
    ) -> bytes:
        """Send an ioctl with ``data`` as its input, and room for ``output_size`` bytes; what came back.

        ``code`` is the whole code: ``ctl_code`` makes one.
        """
        if not 0 <= code <= _LARGEST_CODE:
            raise ValueError(f"0x{code:X} is no ioctl's code: it has 32 bits")
        data = _bytes(data)
        _check("output_size", output_size, MAX_OUTPUT)
        return self._perform(
            self,
            "ioctl",
            f"ioctl 0x{code:X} of {self.path}",
            lambda agent, limit: agent.ioctl(
                self.handle, code, data, output_size, time_limit=limit
            ),
            timeout,
        )


def close(agent: Agent, device: Device, timeout: float) -> IoResult:
    """Close it in the guest; what comes of that, which is never an error of the driver's."""
    agent.close_device(device.handle, timeout=timeout + IO_MARGIN)
    return IoResult(status=NTSTATUS.STATUS_SUCCESS, data=b"", count=0, outcome=IoOutcome.COMPLETED)


def nt_path(path: str) -> str:
    r"""The kernel's name of what ``path`` means: ``\\.\Echo`` is ``\??\Echo``; a kernel's name is itself.

    Raises ``ConfigError``.
    """
    for prefix in ("\\\\.\\", "\\\\?\\"):
        if path.startswith(prefix) and path != prefix:
            return "\\??\\" + path.removeprefix(prefix)
    if path.startswith("\\") and not path.startswith("\\\\"):
        return path
    raise ConfigError(
        f"{path!r} is no device's path: write r'\\\\.\\NAME' for its symbolic link, "
        "or the kernel's name, such as r'\\Device\\NAME'"
    )


def _bytes(data: Buffer) -> bytes:
    _check("the size of data", memoryview(data).nbytes, MAX_INPUT)
    return bytes(data)


def _check(name: str, value: int, most: int) -> None:
    if not 0 <= value <= most:
        raise ValueError(f"{name} is {value}; it is 0 to {most}")
