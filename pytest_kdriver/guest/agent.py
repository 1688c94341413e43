"""What can be done in the guest."""

from __future__ import annotations

import hashlib
import io
import math
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar, cast

from pytest_kdriver.errors import (
    AgentError,
    AgentProtocolError,
    KdriverError,
    LinkError,
    NotImplementedByGuest,
)
from pytest_kdriver.guest import messages
from pytest_kdriver.guest.frames import MAX_REPLY, PROTOCOL_VERSION, Decoder, Frame, Kind, encode
from pytest_kdriver.guest.links.link import Link, PortLink
from pytest_kdriver.guest.messages import Completed, Process, Request, ServiceStatus
from pytest_kdriver.guest.registry import RegistryValue, decode_value, encode_value
from pytest_kdriver.guest.wire import Message, from_bytes, to_bytes
from pytest_kdriver.guest.words import words
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.win32error import Win32Error

__all__ = [
    "Agent",
    "AgentInfo",
    "Completed",
    "IoOutcome",
    "IoResult",
    "OpenResult",
    "Process",
    "ServiceStatus",
]

DEFAULT_TIMEOUT = 30.0
"""How long, in seconds, a call waits for its answer."""

RUN_MARGIN = 10.0
"""How much longer, in seconds, than a program's own time limit its answer may take."""

IO_MARGIN = 10.0
"""How much longer, in seconds, than a device call's time limit its answer may take. The agent itself lets
two of them pass between the cancelling and the giving up."""

ABORT_TIMEOUT = 5.0
"""How long, in seconds, a ``put`` that failed waits for its remains to be removed."""

OUTPUT_LIMIT = 16 << 20
"""The most bytes that are kept of each output of a program."""

PUT_CHUNK = 512 << 10
"""How many bytes of a file go into one message."""

PUT_WINDOW = 4
"""How many such messages are on their way at a time."""

CLOCK_TOLERANCE = 2.0
"""How far, in seconds, a clock may be from what it was just set to."""

_NO_FRAME = b"\0\0\0\0"
"""A frame's length that no frame has."""

_DATE_TIMEOUT = 5.0
_DATE_POLL = 0.02

_TICKS = 10_000_000
"""How many of a FILETIME's units are in a second."""

_UNIX_EPOCH = 11_644_473_600 * _TICKS
"""1970, as a FILETIME."""

R = TypeVar("R", bound=Message)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentInfo:
    """What the agent says of itself and of the guest.

    ``os_version`` is RtlGetVersion's: major, minor, build. ``wine_version`` is None on Windows.
    """

    protocol: int
    version: str
    architecture: str
    os_version: tuple[int, int, int]
    wine_version: str | None
    elevated: bool
    pid: int
    operations: frozenset[str]


class IoOutcome(Enum):
    """How a call of a device came to its end."""

    COMPLETED = 0
    """By itself."""
    CANCELLED = 1
    """After it was cancelled, at its time limit or by ``close_device``. The status says as what the driver
    then completed it: STATUS_CANCELLED as a rule."""
    STUCK = 2
    """Not at all: it was cancelled, and the driver still did not give it back. It is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IoResult:
    """What came of a call of a device.

    ``data`` is what was read, or a control request's output, empty for an error. ``count`` is the
    IO_STATUS_BLOCK's Information, which a driver may set at will: 0 where the guest does not say. Of what
    is STUCK the status is STATUS_PENDING.
    """

    status: NTSTATUS
    data: bytes
    count: int
    outcome: IoOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenResult:
    """What came of opening a device. ``device`` is the agent's number for it; None if it is not open.

    ``outcome`` is COMPLETED or STUCK: there is no way to cancel an open. One that ends after it was given
    up is closed at once.
    """

    status: NTSTATUS
    device: int | None
    outcome: IoOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    request: Request[Message]
    take: Callable[[bytes], None]
    fail: Callable[[Exception], None]
    parts: bytearray


class Agent:
    """The agent at the other end of a link. Made by ``connect``.

    Every method may be called from any thread, and none holds up another. ``timeout`` is in seconds: after
    it ``TimeoutError``, and an answer that comes late is dropped. An error that the guest answers is an
    ``AgentError``. When the link ends, all that waits fails with ``LinkError`` at once, and so does every
    later call.

    Where the link is a port's, ``resume`` begins anew with the same agent.

    Paths are the guest's, absolute. Registry keys are below HKEY_LOCAL_MACHINE. The callbacks of a
    ``Future`` run on the thread that reads the link: they must not wait for another answer.
    """

    info: AgentInfo

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._last_request = 0
        self._failure: Exception | None = None
        self._suspended = False
        self._reader = self._start_reader()

    def _start_reader(self) -> threading.Thread:
        reader = threading.Thread(target=self._read, name="kdriver-agent", daemon=True)
        reader.start()
        return reader

    @classmethod
    def connect(cls, link: Link, *, timeout: float) -> Agent:
        """Greet the agent. The link is the agent's from now on, and is closed if this fails.

        ``LinkError`` if the link ends, ``TimeoutError`` if no answer comes, ``AgentError`` if the answer
        is an error, ``AgentProtocolError`` if it is none, or not of this version.
        """
        agent = cls(link)
        agent._greet(timeout)
        return agent

    def _greet(self, timeout: float) -> None:
        try:
            hello = self._call(messages.Hello(protocol=PROTOCOL_VERSION), timeout)
            if hello.protocol != PROTOCOL_VERSION:
                raise AgentProtocolError(
                    f"the agent speaks version {hello.protocol} of the protocol, "
                    f"this package {PROTOCOL_VERSION}: put its own kdagent.exe into the guest"
                )
        except BaseException as error:
            self.close()
            if isinstance(error, LinkError) and isinstance(self._failure, AgentProtocolError):
                raise self._failure from None  # what is there spoke first, and is no agent
            raise
        self.info = AgentInfo(
            protocol=hello.protocol,
            version=hello.version,
            architecture=hello.architecture,
            os_version=(hello.os_major, hello.os_minor, hello.os_build),
            wine_version=hello.wine_version,
            elevated=hello.elevated,
            pid=hello.pid,
            operations=frozenset(hello.operations),
        )

    def resume(self, *, timeout: float) -> None:
        """Begin anew with the agent at the same port, after the guest was put back to a snapshot.

        All that waits for an answer fails with ``LinkError``; devices that were open are closed, and ``info``
        is asked for again. Errors are those of ``connect``, and the link is closed then. ``TypeError`` for a
        link that is no port's: it does not survive what this is for.
        """
        link = self._link
        if not isinstance(link, PortLink):
            raise TypeError(f"a {type(link).__name__} can't be resumed; connect anew")
        if threading.current_thread() is self._reader:
            raise RuntimeError("resume was called by a Future's callback, which must not wait")
        deadline = time.monotonic() + timeout
        self._suspended = True
        try:
            link.suspend()
            self._reader.join()
            self._fail_pending("the guest was put back")
            if self._failure is not None:
                raise LinkError("resume: the link to the agent has ended") from self._failure
            link.resync(timeout)
        except BaseException:
            self._fail(LinkError("the link to the agent has ended"))
            raise
        self._suspended = False
        self._reader = self._start_reader()
        self._greet(_left(deadline))

    def park(self, *, timeout: float) -> None:
        """Have the agent at a port drop all that comes until the next session, and end this one and the link.

        That is how it has to be in a snapshot: requests that are on their way when that is loaded would be
        done in the guest that was put back. What makes it so is a frame that is none, and its complaint
        says that it is. ``TimeoutError`` where that does not come, ``LinkError`` where the link is gone.
        """
        deadline = time.monotonic() + timeout
        if self.pending:
            raise RuntimeError(f"park was called while {self.pending} requests wait for answers")
        self._link.send(_NO_FRAME, timeout)
        self._reader.join(_left(deadline))
        if self._reader.is_alive():
            raise TimeoutError("park: the agent did not answer in time")
        self.close()

    @property
    def pending(self) -> int:
        """How many requests wait for an answer."""
        with self._lock:
            return len(self._pending)

    @property
    def closed(self) -> bool:
        """Whether the link has ended."""
        return self._failure is not None or self._link.ended is not None

    @property
    def ended(self) -> str | None:
        """Why the link ended, in the link's words; None while it has not."""
        return self._link.ended

    def close(self) -> None:
        """End the link, and with it the agent's process, but for one that stays at its port."""
        self._link.close()
        if threading.current_thread() is not self._reader:
            self._reader.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # files

    def put(self, source: bytes | Path, path: str, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Write a file: bytes, or the content of a file of the host's. Folders are made.

        The file appears whole or not at all, in the place of one that was there.
        """
        deadline = time.monotonic() + timeout
        hasher = hashlib.sha256()
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
            upload = self._call(messages.PutBegin(path=path), timeout).upload
            try:
                self._send_content(stream, upload, hasher.update, deadline)
                self._call(messages.PutEnd(upload=upload, sha256=hasher.digest()), _left(deadline))
            except BaseException:
                with suppress(KdriverError, TimeoutError):
                    self._call(messages.PutAbort(upload=upload), ABORT_TIMEOUT)
                raise

    def _send_content(
        self,
        stream: io.BufferedIOBase,
        upload: int,
        hash_chunk: Callable[[bytes], None],
        deadline: float,
    ) -> None:
        window: deque[_Answer[messages.Done]] = deque()
        offset = 0
        try:
            while chunk := stream.read(PUT_CHUNK):
                hash_chunk(chunk)
                if len(window) == PUT_WINDOW:
                    window.popleft().wait(_left(deadline))
                request = messages.PutData(upload=upload, offset=offset, data=chunk)
                window.append(self._submit(request, _same, _left(deadline)))
                offset += len(chunk)
            while window:
                window.popleft().wait(_left(deadline))
        except AgentError:
            for answer in window:  # the file is not gone before nobody writes to it
                with suppress(KdriverError, TimeoutError):
                    answer.wait(_left(deadline))
            raise

    def get(self, path: str, *, timeout: float = DEFAULT_TIMEOUT) -> bytes:
        """A file's content."""
        file = self._call(messages.Get(path=path), timeout)
        if hashlib.sha256(file.data).digest() != file.sha256:
            raise AgentError(f"{path!r} did not arrive as it was sent", operation="get")
        return file.data

    def delete(self, path: str, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Delete a file."""
        self._call(messages.Delete(path=path), timeout)

    def hash(self, path: str, *, timeout: float = DEFAULT_TIMEOUT) -> bytes | None:
        """A file's SHA-256. None: no such file."""
        return self._call(messages.Hash(path=path), timeout).sha256

    # services and drivers

    def create_service(
        self, name: str, image_path: str, *, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """Register a kernel driver with the service control manager, to be started on demand."""
        self._call(messages.CreateService(name=name, image_path=image_path), timeout)

    def delete_service(self, name: str, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Remove a service's registration."""
        self._call(messages.DeleteService(name=name), timeout)

    def start_service(self, name: str, *, timeout: float = DEFAULT_TIMEOUT) -> Win32Error:
        """Start a service by the service control manager; its code, an error's too, is the answer."""
        return Win32Error(self._call(messages.StartService(name=name), timeout).code)

    def stop_service(self, name: str, *, timeout: float = DEFAULT_TIMEOUT) -> Win32Error:
        """Stop a service by the service control manager; its code, an error's too, is the answer."""
        return Win32Error(self._call(messages.StopService(name=name), timeout).code)

    def submit_start(self, name: str) -> Future[Win32Error]:
        """``start_service``, unawaited."""
        request = messages.StartService(name=name)
        return self._submit(request, _to_win32_error, DEFAULT_TIMEOUT).future

    def submit_stop(self, name: str) -> Future[Win32Error]:
        """``stop_service``, unawaited."""
        request = messages.StopService(name=name)
        return self._submit(request, _to_win32_error, DEFAULT_TIMEOUT).future

    def query_service(self, name: str, *, timeout: float = DEFAULT_TIMEOUT) -> ServiceStatus | None:
        """What the service control manager knows of a service. None: no such service."""
        return self._call(messages.QueryService(name=name), timeout).status

    def load_driver(self, service: str, *, timeout: float = DEFAULT_TIMEOUT) -> NTSTATUS:
        """NtLoadDriver of a service: DriverEntry's status, or the loader's.

        ``NotImplementedByGuest`` on Wine; ``AgentError`` (ERROR_NOT_ALL_ASSIGNED) where the agent does not
        hold SeLoadDriverPrivilege.
        """
        code = self._call(messages.LoadDriver(name=service), timeout).code
        return self._implemented("load_driver", NTSTATUS(code))

    def unload_driver(self, service: str, *, timeout: float = DEFAULT_TIMEOUT) -> NTSTATUS:
        """NtUnloadDriver of a service. Errors are those of ``load_driver``."""
        code = self._call(messages.UnloadDriver(name=service), timeout).code
        return self._implemented("unload_driver", NTSTATUS(code))

    def _implemented(self, operation: str, status: NTSTATUS) -> NTSTATUS:
        """On Windows, where the call is there for sure, the status is DriverEntry's own."""
        if self.info.wine_version is None or status != NTSTATUS.STATUS_NOT_IMPLEMENTED:
            return status
        raise NotImplementedByGuest(
            "this guest does not have the call; start and stop by the service control manager",
            operation=operation,
            code=status,
        )

    # the registry

    def set_value(
        self, key: str, name: str, value: RegistryValue, *, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """Set a value; the key is made. ``registry.encode_value`` says what becomes of what."""
        kind, data = encode_value(value)
        self._call(messages.SetValue(key=key, name=name, kind=kind, data=data), timeout)

    def get_value(
        self, key: str, name: str, *, timeout: float = DEFAULT_TIMEOUT
    ) -> int | str | bytes | list[str] | None:
        """A value, as ``registry.decode_value`` reads it. None: no such key or value."""
        value = self._call(messages.GetValue(key=key, name=name), timeout).value
        return None if value is None else decode_value(value.kind, value.data)

    def delete_value(self, key: str, name: str, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Delete a value."""
        self._call(messages.DeleteValue(key=key, name=name), timeout)

    def delete_key(self, key: str, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Delete a key and all below it."""
        self._call(messages.DeleteKey(key=key), timeout)

    # processes and the system

    def processes(self, *, timeout: float = DEFAULT_TIMEOUT) -> list[Process]:
        """The processes that run, in no order."""
        return list(self._call(messages.Processes(), timeout).processes)

    def terminate(self, pid: int, exit_code: int = 1, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """End a process."""
        self._call(messages.Terminate(pid=pid, exit_code=exit_code), timeout)

    def wait_process(self, pid: int) -> Future[int]:
        """The exit code of a process, once it has ended. It fails if there is no such process."""
        request = messages.WaitProcess(pid=pid)
        return self._submit(request, lambda reply: reply.exit_code, DEFAULT_TIMEOUT).future

    def system_information(
        self, information_class: int, *, timeout: float = DEFAULT_TIMEOUT
    ) -> bytes:
        """NtQuerySystemInformation's answer, as it came. Its error is an ``AgentError``'s NTSTATUS."""
        request = messages.SystemInformation(information_class=information_class)
        return self._call(request, timeout).data

    def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes = b"",
        directory: str | None = None,
        time_limit: float = 30.0,
        timeout: float | None = None,
    ) -> Completed:
        """Run a program to its end, or for ``time_limit`` seconds: then it is ended, and told as such.

        The command is quoted by the rules of CommandLineToArgvW. ``stdin`` must fit into one message (1
        MiB); of each output 16 MiB are kept. What the program left running keeps running. Without a
        ``timeout`` the answer may take ten seconds longer than the program.
        """
        request = messages.Run(
            command_line=subprocess.list2cmdline(command),
            directory=directory,
            stdin=stdin,
            time_limit=_milliseconds(time_limit),
            output_limit=OUTPUT_LIMIT,
        )
        return self._call(request, time_limit + RUN_MARGIN if timeout is None else timeout)

    def clock(self, *, timeout: float = DEFAULT_TIMEOUT) -> float:
        """What time it is in the guest, in seconds since 1970."""
        return (self._call(messages.Clock(), timeout).time - _UNIX_EPOCH) / _TICKS

    def set_clock(self, unix_seconds: float, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Say what time it is, in seconds since 1970. ``AgentError`` if the guest does not take it.

        Wine does not set the system's clock: there the guest's own ``date`` is run.
        """
        said = time.monotonic()
        if self.info.wine_version is None:
            ticks = round(unix_seconds * _TICKS) + _UNIX_EPOCH
            self._call(messages.SetClock(time=ticks), timeout)
            return
        done = self.run(
            [r"Z:\bin\date", "-u", "-s", f"@{unix_seconds:.3f}"],
            time_limit=timeout,
            timeout=timeout,
        )
        # Wine tells no end of a Unix program: its run is over before date has done anything.
        until = min(said + timeout, time.monotonic() + _DATE_TIMEOUT)
        while True:
            off = self.clock(timeout=timeout) - unix_seconds - (time.monotonic() - said)
            if abs(off) <= CLOCK_TOLERANCE or time.monotonic() >= until:
                break
            time.sleep(_DATE_POLL)
        if abs(off) > CLOCK_TOLERANCE:
            told = words(done.stderr.decode(errors="replace").strip()) or "date said nothing"
            raise AgentError(
                f"the guest's clock is {off:+.1f} s off behind date ({told}); it may be set by root alone",
                operation="set_clock",
            )

    def free_space(self, path: str, *, timeout: float = DEFAULT_TIMEOUT) -> int:
        """How much room, in bytes, the agent may use of the disk that the folder ``path`` is on."""
        return self._call(messages.FreeSpace(path=path), timeout).bytes

    # devices

    def open_device(self, path: str, *, time_limit: float) -> OpenResult:
        r"""Open a device for reading and writing. The path is NT's: ``\??\name``, ``\Device\Name``.

        Of all calls of devices: what the driver, or the system, says is the result, an error too. They
        wait ``time_limit`` seconds for the driver; ``IoOutcome`` says what happens then. An ``AgentError``
        is a refusal of the agent's own: no such device is open, or too much is asked for.
        """
        request = messages.OpenDevice(path=path, time_limit=_milliseconds(time_limit))
        opened = self._call(request, time_limit + IO_MARGIN)
        return OpenResult(
            status=NTSTATUS(opened.status),
            device=opened.device or None,
            outcome=_to_outcome(opened.outcome),
        )

    def read_device(self, device: int, length: int, *, time_limit: float) -> IoResult:
        """Read at most ``length`` bytes, 16 MiB at most, at the offset 0."""
        request = messages.ReadDevice(
            device=device, length=length, time_limit=_milliseconds(time_limit)
        )
        return _to_io_result(self._call(request, time_limit + IO_MARGIN))

    def write_device(self, device: int, data: bytes, *, time_limit: float) -> IoResult:
        """Write at the offset 0. ``data`` must fit into one message (1 MiB)."""
        request = messages.WriteDevice(
            device=device, data=data, time_limit=_milliseconds(time_limit)
        )
        return _to_io_result(self._call(request, time_limit + IO_MARGIN))

    def ioctl(
        self, device: int, code: int, data: bytes, output_size: int, *, time_limit: float
    ) -> IoResult:
        """Make a control request. ``data`` must fit into one message, ``output_size`` is 16 MiB at most."""
        request = messages.Ioctl(
            device=device,
            code=code,
            data=data,
            output_size=output_size,
            time_limit=_milliseconds(time_limit),
        )
        return _to_io_result(self._call(request, time_limit + IO_MARGIN))

    def close_device(self, device: int, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Close a device. What is on its way is cancelled before, and given up after two seconds."""
        self._call(messages.CloseDevice(device=device), timeout)

    def fence(self, cookie: str, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Write ``cookie`` into the guest's debug output, behind all that was there before."""
        self._call(messages.Fence(cookie=cookie), timeout)

    # requests and answers

    def _call(self, request: Request[R], timeout: float) -> R:
        deadline = time.monotonic() + timeout
        return self._submit(request, _same, timeout).wait(_left(deadline))

    def _submit(self, request: Request[R], convert: Callable[[R], T], timeout: float) -> _Answer[T]:
        """Send a request. ``timeout`` is for the sending alone."""
        operation = messages.OPERATION_OF[type(request)]
        body = to_bytes(request)
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()

        def take(reply: bytes) -> None:
            future.set_result(convert(cast("R", from_bytes(operation.reply, reply))))

        pending = _Pending(request=request, take=take, fail=future.set_exception, parts=bytearray())
        with self._lock:
            if self._failure is not None:
                raise LinkError(
                    f"{operation.name}: the link to the agent has ended"
                ) from self._failure
            self._last_request = self._last_request % 0xFFFFFFFF + 1
            number = self._last_request
            self._pending[number] = pending
        answer = _Answer(operation=operation.name, future=future, forget=lambda: self._drop(number))
        frame = Frame(kind=Kind.REQUEST, operation=operation.number, request=number, body=body)
        try:
            self._link.send(encode(frame), timeout)
        except BaseException:
            answer.forget()
            raise
        return answer

    def _drop(self, number: int) -> _Pending | None:
        with self._lock:
            return self._pending.pop(number, None)

    def _read(self) -> None:
        decoder = Decoder()
        failure: Exception | None = None
        try:
            while data := self._link.receive():
                frames = decoder.receive_data(data)
                while frames:
                    for frame in frames:
                        self._take(frame)
                    frames = decoder.receive_data(b"")
        except AgentProtocolError as error:
            failure = error
        finally:
            if not self._suspended:
                self._fail(failure or LinkError(f"the link to the agent has ended{self._why()}"))

    def _why(self) -> str:
        return f": {why}" if (why := self._link.ended) else ""

    def _take(self, frame: Frame) -> None:
        if frame.request == 0 and frame.kind is Kind.ERROR:
            raise AgentProtocolError(words(from_bytes(messages.Error, frame.body).message))
        if frame.kind is Kind.REQUEST or not 0 < frame.request <= self._last_request:
            raise AgentProtocolError(f"a {frame.kind.name} with the id {frame.request}")
        if frame.kind is Kind.PART:
            self._take_part(frame)
            return
        pending = self._drop(frame.request)
        if pending is None:  # nobody waits for it any more
            return
        try:
            if frame.kind is Kind.ERROR:
                raise _to_exception(pending.request, from_bytes(messages.Error, frame.body))
            pending.take(bytes(pending.parts) + frame.body)
        except AgentError as error:
            pending.fail(error)

    def _take_part(self, frame: Frame) -> None:
        pending = self._pending.get(frame.request)
        if pending is None:
            return
        pending.parts.extend(frame.body)
        if len(pending.parts) > MAX_REPLY:
            self._drop(frame.request)
            name = messages.OPERATION_OF[type(pending.request)].name
            pending.fail(AgentError(f"the answer is above {MAX_REPLY} bytes", operation=name))

    def _fail(self, failure: Exception) -> None:
        with self._lock:
            self._failure = self._failure or failure
        if isinstance(failure, AgentProtocolError):
            self._fail_pending(failure)
        else:
            self._fail_pending(f"the link to the agent ended before the answer{self._why()}")
        self._link.close()

    def _fail_pending(self, why: AgentProtocolError | str) -> None:
        with self._lock:
            left = list(self._pending.values())
            self._pending.clear()
        for pending in left:
            name = messages.OPERATION_OF[type(pending.request)].name
            pending.fail(LinkError(f"{name}: {why}") if isinstance(why, str) else why)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer(Generic[T]):
    """What becomes of a request."""

    operation: str
    future: Future[T]
    forget: Callable[[], object]

    def wait(self, timeout: float) -> T:
        try:
            return self.future.result(timeout)
        except TimeoutError:
            self.forget()
            raise TimeoutError(f"{self.operation}: the agent did not answer in time") from None


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _milliseconds(time_limit: float) -> int:
    if not 0 <= time_limit < 1 << 22:
        raise ValueError(f"a time limit of {time_limit} s; it is 0 to 48 days")
    return math.ceil(time_limit * 1000)


def _to_io_result(ended: messages.IoEnded) -> IoResult:
    return IoResult(
        status=NTSTATUS(ended.status),
        data=ended.data,
        count=ended.count,
        outcome=_to_outcome(ended.outcome),
    )


def _to_outcome(number: int) -> IoOutcome:
    try:
        return IoOutcome(number)
    except ValueError:
        raise AgentProtocolError(f"{number} is no outcome of a device's call") from None


def _same(reply: R) -> R:
    return reply


def _to_win32_error(reply: messages.Code) -> Win32Error:
    return Win32Error(reply.code)


def _to_exception(request: Request[Message], error: messages.Error) -> AgentError:
    operation = messages.OPERATION_OF[type(request)].name
    subject = "".join(f" ({getattr(request, field.name)!r})" for field in fields(request)[:1])  # type: ignore[arg-type]
    if error.domain == 0:
        return AgentError(words(error.message) + subject, operation=operation)
    code = NTSTATUS(error.code) if error.domain == 2 else Win32Error(error.code)
    kind = NotImplementedByGuest if code == NTSTATUS.STATUS_NOT_IMPLEMENTED else AgentError
    return kind(f"can't {words(error.message)}{subject}", operation=operation, code=code)
