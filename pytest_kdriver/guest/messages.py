"""What the frames carry: a request and a reply for each operation.

The twin of ``vm/agent/frames/src/message.rs``; ``wire`` says how a message is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from pytest_kdriver.guest.wire import U32, U64, Message

R_co = TypeVar("R_co", bound=Message, covariant=True)


class Request(Message, Generic[R_co]):
    """A message to the agent; ``R_co`` is the reply's type."""

    __slots__ = ()


# What the agent answers.


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Message):
    """Nothing to say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Error(Message):
    """The body of an error frame.

    ``domain`` 0: the agent's own refusal; 1: ``code`` is Win32's; 2: ``code`` is an NTSTATUS.
    """

    domain: U32
    code: U32
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HelloReply(Message):
    """Who is there."""

    protocol: U32
    version: str
    architecture: str
    os_major: U32
    os_minor: U32
    os_build: U32
    wine_version: str | None
    elevated: bool
    pid: U32
    operations: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload(Message):
    """A file on its way in, as the agent named it."""

    upload: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class File(Message):
    """A file's content, and the hash of what was read."""

    data: bytes
    sha256: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionalHash(Message):
    """A file's hash; None: no such file."""

    sha256: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Code(Message):
    """An answer that is a code: Win32's or an NTSTATUS, as the operation has it."""

    code: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStatus(Message):
    """What QueryServiceStatusEx says."""

    state: U32
    win32_exit_code: U32
    service_exit_code: U32
    pid: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionalServiceStatus(Message):
    """What QueryServiceStatusEx says; None: no such service."""

    status: ServiceStatus | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Value(Message):
    """A registry value: its type, and its bytes as the registry keeps them."""

    kind: U32
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionalValue(Message):
    """A registry value; None: no such key or value."""

    value: Value | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Process(Message):
    """A process that runs: its id, its parent's, and its image's file name."""

    pid: U32
    parent: U32
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessList(Message):
    """The processes that run, in no order."""

    processes: tuple[Process, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitCode(Message):
    """How a process ended."""

    exit_code: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class Information(Message):
    """What NtQuerySystemInformation gave, as it came."""

    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed(Message):
    """How a program ended.

    ``exit_code`` is None if it was ended at its time limit (``timed_out``), or if the guest does not say (on
    Wine a Unix program). ``truncated``: one of its outputs was longer than what was to be kept.
    """

    exit_code: U32 | None
    stdout: bytes
    stderr: bytes
    timed_out: bool
    truncated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOpened(Message):
    """What came of opening a device: an NTSTATUS, and the device, 0 if it was not opened.

    ``outcome`` is that of ``IoEnded``; an open is never cancelled.
    """

    status: U32
    outcome: U32
    device: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class IoEnded(Message):
    """How input or output ended, or that it did not.

    ``status`` is an NTSTATUS, STATUS_PENDING where it did not end; ``count`` is IO_STATUS_BLOCK's
    Information. ``outcome`` 0: it ended by itself; 1: after it was cancelled, at its time limit or by a
    close; 2: not at all, though it was cancelled.
    """

    status: U32
    outcome: U32
    count: U64
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTime(Message):
    """A time: 100 ns since 1601, UTC."""

    time: U64


@dataclass(frozen=True, slots=True, kw_only=True)
class Room(Message):
    """What the caller may use of a disk, in bytes."""

    bytes: U64


# What the host asks.


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(Request[HelloReply]):
    """Who is there?"""

    protocol: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class PutBegin(Request[Upload]):
    """Begin to write a file: folders are made, a temporary file beside it is opened."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PutData(Request[Done]):
    """A piece of the file, at any offset, in any order."""

    upload: U32
    offset: U64
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PutEnd(Request[Done]):
    """Compare the hash, and put the file in its place."""

    upload: U32
    sha256: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PutAbort(Request[Done]):
    """Forget the file."""

    upload: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class Get(Request[File]):
    """A file's content."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete(Request[Done]):
    """Delete a file."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hash(Request[OptionalHash]):
    """A file's hash."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateService(Request[Done]):
    """Register a driver."""

    name: str
    image_path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteService(Request[Done]):
    """Remove a driver's registration."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StartService(Request[Code]):
    """Start by the service control manager."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopService(Request[Code]):
    """Stop by the service control manager."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryService(Request[OptionalServiceStatus]):
    """What the service control manager knows."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadDriver(Request[Code]):
    """NtLoadDriver."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadDriver(Request[Code]):
    """NtUnloadDriver."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SetValue(Request[Done]):
    """Set a registry value under HKLM; the key is made."""

    key: str
    name: str
    kind: U32
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GetValue(Request[OptionalValue]):
    """A registry value under HKLM."""

    key: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteValue(Request[Done]):
    """Delete a registry value."""

    key: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteKey(Request[Done]):
    """Delete a registry key and all below it."""

    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes(Request[ProcessList]):
    """The processes that run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminate(Request[Done]):
    """End a process."""

    pid: U32
    exit_code: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitProcess(Request[ExitCode]):
    """Answered when the process has ended."""

    pid: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemInformation(Request[Information]):
    """NtQuerySystemInformation."""

    information_class: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(Request[Completed]):
    """Run a program to its end. ``time_limit`` is in milliseconds, ``output_limit`` in bytes."""

    command_line: str
    directory: str | None
    stdin: bytes
    time_limit: U32
    output_limit: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence(Request[Done]):
    """OutputDebugStringA, then answer."""

    cookie: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenDevice(Request[DeviceOpened]):
    r"""NtCreateFile of a device. The path is NT's, ``\??\name``; ``time_limit`` is in milliseconds."""

    path: str
    time_limit: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadDevice(Request[IoEnded]):
    """NtReadFile. ``time_limit`` is in milliseconds."""

    device: U32
    length: U32
    time_limit: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteDevice(Request[IoEnded]):
    """NtWriteFile. ``time_limit`` is in milliseconds."""

    device: U32
    data: bytes
    time_limit: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class Ioctl(Request[IoEnded]):
    """NtDeviceIoControlFile. ``time_limit`` is in milliseconds."""

    device: U32
    code: U32
    data: bytes
    output_size: U32
    time_limit: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseDevice(Request[Done]):
    """Cancel what is on its way, then NtClose."""

    device: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock(Request[FileTime]):
    """What time is it?"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetClock(Request[Done]):
    """NtSetSystemTime, with a time as ``FileTime`` has it."""

    time: U64


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeSpace(Request[Room]):
    """How much room the disk has that a folder is on."""

    path: str


@dataclass(frozen=True, slots=True)
class Operation:
    """What can be asked: its number, its name, and its messages."""

    number: int
    name: str
    request: type[Request[Message]]
    reply: type[Message]


OPERATIONS = (
    Operation(1, "hello", Hello, HelloReply),
    Operation(2, "put_begin", PutBegin, Upload),
    Operation(3, "put_data", PutData, Done),
    Operation(4, "put_end", PutEnd, Done),
    Operation(5, "put_abort", PutAbort, Done),
    Operation(6, "get", Get, File),
    Operation(7, "delete", Delete, Done),
    Operation(8, "hash", Hash, OptionalHash),
    Operation(9, "create_service", CreateService, Done),
    Operation(10, "delete_service", DeleteService, Done),
    Operation(11, "start_service", StartService, Code),
    Operation(12, "stop_service", StopService, Code),
    Operation(13, "query_service", QueryService, OptionalServiceStatus),
    Operation(14, "load_driver", LoadDriver, Code),
    Operation(15, "unload_driver", UnloadDriver, Code),
    Operation(16, "set_value", SetValue, Done),
    Operation(17, "get_value", GetValue, OptionalValue),
    Operation(18, "delete_value", DeleteValue, Done),
    Operation(19, "delete_key", DeleteKey, Done),
    Operation(20, "processes", Processes, ProcessList),
    Operation(21, "terminate", Terminate, Done),
    Operation(22, "wait_process", WaitProcess, ExitCode),
    Operation(23, "system_information", SystemInformation, Information),
    Operation(24, "run", Run, Completed),
    Operation(25, "fence", Fence, Done),
    Operation(26, "open_device", OpenDevice, DeviceOpened),
    Operation(27, "read_device", ReadDevice, IoEnded),
    Operation(28, "write_device", WriteDevice, IoEnded),
    Operation(29, "ioctl", Ioctl, IoEnded),
    Operation(30, "close_device", CloseDevice, Done),
    Operation(31, "clock", Clock, FileTime),
    Operation(32, "set_clock", SetClock, Done),
    Operation(33, "free_space", FreeSpace, Room),
)

OPERATION_OF = {operation.request: operation for operation in OPERATIONS}
