"""A simulated Windows NT: what its kernel and its agent do, as far as a host can see it.

Its drivers are scripts in Python, each found by the image that is loaded: see ``drivers``. What it says of
itself is what a Windows set up for tests says; the numbers are those of ``pytest_kdriver``'s own sources.
Nothing in it was compared with a Windows.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol, TypeAlias

from pytest_kdriver.errors import ImageError
from pytest_kdriver.guest import messages
from pytest_kdriver.guest.registry import RegistryValue, decode_value, encode_value
from pytest_kdriver.guest.wire import Message
from pytest_kdriver.image.authenticode import SignatureError, read_signature
from pytest_kdriver.image.pe import Image, parse_image
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.win32error import Win32Error
from tests.dump_builder import header, minidump
from tests.kd.simulator import KdTarget
from tests.nt.agent import AgentServer
from tests.nt.debug_port import DebugPort, Halted

CONTROL = r"SYSTEM\CurrentControlSet\Control"
MINIDUMPS = r"C:\Windows\Minidump"
SERVICES = r"SYSTEM\CurrentControlSet\Services"

POOL_TAGS, KERNEL_DEBUGGER, CODE_INTEGRITY, SECURE_BOOT = 22, 35, 103, 145
"""Classes of NtQuerySystemInformation."""

FIRST_BASE = 0xFFFFF802_3F200000
FIRST_BLOCK = 0xFFFFBA86_10A43010

UNIX_EPOCH = 11_644_473_600
TICKS = 10_000_000

STOPPED, RUNNING = 1, 4
"""SERVICE_STATUS's."""

COMPLETED, STUCK = 0, 2
"""The agent's outcomes of a device's call."""

ACCESS_VIOLATION = 0xC0000005
EXCEPTION_RECORD, CONTEXT_RECORD = 0xFFFFB08A1C2F0A58, 0xFFFFB08A1C2F0290

CALLS_AT = 0x1055
"""Where in each image KeBugCheckEx would return to."""


Parameters: TypeAlias = tuple[int, int, int, int]


class Script(Protocol):
    """What a driver does. Each call runs in kernel mode, by a thread of its own."""

    def entry(self) -> int:
        """DriverEntry; its NTSTATUS."""
        ...

    def unload(self) -> None:
        """DriverUnload."""
        ...

    def control(self, code: int, data: bytes) -> tuple[int, bytes]:
        """A device's control request; its NTSTATUS, and its output."""
        ...


@dataclass(slots=True)
class Service:
    """A service of the kernel's, and its driver where that is loaded."""

    image_path: str
    driver: LoadedDriver | None = None


@dataclass(slots=True)
class LoadedDriver:
    """A driver in the kernel."""

    script: Script
    base: int
    path: str
    can_unload: bool


@dataclass(slots=True)
class Tag:
    """The counters of a pool tag, for one kind of pool."""

    allocations: int = 0
    frees: int = 0
    used: int = 0


@dataclass(slots=True)
class State:
    """All that a snapshot has."""

    files: dict[str, bytes] = field(default_factory=dict)
    services: dict[str, Service] = field(default_factory=dict)
    images: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Path and size of each driver's image, by its base."""
    values: dict[tuple[str, str], tuple[int, bytes]] = field(default_factory=dict)
    devices: dict[str, str] = field(default_factory=dict)
    """The services whose devices they are, by path."""
    handles: dict[int, str] = field(default_factory=dict)
    tags: dict[tuple[bytes, bool], Tag] = field(default_factory=dict)
    """By tag, and whether it is paged pool."""
    blocks: dict[int, tuple[bytes, bool, int]] = field(default_factory=dict)
    deferred: list[int] = field(default_factory=list)
    """Blocks that are freed by somebody else, soon."""
    clock_off: float = 0.0
    next_base: int = FIRST_BASE
    next_block: int = FIRST_BLOCK

    def set(self, key: str, name: str, value: RegistryValue) -> None:
        self.values[key.lower(), name.lower()] = encode_value(value)


def windows_for_tests() -> State:
    """A Windows as it is behind its installation, with test signing and kernel debugging on."""
    state = State()
    state.set(f"{CONTROL}\\Session Manager\\Debug Print Filter", "DEFAULT", 0xFFFFFFFF)
    state.set(f"{CONTROL}\\CrashControl", "CrashDumpEnabled", 3)
    state.set(f"{CONTROL}\\CrashControl", "AutoReboot", 1)
    state.set(f"{CONTROL}\\CI", "DebugFlags", 0x10)
    state.tags[b"Irp ", False] = Tag(0xFFFFFFF0, 0xFFFFFE00, 0x1F000)
    state.tags[b"MmSt", True] = Tag(81234, 80211, 0x401000)
    state.tags[b"rust", False] = Tag(0xFFFFFFFE, 0xFFFFFFF0, 0x380)
    return state


class Life:
    """A guest from its start, or its return to a snapshot, up to its end."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def check(self) -> None:
        if self.over.is_set():
            raise Halted

    def wait(self) -> NoReturn:
        """Stay where one is for as long as the guest lives."""
        self.over.wait()
        raise Halted


class NtGuest:
    """A guest that runs: an agent at the socket ``agent``, a kernel's debugger port at ``com1``.

    ``find_script`` gives the script of an image, by the image and its file's name. ``noisy`` are tags in
    which other drivers allocate and free all the time.
    """

    def __init__(
        self,
        agent: Path,
        com1: Path,
        find_script: Callable[[Image, str], Callable[[Kernel], Script] | None],
        *,
        processors: int = 2,
        noisy: Sequence[bytes] = (b"Irp ",),
    ) -> None:
        self._find_script = find_script
        self._noisy = tuple(noisy)
        self._lock = threading.RLock()
        self._uploads: dict[int, bytearray] = {}
        self._upload_paths: dict[int, str] = {}
        self._numbers = itertools.count(1)
        self._saved: State | None = None
        self._crash: tuple[int, Parameters] | None = None
        self.reverts = 0
        self.asked: list[Message] = []
        self.state = windows_for_tests()
        self.life = Life()
        self.port = DebugPort(com1, processors, self._reboot)
        self.agent = AgentServer(agent, self._serve)

    # its life

    def boot(self) -> None:
        """Start the kernel, whose first images and words go to the debugger, then the agent."""
        self.port.boot()
        self.agent.start()

    def save(self) -> None:
        """Take a snapshot."""
        with self._lock:
            self._saved = copy.deepcopy(self.state)
        self.port.save()

    def revert(self) -> None:
        """Go back to the snapshot, whatever the guest does now."""
        assert self._saved is not None
        self._stop()
        with self._lock:
            self.state = copy.deepcopy(self._saved)
        self.life = Life()
        self._uploads.clear()
        self._crash = None
        self.reverts += 1
        self.port.restore()
        self.agent.thaw()

    def _stop(self) -> None:
        """Freeze the processors for good."""
        self.agent.freeze()
        self.life.over.set()

    def close(self) -> None:
        self._stop()
        self.agent.close()
        self.port.close()

    def _reboot(self) -> None:
        """Come back from a bug check that the debugger has let go on: what is on the disk is there."""
        with self._lock:
            before, self.state = self.state, windows_for_tests()
            self.state.files, self.state.values = before.files, before.values
            if self._crash is not None:
                self.state.files[f"{MINIDUMPS}\\112326-8515-01.dmp".lower()] = self._dump(before)
            self.state.services = {
                name: Service(service.image_path) for name, service in before.services.items()
            }
        self.life = Life()
        self.agent.start()

    def _dump(self, state: State) -> bytes:
        assert self._crash is not None
        code, parameters = self._crash
        modules = [(path, base, size) for base, (path, size) in state.images.items()]
        return minidump(modules, head=bytes(header(code=code, parameters=parameters)))

    def bug_check_now(self, code: int, parameters: Parameters) -> None:
        """Have something bug-check that nobody has called."""
        with suppress(Halted):
            self.bug_check(code, parameters, blamed=None, processor=1, stack=())

    def freeze(self) -> None:
        """Stop all processors with their interrupts off: nobody answers, and no debugger is heard."""
        self._stop()
        self.port.freeze()

    def lose_debugger_port(self) -> None:
        """QEMU's end of COM1 is gone."""
        self.port.hang_up()

    # kernel mode

    def in_kernel(self, act: Callable[[DebugPort], None]) -> None:
        """Do what needs the debugger, and return when the kernel goes on."""
        life = self.life
        life.check()
        act(self.port)
        life.check()

    def halt_in(self, act: Callable[[KdTarget], int]) -> NoReturn:
        """Do what there is no way back from: all processors stop, and the debugger is told."""
        self.life.check()
        self._stop()
        self.port.post(act)
        raise Halted

    def bug_check(
        self,
        code: int,
        parameters: Parameters,
        *,
        blamed: str | None,
        processor: int,
        stack: Sequence[int],
    ) -> NoReturn:
        """KeBugCheckEx, as it is known to the dump, too."""
        self._crash = (code, parameters)
        self.halt_in(
            lambda kd: kd.bug_check(code, parameters, blamed, processor=processor, stack=stack)
        )

    # the agent's requests

    def _serve(self, request: Message) -> Message | None:
        life = self.life
        try:
            life.check()
            self.asked.append(request)
            answer = self._answer(request)
            life.check()
        except Halted:
            return None
        return answer

    def _answer(self, request: Message) -> Message:
        match request:
            case messages.Hello():
                return self._hello()
            case messages.LoadDriver():
                return messages.Code(code=self._load(request.name))
            case messages.UnloadDriver():
                return messages.Code(code=self._unload(request.name))
            case messages.StartService():
                return messages.Code(code=_to_win32(self._load(request.name)))
            case messages.StopService():
                return messages.Code(code=_to_win32(self._unload(request.name)))
            case messages.Fence():
                self.in_kernel(lambda port: port.call(lambda kd: kd.print(request.cookie)))
                return messages.Done()
            case messages.OpenDevice():
                return self._open(request)
            case messages.Ioctl():
                return self._control(request)
        with self._lock:
            return self._answer_quickly(request)

    def _answer_quickly(self, request: Message) -> Message:
        state = self.state
        match request:
            case messages.PutBegin():
                number = next(self._numbers)
                self._uploads[number] = bytearray()
                self._upload_paths[number] = request.path
                return messages.Upload(upload=number)
            case messages.PutData():
                content = self._uploads[request.upload]
                end = request.offset + len(request.data)
                content.extend(bytes(max(end - len(content), 0)))
                content[request.offset : end] = request.data
                return messages.Done()
            case messages.PutEnd():
                content = self._uploads.pop(request.upload)
                if hashlib.sha256(content).digest() != request.sha256:
                    return _refused("the file did not arrive as it was sent")
                state.files[self._upload_paths.pop(request.upload).lower()] = bytes(content)
                return messages.Done()
            case messages.PutAbort():
                self._uploads.pop(request.upload, None)
                return messages.Done()
            case messages.Get():
                content_of = state.files.get(request.path.lower())
                if content_of is None:
                    return _failed(Win32Error.ERROR_FILE_NOT_FOUND, "open the file")
                return messages.File(data=content_of, sha256=hashlib.sha256(content_of).digest())
            case messages.Delete():
                if state.files.pop(request.path.lower(), None) is None:
                    return _failed(Win32Error.ERROR_FILE_NOT_FOUND, "delete the file")
                return messages.Done()
            case messages.Hash():
                content_of = state.files.get(request.path.lower())
                return messages.OptionalHash(
                    sha256=None if content_of is None else hashlib.sha256(content_of).digest()
                )
            case messages.CreateService():
                if request.name in state.services:
                    return _failed(Win32Error.ERROR_SERVICE_EXISTS, "create the service")
                state.services[request.name] = Service(request.image_path)
                return messages.Done()
            case messages.DeleteService():
                if state.services.pop(request.name, None) is None:
                    return _failed(Win32Error.ERROR_SERVICE_DOES_NOT_EXIST, "open the service")
                self._forget_key(f"{SERVICES}\\{request.name}")
                return messages.Done()
            case messages.QueryService():
                return self._query(request.name)
            case messages.SetValue():
                state.values[request.key.lower(), request.name.lower()] = (
                    request.kind,
                    request.data,
                )
                return messages.Done()
            case messages.GetValue():
                found = state.values.get((request.key.lower(), request.name.lower()))
                value = None if found is None else messages.Value(kind=found[0], data=found[1])
                return messages.OptionalValue(value=value)
            case messages.DeleteValue():
                if state.values.pop((request.key.lower(), request.name.lower()), None) is None:
                    return _failed(Win32Error.ERROR_FILE_NOT_FOUND, "delete the value")
                return messages.Done()
            case messages.DeleteKey():
                self._forget_key(request.key)
                return messages.Done()
            case messages.SystemInformation():
                return self._inform(request.information_class)
            case messages.CloseDevice():
                if state.handles.pop(request.device, None) is None:
                    return _refused("no such device is open")
                return messages.Done()
            case messages.Clock():
                now = time.time() + state.clock_off + UNIX_EPOCH
                return messages.FileTime(time=round(now * TICKS))
            case messages.SetClock():
                state.clock_off = request.time / TICKS - UNIX_EPOCH - time.time()
                return messages.Done()
            case messages.Run(command_line=command) if MINIDUMPS in command:
                return self._list_dumps()
            case messages.FreeSpace():
                return messages.Room(bytes=20 << 30)
            case _:
                return _refused(f"{type(request).__name__} is beyond this guest")

    def _list_dumps(self) -> messages.Completed:
        """The one program that this guest can run: ``dir /b`` of its minidumps."""
        folder = f"{MINIDUMPS}\\".lower()
        names = [p.removeprefix(folder) for p in self.state.files if p.startswith(folder)]
        listed = "".join(f"{name}\r\n" for name in names).encode()
        return messages.Completed(
            exit_code=0 if names else 1, stdout=listed, stderr=b"", timed_out=False, truncated=False
        )

    def _hello(self) -> messages.HelloReply:
        return messages.HelloReply(
            protocol=1,
            version="0.1.0",
            architecture="x86_64",
            os_major=10,
            os_minor=0,
            os_build=19045,
            wine_version=None,
            elevated=True,
            pid=4242,
            operations=tuple(operation.name for operation in messages.OPERATIONS),
        )

    def _forget_key(self, key: str) -> None:
        below = key.lower()
        for entry in list(self.state.values):
            if entry[0] == below or entry[0].startswith(f"{below}\\"):
                del self.state.values[entry]

    def _query(self, name: str) -> Message:
        service = self.state.services.get(name)
        if service is None:
            return messages.OptionalServiceStatus(status=None)
        state = RUNNING if service.driver is not None else STOPPED
        return messages.OptionalServiceStatus(
            status=messages.ServiceStatus(
                state=state, win32_exit_code=0, service_exit_code=0, pid=0
            )
        )

    def _inform(self, information_class: int) -> Message:
        match information_class:
            case 22:
                return messages.Information(data=self._pool_tags())
            case 35:
                return messages.Information(data=bytes([1, 0]))  # enabled, and not absent
            case 103:
                return messages.Information(data=struct.pack("<II", 8, 0x3))
            case 145:
                return messages.Information(data=bytes([0, 1]))
            case _:
                code = NTSTATUS.STATUS_INVALID_INFO_CLASS
                return messages.Error(domain=2, code=code, message="query the information")

    def _pool_tags(self) -> bytes:
        """SYSTEM_POOLTAG_INFORMATION; while it is asked for, the others go on."""
        for address in self.state.deferred[:1]:
            self.state.deferred.remove(address)
            self.free(address)
        for tag in self._noisy:
            counters = self.state.tags.setdefault((tag, False), Tag())
            counters.allocations += 3
            counters.frees += 2
            counters.used += 0x40
        tags = sorted({tag for tag, _ in self.state.tags})
        entries = b""
        for tag in tags:
            entries += tag
            for paged, filler in ((True, b""), (False, b"")):
                counters = self.state.tags.get((tag, paged), Tag())
                allocations, frees = (
                    n & 0xFFFFFFFF for n in (counters.allocations, counters.frees)
                )
                entries += struct.pack("<II", allocations, frees) + filler
                entries += bytes(4) if paged else b""
                entries += struct.pack("<Q", counters.used)
        return struct.pack("<II", len(tags), 0) + entries

    # pool

    def allocate(self, tag: bytes, size: int, *, paged: bool) -> int:
        with self._lock:
            counters = self.state.tags.setdefault((tag, paged), Tag())
            counters.allocations += 1
            counters.used += size
            address = self.state.next_block
            self.state.next_block += -(-size // 16) * 16 + 16
            self.state.blocks[address] = (tag, paged, size)
            return address

    def free(self, address: int) -> None:
        with self._lock:
            tag, paged, size = self.state.blocks.pop(address)
            counters = self.state.tags[tag, paged]
            counters.frees += 1
            counters.used -= size

    def defer_free(self, address: int) -> None:
        with self._lock:
            self.state.deferred.append(address)

    # drivers

    def _load(self, name: str) -> int:
        with self._lock:
            service = self.state.services.get(name)
            if service is None:
                return NTSTATUS.STATUS_OBJECT_NAME_NOT_FOUND
            if service.driver is not None:
                return NTSTATUS.STATUS_IMAGE_ALREADY_LOADED
            content = self.state.files.get(service.image_path.lower().removeprefix("\\??\\"))
            if content is None:
                return NTSTATUS.STATUS_OBJECT_NAME_NOT_FOUND
            file = service.image_path.rpartition("\\")[2]
            try:
                image = parse_image(content, Path(file))
            except ImageError:
                return NTSTATUS.STATUS_INVALID_IMAGE_FORMAT
            try:
                read_signature(image)
            except SignatureError:
                return NTSTATUS.STATUS_INVALID_IMAGE_HASH
            base = self.state.next_base
            self.state.next_base += -(-image.size // 0x10000) * 0x10000 + 0x10000
            path = f"\\??\\{service.image_path}"
            self.state.images[base] = (path, image.size)
        self.in_kernel(lambda port: port.call(lambda kd: kd.load(path, base, image.size)))
        status, driver = self._enter(name, image, file, path, base)
        if not NTSTATUS(status).is_success:
            self._unload_image(path, base)
            return status
        with self._lock:
            service.driver = driver
        return status

    def _enter(
        self, service: str, image: Image, file: str, path: str, base: int
    ) -> tuple[int, LoadedDriver | None]:
        make = self._find_script(image, file)
        if make is None:
            return _run(image.read(image.entry, 16)), None
        script = make(Kernel(self, service, base))
        can_unload = getattr(script, "can_unload", True)
        return script.entry(), LoadedDriver(script, base, path, can_unload)

    def _unload(self, name: str) -> int:
        with self._lock:
            service = self.state.services.get(name)
            driver = service.driver if service is not None else None
        if service is None or driver is None:
            return NTSTATUS.STATUS_OBJECT_NAME_NOT_FOUND
        if not driver.can_unload:
            return NTSTATUS.STATUS_INVALID_DEVICE_REQUEST
        driver.script.unload()
        with self._lock:
            service.driver = None
            for path in [path for path, owner in self.state.devices.items() if owner == name]:
                del self.state.devices[path]
        self._unload_image(driver.path, driver.base)
        return NTSTATUS.STATUS_SUCCESS

    def _unload_image(self, path: str, base: int) -> None:
        with self._lock:
            del self.state.images[base]
        self.in_kernel(lambda port: port.call(lambda kd: kd.unload(path)))

    # devices

    def _open(self, request: messages.OpenDevice) -> Message:
        with self._lock:
            owner = self.state.devices.get(request.path.lower())
            if owner is None:
                status = NTSTATUS.STATUS_OBJECT_NAME_NOT_FOUND
                return messages.DeviceOpened(status=status, outcome=COMPLETED, device=0)
            handle = next(self._numbers)
            self.state.handles[handle] = owner
            return messages.DeviceOpened(status=0, outcome=COMPLETED, device=handle)

    def _control(self, request: messages.Ioctl) -> Message:
        with self._lock:
            owner = self.state.handles.get(request.device)
            driver = self.state.services[owner].driver if owner is not None else None
        if driver is None:
            return _refused("no such device is open")
        done: list[tuple[int, bytes]] = []

        def control() -> None:
            with suppress(Halted):
                done.append(driver.script.control(request.code, request.data))

        worker = threading.Thread(target=control, name="nt-ioctl", daemon=True)
        worker.start()
        worker.join(request.time_limit / 1000)
        if not done:
            self.life.check()
            pending = NTSTATUS.STATUS_PENDING
            return messages.IoEnded(status=pending, outcome=STUCK, count=0, data=b"")
        status, data = done[0]
        data = data[: request.output_size]
        return messages.IoEnded(status=status, outcome=COMPLETED, count=len(data), data=data)


class Kernel:
    """What the kernel gives a driver whose image is at ``base``."""

    def __init__(self, guest: NtGuest, service: str, base: int) -> None:
        self._guest = guest
        self._service = service
        self.base = base
        self.processor = 0

    def print(self, text: str) -> None:
        """DbgPrint: the kernel stands still until the debugger has it."""
        self._guest.in_kernel(
            lambda port: port.call(lambda kd: kd.print(text, processor=self.processor))
        )

    def parameter(self, name: str, default: int | str = 0) -> int | str:
        """A value of the service's Parameters key."""
        key = f"{SERVICES}\\{self._service}\\Parameters".lower()
        found = self._guest.state.values.get((key, name.lower()))
        value = default if found is None else decode_value(*found)
        assert isinstance(value, int | str)
        return value

    def allocate(self, tag: bytes, size: int, *, paged: bool = False) -> int:
        """ExAllocatePool2; the block's address."""
        return self._guest.allocate(tag, size, paged=paged)

    def free(self, address: int) -> None:
        """ExFreePool."""
        self._guest.free(address)

    def free_later(self, address: int) -> None:
        """What a work item does that outlives the unload: free it when the counters were looked at."""
        self._guest.defer_free(address)

    def create_device(self, name: str) -> None:
        """IoCreateDevice and IoCreateSymbolicLink."""
        for path in (f"\\Device\\{name}", f"\\??\\{name}"):
            self._guest.state.devices[path.lower()] = self._service

    def bug_check(self, code: int, *parameters: int, blamed: str | None = None) -> NoReturn:
        """KeBugCheckEx."""
        first, second, third, fourth = parameters
        self._guest.bug_check(
            code,
            (first, second, third, fourth),
            blamed=blamed,
            processor=self.processor,
            stack=(self.base + CALLS_AT,),
        )

    def fault(self, offset: int, *, then: int) -> NoReturn:
        """Write to address 0x10 at ``offset`` of the image; who has called the driver makes it a bug check.

        ``then`` is that of a system's thread, or of a system service.
        """
        at = self.base + offset
        self.bug_check(then, ACCESS_VIOLATION, at, EXCEPTION_RECORD, CONTEXT_RECORD)

    def fault_unhandled(self, offset: int) -> NoReturn:
        """The same where nobody handles it: the debugger has its second chance, then comes a bug check."""
        at = self.base + offset
        self._guest.halt_in(
            lambda kd: kd.exception(ACCESS_VIOLATION, at, (1, 0x10), processor=self.processor)
        )

    def breakpoint(self, offset: int) -> None:
        """int 3."""
        at = self.base + offset
        self._guest.in_kernel(lambda port: port.call(lambda kd: kd.breakpoint(at)))

    def assertion(self, offset: int) -> None:
        """int 2Ch."""
        at = self.base + offset
        self._guest.in_kernel(lambda port: port.call(lambda kd: kd.breakpoint(at, assertion=True)))

    def hang(self, offset: int) -> NoReturn:
        """Never leave ``offset`` of the image, while the rest of the guest goes on."""
        self._guest.port.post(
            lambda kd: kd.run_at(self.processor, self.base + offset, (self.base + CALLS_AT,))
        )
        self._guest.life.wait()


def _run(code: bytes) -> int:
    """What ``mov eax, status; ret`` returns, the one machine code that this guest knows."""
    if code[:1] == b"\xb8" and code[5:6] == b"\xc3":
        return int.from_bytes(code[1:5], "little")
    return NTSTATUS.STATUS_INVALID_IMAGE_FORMAT


def _to_win32(status: int) -> Win32Error:
    """RtlNtStatusToDosError of what this guest's drivers return."""
    return {
        NTSTATUS.STATUS_SUCCESS: Win32Error.ERROR_SUCCESS,
        NTSTATUS.STATUS_IMAGE_ALREADY_LOADED: Win32Error.ERROR_SERVICE_ALREADY_RUNNING,
        NTSTATUS.STATUS_OBJECT_NAME_NOT_FOUND: Win32Error.ERROR_FILE_NOT_FOUND,
        NTSTATUS.STATUS_INVALID_DEVICE_REQUEST: Win32Error.ERROR_INVALID_SERVICE_CONTROL,
    }.get(NTSTATUS(status), Win32Error.ERROR_MR_MID_NOT_FOUND)


def _failed(code: Win32Error, doing: str) -> messages.Error:
    return messages.Error(domain=1, code=code, message=doing)


def _refused(why: str) -> messages.Error:
    return messages.Error(domain=0, code=0, message=why)
