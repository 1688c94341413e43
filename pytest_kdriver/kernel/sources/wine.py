r"""Wine's trace: what ``WINEDEBUG`` makes the programs of a prefix write to their stderr.

Asked for as ``DEBUG_CHANNELS``, with ``RELAYED`` as the registry's RelayInclude. A message is what one
``write`` wrote, and ends with a newline. Most begin with a header: seconds, process and thread, ::

    1933.239:00dc:00ec:Call driver init 0000000180001000 (obj=...,str=L"\\Registry\\...\\hello")
    1933.239:00dc:00ec:Call ntoskrnl.exe.ExAllocatePoolWithTag(00000200,0000000f,74737572) ret=18000102a
    1933.239:00dc:00ec:Ret  ntoskrnl.exe.ExAllocatePoolWithTag() retval=014a0370 ret=18000102a
    1933.239:00dc:00ec:warn:debugstr:vDbgPrintExWithPrefix 00000000:00000001: Hello, world!
    1933.239:00dc:00ec:warn:debugstr:vDbgPrintExWithPrefix 0000004d:40000000: kdriver:stack 14a0370 180001f2b
    1933.239:00dc:00ec:Call ntoskrnl.exe.KeBugCheckEx(0000e2e2,00000001,...) ret=18000103f
    1933.239:00dc:00ec:err:ntoskrnl:KeBugCheckEx e2e2 1 2 3 4
    1933.239:00dc:00ec:Ret  driver init 0000000180001000 (obj=...,str=L"...\\hello") retval=00000000
    wine: Unhandled page fault on write access to 0000000000000010 at address 00000000021A1010 (thread 0204),

A driver may print what looks like any of these, behind a newline or at the start of a print. So nothing
but the start of a message counts as a header, and the stream that is fed to the source keeps the borders:
each message stands in a frame, a u32 of its length, a u32 of the Unix process that sent it (0: not
known), both little-endian, then the message. Wine writes a long message as two, header and text: a
message without its newline is joined with the next one of its sender.

A ``kdriver:stack`` record is what the Rust framework's allocator says by DbgPrintEx, where it is built to:
the block that it has just been given, and the return addresses behind it, innermost first. It is one, and no
print, at that component and level only: DPFLTR_IHVDRIVER_ID and 30, which Wine shows as that bit.

Seen on Wine 8.0 and 10.0. The process of a message tells the driver, since services.exe gives each driver
without a load-order group a process of its own.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Final, TypeVar

from pytest_kdriver.errors import KernelLogError
from pytest_kdriver.kernel.events import (
    BugCheck,
    DebugPrint,
    DriverInit,
    DriverInitCalled,
    DriverLoadFailed,
    DriverUnload,
    DriverUnloadCalled,
    Event,
    Fence,
    KernelMessage,
    MissingExport,
    PoolAllocated,
    PoolFreed,
    PoolStack,
    UnhandledException,
)
from pytest_kdriver.ntstatus import NTSTATUS

K = TypeVar("K")
V = TypeVar("V")

DEBUG_CHANNELS: Final = "-all,warn+debugstr,err+ntoskrnl,+relay,+timestamp,+pid"

_ALLOCATE = (
    "ExAllocatePool",
    "ExAllocatePoolWithTag",
    "ExAllocatePoolWithQuota",
    "ExAllocatePoolWithQuotaTag",
    "ExAllocatePool2",
    "ExAllocatePool3",
)
_FREE = ("ExFreePool", "ExFreePoolWithTag", "ExFreePool2")
_BUG_CHECKS = ("KeBugCheckEx", "KeBugCheck")
RELAYED: Final = ";".join(f"ntoskrnl.exe.{name}" for name in _ALLOCATE + _FREE + _BUG_CHECKS)

FRAME_HEADER: Final = struct.Struct("<II")
MAX_MESSAGE: Final = 1 << 20
"""A frame larger than this is an error. Wine writes some 1,100 bytes at a time; a pipe's worth is 64 KiB."""

_REMEMBERED = 4096
"""How many processes, threads, senders and stacks are kept in mind; those that nothing was heard of for the
longest are forgotten."""

_LONGEST = 1 << 16
"""A message without its newline that is longer than this is taken for whole."""

_UNFINISHED = 256
"""How many messages without their newline are kept, the oldest being forgotten."""

_DRIVERS = 64
"""How many drivers one process can have."""

_NESTED = 16
"""How many pool calls a thread can be in: one that the system answers by another is two."""

# Numbers and names are of bounded length, for a guest may write anything: what has more is only text.
_HEADER = re.compile(rb" {0,2}\d+\.\d{3}:([0-9a-f]{4,8}):([0-9a-f]{4,8}):")
"""In the first 99 seconds of a machine their number is padded with spaces."""

_PRINT = b"warn:debugstr:vDbgPrintExWithPrefix "
_PRINT_LEVELS = re.compile(rb"([0-9a-f]{8}):([0-9a-f]{8}): ")
_STACK = b"0000004d:40000000: kdriver:stack "
_STACK_RECORD = re.compile(rb"([0-9a-f]{1,16})((?: [0-9a-f]{1,16}){0,28})\n")
_POOL_CALL = re.compile(
    rb"Call ntoskrnl\.exe\.(Ex\w{1,60})\(([0-9a-f]{0,16}(?:,[0-9a-f]{1,16}){0,7})\) ret=([0-9a-f]{1,16})"
)
_POOL_RETURN = re.compile(
    rb"Ret  ntoskrnl\.exe\.(Ex\w{1,60})\(\) retval=([0-9a-f]{1,16}) ret=([0-9a-f]{1,16})"
)
_BUG_CHECK_CALL = re.compile(
    rb"Call ntoskrnl\.exe\.KeBugCheck(?:Ex)?\([0-9a-f,]*\) ret=([0-9a-f]{1,16})"
)
_KEY_NAME = rb'L"(?:[^"\\]|\\.){0,2560}\\\\((?:[^"\\]|\\[^\\]){0,1280})"'
"""A registry path; the group is its last part. Backslashes and quotes are escaped by a backslash."""

_DRIVER_CALL = re.compile(
    rb"(Call|Ret ) driver (init|unload) ([0-9A-F]{1,16}) \(obj=[0-9A-F]+"
    rb"(?:,str=" + _KEY_NAME + rb")?\)(?: retval=([0-9a-f]{8}))?"
)
_LOAD_FAILED = re.compile(
    rb"err:ntoskrnl:ZwLoadDriver failed to create driver " + _KEY_NAME + rb": ([0-9a-f]{8})"
)
_BUG_CHECK = re.compile(rb"err:ntoskrnl:KeBugCheckEx ([0-9a-f]{1,16})((?: [0-9a-f]{1,16}){0,4})")
_FENCE = re.compile(rb'warn:debugstr:OutputDebugStringA "([^"]{0,256})"')
_EXCEPTION = re.compile(
    rb"wine: (.+) at address (?:0x)?([0-9A-Fa-f]{1,16}) \(thread ([0-9a-f]{1,8})\), starting debugger"
)
_PAGE_FAULT = re.compile(
    rb"Unhandled page fault on (\w{1,20}) access to (?:0x)?([0-9A-Fa-f]{1,16})"
)
_EXCEPTION_CODE = re.compile(rb"Unhandled exception 0x([0-9a-f]{1,8})\b")
_MISSING_EXPORT = re.compile(
    rb"wine: Call from (?:0x)?([0-9A-Fa-f]{1,16}) to unimplemented function "
    rb"(.{1,512})\.([^.\s]{1,512}), aborting"
)
_ESCAPED = re.compile(rb"\\(?:x([0-9a-f]{4})|(.))", re.DOTALL)

_EXCEPTION_CODES = {
    b"page fault": NTSTATUS.STATUS_ACCESS_VIOLATION,
    b"division by zero": NTSTATUS.STATUS_INTEGER_DIVIDE_BY_ZERO,
    b"overflow": NTSTATUS.STATUS_INTEGER_OVERFLOW,
    b"array bounds": NTSTATUS.STATUS_ARRAY_BOUNDS_EXCEEDED,
    b"illegal instruction": NTSTATUS.STATUS_ILLEGAL_INSTRUCTION,
    b"stack overflow": NTSTATUS.STATUS_STACK_OVERFLOW,
    b"privileged instruction": NTSTATUS.STATUS_PRIVILEGED_INSTRUCTION,
    b"alignment": NTSTATUS.STATUS_DATATYPE_MISALIGNMENT,
}
"""The words that Wine's kernelbase uses instead of a code."""

_POOL_TYPES = {0: "NonPagedPool", 1: "PagedPool", 512: "NonPagedPoolNx"}
_POOL_FLAGS = {0x40: "NonPagedPoolNx", 0x80: "NonPagedPool", 0x100: "PagedPool"}
_PROTECTED_POOL = 0x80000000
"""A bit that drivers may set in a tag; it is no part of the name."""


def frame(message: bytes, sender: int = 0) -> bytes:
    """``message``, as the Unix process ``sender`` wrote it, in the stream's framing."""
    return FRAME_HEADER.pack(len(message), sender) + message


@dataclass(slots=True)
class _Process:
    """A process of the guest that runs drivers: usually one, Wine's own share one."""

    sender: int
    drivers: list[str] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)

    def begin(self, driver: str) -> None:
        others = [known for known in self.drivers if known not in self.ended | {driver}]
        self.drivers = [*others[-(_DRIVERS - 1) :], driver]
        self.ended.clear()

    def end(self, driver: str) -> None:
        if driver in self.drivers:
            self.ended.add(driver)

    @property
    def driver(self) -> str | None:
        return self.drivers[0] if len(self.drivers) == 1 else None


@dataclass(slots=True)
class _PoolCall:
    function: str
    arguments: list[int]


@dataclass(slots=True)
class _Thread:
    """A thread of the guest: the driver whose DriverEntry it runs, the pool calls that it is in.

    ``bug_check_caller`` is who has just called KeBugCheckEx.
    """

    process: int
    running: str | None = None
    calls: deque[_PoolCall] = field(default_factory=lambda: deque(maxlen=_NESTED))
    bug_check_caller: int | None = None


@dataclass(slots=True)
class _Sender:
    """A Unix process that writes to the trace: the guest's process that it is."""

    process: int | None = None


class WineTrace:
    """The state machine: frames of Wine's trace in, events out."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._processes: OrderedDict[int, _Process] = OrderedDict()
        self._threads: OrderedDict[int, _Thread] = OrderedDict()
        self._senders: OrderedDict[int, _Sender] = OrderedDict()
        self._stacks: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()
        self._unfinished: deque[tuple[int, bytes]] = deque(maxlen=_UNFINISHED)
        self._now = 0.0

    def receive_data(self, data: bytes, now: float) -> list[Event]:
        """Take framed messages, cut anywhere. See ``Source``."""
        self._now = now
        self._buffer += data
        buffer = bytes(self._buffer)
        events: list[Event] = []
        start, end = 0, len(buffer)
        while end - start >= FRAME_HEADER.size:
            length, sender = FRAME_HEADER.unpack_from(buffer, start)
            if length > MAX_MESSAGE:
                raise KernelLogError(f"a message of {length} bytes in Wine's trace")
            text = start + FRAME_HEADER.size
            if end - text < length:
                break
            start = text + length
            event = self._receive_message(buffer[text:start], sender)
            if event is not None:
                events.append(event)
        del self._buffer[:start]
        return events

    def data_to_send(self) -> bytes:
        """Nothing: Wine only talks."""
        return b""

    def next_deadline(self) -> float | None:
        """None: nothing here depends on time."""
        return None

    def _receive_message(self, message: bytes, number: int) -> Event | None:
        header = _HEADER.match(message)
        sender = _recall(self._senders, number)
        if sender is None:
            sender = _remember(self._senders, number, _Sender())
        if header is None:
            if not message.startswith(b"wine: "):
                return self._continue_message(message, number)
            return self._without_header(message, sender)
        if not message.endswith(b"\n") and len(message) < _LONGEST:
            self._unfinished.append((number, message))
            return None
        return self._with_header(header, message, number)

    def _continue_message(self, text: bytes, number: int) -> Event | None:
        """Join ``text`` with the oldest header of its sender that it fits."""
        waiting = [begun for sender, begun in self._unfinished if sender == number]
        if not waiting:
            return None
        is_print = _PRINT_LEVELS.match(text) is not None
        fitting = [begun for begun in waiting if begun.endswith(_PRINT) == is_print]
        begun = (fitting or waiting)[0]
        self._unfinished.remove((number, begun))
        message = begun + text
        if not message.endswith(b"\n") and len(message) < _LONGEST:
            self._unfinished.appendleft((number, message))
            return None
        header = _HEADER.match(message)
        assert header is not None
        return self._with_header(header, message, number)

    def _with_header(self, header: re.Match[bytes], message: bytes, number: int) -> Event | None:
        process, thread = int(header[1], 16), int(header[2], 16)
        body = header.end()
        self._note_who_speaks(process, thread, number)
        if message.startswith(_PRINT, body):
            return self._print(message, body + len(_PRINT), process, thread)
        if message.startswith((b"Call ", b"Ret  "), body):
            return self._relay(message[body:], process, thread, number)
        if message.startswith((b"err:", b"warn:debugstr:"), body):
            return self._told(message[body:], process, thread)
        return None

    def _note_who_speaks(self, process: int, thread: int, number: int) -> None:
        """Forget what is known of an earlier bearer of any of these numbers."""
        known = _recall(self._threads, thread)
        if known is None or known.process != process:
            _remember(self._threads, thread, _Thread(process))
        sender = self._senders.get(number)
        if number and sender is not None and sender.process != process:
            if sender.process is not None:
                left = (entry for entry in self._unfinished if entry[0] != number)
                self._unfinished = deque(left, maxlen=_UNFINISHED)
            sender.process = process
        hosted = _recall(self._processes, process)
        if hosted is not None and number and hosted.sender != number:
            del self._processes[process]
            self._threads[thread] = _Thread(process)

    def _print(self, message: bytes, at: int, process: int, thread: int) -> Event | None:
        if message.startswith(_STACK, at):
            record = _STACK_RECORD.fullmatch(message, at + len(_STACK))
            if record is not None:
                return self._stack(int(record[1], 16), record[2], self._driver(process, thread))
        levels = _PRINT_LEVELS.match(message, at)
        if levels is None:
            return DebugPrint(self._now, self._driver(process, thread), message[at:])
        return DebugPrint(
            self._now,
            self._driver(process, thread),
            message[levels.end() :],
            int(levels[1], 16),
            int(levels[2], 16),
        )

    def _stack(self, address: int, addresses: bytes, driver: str | None) -> Event | None:
        if driver is None:
            return None
        frames = _recall(
            self._stacks, addresses
        )  # the same few stacks over and over: one tuple each
        if frames is None:
            numbers = (int(address, 16) for address in addresses.split())
            # Wine walks on behind the end of the stack, which is a return address of 0.
            frames = tuple(itertools.takewhile(bool, numbers))
            _remember(self._stacks, addresses, frames)
        return PoolStack(self._now, driver, address, frames)

    def _relay(self, body: bytes, process: int, thread: int, number: int) -> Event | None:
        if call := _POOL_CALL.match(body):
            arguments = [int(argument, 16) for argument in call[2].split(b",") if argument]
            self._threads[thread].calls.append(_PoolCall(call[1].decode(), arguments))
            return None
        if returned := _POOL_RETURN.match(body):
            return self._pool_returned(returned, process, thread)
        if driver := _DRIVER_CALL.match(body):
            return self._driver_called(driver, process, thread, number)
        if bug_check := _BUG_CHECK_CALL.match(body):
            self._threads[thread].bug_check_caller = int(bug_check[1], 16)
        return None

    def _pool_returned(self, returned: re.Match[bytes], process: int, thread: int) -> Event | None:
        calls = self._threads[thread].calls
        if not calls or calls[-1].function != returned[1].decode():
            return None
        call = calls.pop()
        driver = self._driver(process, thread)
        value, caller = int(returned[2], 16), int(returned[3], 16)
        if driver is None:
            return None
        if call.function in _FREE:
            return self._freed(call, driver, value, caller)
        return self._allocated(call, driver, value, caller) if value else None

    def _allocated(self, call: _PoolCall, driver: str, address: int, caller: int) -> Event | None:
        kind, size, tag = (*call.arguments, 0, 0, 0)[:3]
        if call.function in ("ExAllocatePool2", "ExAllocatePool3"):
            pool_type = next((name for bit, name in _POOL_FLAGS.items() if kind & bit), hex(kind))
        else:
            pool_type = _POOL_TYPES.get(kind & ~0xC, f"pool type {kind}")
        name = _tag(tag) if "Tag" in call.function or call.function[-1].isdigit() else b"None"
        return PoolAllocated(self._now, driver, address, size, name, pool_type, caller)

    def _freed(self, call: _PoolCall, driver: str, value: int, caller: int) -> Event | None:
        if not call.arguments:
            return None
        tag = call.arguments[1] if call.function == "ExFreePoolWithTag" else 0
        return PoolFreed(
            self._now,
            driver,
            call.arguments[0],
            _tag(tag) if tag else None,
            caller,
            bool(value & 0xFF),
        )

    def _driver_called(
        self, match: re.Match[bytes], process: int, thread: int, number: int
    ) -> Event | None:
        begins = match[1] == b"Call"
        hosted = self._processes.get(process)
        if match[2] == b"unload":
            known = self._driver(process, thread)
            if known is None:
                return None
            if begins:
                return DriverUnloadCalled(self._now, known, process)
            if hosted is not None:
                hosted.end(known)
            return DriverUnload(self._now, known, process)
        if match[4] is None:
            return None
        driver = _unescape(match[4])
        if begins:
            self._threads[thread].running = driver
            if hosted is None:
                hosted = _remember(self._processes, process, _Process(number))
            hosted.begin(driver)
            return DriverInitCalled(self._now, driver, process, int(match[3], 16))
        self._threads[thread].running = None
        if match[5] is None:
            return None
        status = NTSTATUS(int(match[5], 16))
        if status and hosted is not None:
            hosted.end(driver)
        return DriverInit(self._now, driver, process, status)

    def _told(self, body: bytes, process: int, thread: int) -> Event | None:
        driver = self._driver(process, thread)
        if fence := _FENCE.match(body):
            return Fence(self._now, None, fence[1].decode("ascii", "replace"))
        if failed := _LOAD_FAILED.match(body):
            status = NTSTATUS(int(failed[2], 16))
            return DriverLoadFailed(self._now, _unescape(failed[1]), status)
        if bug_check := _BUG_CHECK.match(body):
            parameters = tuple(int(value, 16) for value in bug_check[2].split())
            caller = self._threads[thread].bug_check_caller
            return BugCheck(self._now, driver, int(bug_check[1], 16), parameters, caller)
        if body.startswith(b"err:"):
            return KernelMessage(self._now, driver, _text(body))
        return None

    def _without_header(self, message: bytes, sender: _Sender) -> Event | None:
        driver = self._driver_alone_in(sender.process)
        if exception := _EXCEPTION.match(message):
            thread = self._threads.get(int(exception[3], 16))
            if driver is None and thread is not None:
                driver = thread.running or self._driver_alone_in(thread.process)
            return self._exception(exception, driver)
        if missing := _MISSING_EXPORT.match(message):
            return MissingExport(
                self._now, driver, _text(missing[2]), _text(missing[3]), int(missing[1], 16)
            )
        return KernelMessage(self._now, driver, _text(message))

    def _exception(self, match: re.Match[bytes], driver: str | None) -> Event:
        what, address = match[1], int(match[2], 16)
        access = None
        if fault := _PAGE_FAULT.match(what):
            access = (_text(fault[1]), int(fault[2], 16))
        if code := _EXCEPTION_CODE.match(what):
            return UnhandledException(self._now, driver, int(code[1], 16), address)
        for words, status in _EXCEPTION_CODES.items():
            if what.startswith(b"Unhandled " + words):
                return UnhandledException(self._now, driver, int(status), address, access)
        return KernelMessage(self._now, driver, _text(match[0]))

    def _driver(self, process: int, thread: int) -> str | None:
        """The driver that runs on this thread, or alone in this process."""
        return self._threads[thread].running or self._driver_alone_in(process)

    def _driver_alone_in(self, process: int | None) -> str | None:
        hosted = self._processes.get(process) if process is not None else None
        return hosted.driver if hosted else None


def _remember(memory: OrderedDict[K, V], key: K, value: V) -> V:
    memory[key] = value
    if len(memory) > _REMEMBERED:
        memory.popitem(last=False)
    return value


def _recall(memory: OrderedDict[K, V], key: K) -> V | None:
    """What is known under ``key``, which is the last to be forgotten from now on."""
    value = memory.get(key)
    if value is not None:
        memory.move_to_end(key)
    return value


def _tag(value: int) -> bytes:
    return (value & 0xFFFFFFFF & ~_PROTECTED_POOL).to_bytes(4, "little")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace").rstrip("\n")


def _unescape(data: bytes) -> str:
    r"""A string as Wine's ``debugstr_w`` writes it: ``\\xNNNN`` is a UTF-16 unit."""

    def plain(match: re.Match[bytes]) -> bytes:
        unit = chr(int(match[1], 16)) if match[1] else match[2].decode("latin-1")
        return unit.encode("utf-16-le", "surrogatepass")

    pieces, at = [], 0
    for match in _ESCAPED.finditer(data):
        pieces.append(data[at : match.start()].decode("latin-1").encode("utf-16-le"))
        pieces.append(plain(match))
        at = match.end()
    pieces.append(data[at:].decode("latin-1").encode("utf-16-le"))
    return b"".join(pieces).decode("utf-16-le", "replace")
