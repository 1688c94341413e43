r"""Wine's ntoskrnl as a target: a second to start, no VM, no Windows.

Each generation of the guest is a clone of a template prefix with a wineserver of its own. The agent is
the prefix's first process, so that everything that runs there inherits its stderr: a SOCK_SEQPACKET
socket, whose messages are Wine's trace and the kernel log's source.

Drivers are loaded by the service control manager, since Wine has no NtLoadDriver; DriverEntry's status
is read in the trace. services.exe gives each of them a process of its own, so a driver that hangs is cut
short by ending that process, and one that dies silently is found by waiting for it.
"""

from __future__ import annotations

import errno
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.errors import AgentError, ConfigError, LinkError, TargetError
from pytest_kdriver.guest.agent import Agent, IoOutcome
from pytest_kdriver.guest.executable import agent_executable
from pytest_kdriver.guest.links.process import ProcessLink
from pytest_kdriver.image.exports import KernelExports
from pytest_kdriver.image.pe import ImageLayout, read_layout
from pytest_kdriver.image.preflight import Report, preflight
from pytest_kdriver.kernel.bugcheck import find_crash, is_crash
from pytest_kdriver.kernel.events import (
    DriverInit,
    DriverInitCalled,
    DriverLoadFailed,
    DriverUnload,
    DriverUnloadCalled,
    Fence,
    ImageLoaded,
    KernelMessage,
    ProcessDied,
)
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.kernel.sources.wine import DEBUG_CHANNELS, WineTrace
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.targets import prefix
from pytest_kdriver.targets.pump import MessagePump
from pytest_kdriver.targets.runs import Remover, Run, collect_garbage
from pytest_kdriver.targets.target import CallTimeout, Io, LoadOutcome, NoUnload, ParameterValue
from pytest_kdriver.win32error import Win32Error

_DriverEvent: TypeAlias = (
    DriverInit | DriverInitCalled | DriverLoadFailed | DriverUnload | DriverUnloadCalled
)
E = TypeVar("E", bound=_DriverEvent)

CAPABILITIES: Final = frozenset({"kernel-log", "pool", "crashes", "snapshots", "programs"})

START_TIMEOUT: Final = 60.0
"""Seconds for Wine to start and the agent to answer: under one when idle, many on a busy machine."""

START_ATTEMPTS: Final = 3
"""On a busy machine services.exe was seen, once in hundreds of starts, to be gone before it served; and once
in some three thousand starts of a driver its process died before anything ran in it."""

_STILLBORN: Final = Win32Error.ERROR_INTERNAL_ERROR
"""What Wine's CreateProcess, called by services.exe, says of such a process (STATUS_INTERNAL_ERROR)."""

FENCE_TIMEOUT: Final = 30.0
CUT_TIMEOUT: Final = 5.0
DEATH_TIMEOUT: Final = 2.0
FOLDER: Final = "C:\\kdriver"
"""Each install has a folder of its own in it: what ran may be mapped for a while, and not to be replaced."""

SEND_BUFFER: Final = 4 << 20
"""Bytes of trace that may wait for the pump before a driver has to; the system may allow less."""

_SO_SNDBUFFORCE: Final = 32  # socket(7); Python has no name for it

_STATUS_OF_CODE: Final = {
    Win32Error.ERROR_SERVICE_ALREADY_RUNNING: NTSTATUS.STATUS_IMAGE_ALREADY_LOADED,
    Win32Error.ERROR_SERVICE_DOES_NOT_EXIST: NTSTATUS.STATUS_OBJECT_NAME_NOT_FOUND,
    Win32Error.ERROR_FILE_NOT_FOUND: NTSTATUS.STATUS_OBJECT_NAME_NOT_FOUND,
    Win32Error.ERROR_DLL_INIT_FAILED: NTSTATUS.STATUS_DLL_INIT_FAILED,
}
"""What NtLoadDriver says where Wine's service control manager says this without running DriverEntry."""

_DEVICE_GONE: Final = NTSTATUS.STATUS_FILE_DELETED
"""What I/O with a device comes back with on Wine when the process of its driver ends, or has ended."""

_PROCESS_ENDED: Final = "the process that the driver ran in was ended"

_SERVICES_GONE: Final = (Win32Error.RPC_S_SERVER_UNAVAILABLE, Win32Error.RPC_S_CALL_FAILED)
"""What every call to the service control manager says once services.exe has ended, or when it does."""


def _remove_prefix(path: Path) -> None:
    with suppress(TargetError):
        prefix.remove(path)


def _remove_file(path: Path) -> None:
    with suppress(OSError):  # its folder may be gone, or never have been one
        path.unlink()


SPILL: Final = "spilled-kernel-log"
REMOVERS: Final[dict[str, Remover]] = {prefix.RESOURCE: _remove_prefix, SPILL: _remove_file}


class WineTarget:
    """See ``Target``; ``config`` says which Wine, ``artifacts`` where the kernel log's old events go."""

    kind = "wine"

    def __init__(self, config: TargetConfig, *, artifacts: Path | None = None) -> None:
        self.name = config.name
        self.capabilities = CAPABILITIES - config.without
        self.generation = 0
        self._wine = prefix.find_wine(config.wine)
        self._run: Run | None = None
        self._spill = Path()
        self._artifacts = artifacts
        self._log: KernelLog | None = None
        self._guest: _Guest | None = None
        self._broken: str | None = None
        self._touched = False
        self._layouts: dict[str, ImageLayout] = {}
        self._paths: dict[str, str] = {}
        self._installs = 0
        self._watched: dict[int, _Watch] = {}

    @property
    def log(self) -> KernelLog:
        """See ``Target``. Raises ``TargetError`` before the first start."""
        if self._log is None:
            raise TargetError("it was not started", target=self.name)
        return self._log

    @property
    def agent(self) -> Agent:
        """See ``Target``."""
        if self._guest is None:
            raise TargetError("it is not running", target=self.name)
        self._touched = True
        return self._guest.agent

    @property
    def prefix(self) -> Path:
        """The prefix of this generation. Raises ``TargetError`` where it is not running."""
        if self._guest is None:
            raise TargetError("it is not running", target=self.name)
        return self._guest.path

    def describe(self) -> str:
        """See ``Target``."""
        return f"Wine {self._wine.version}"

    def start(self) -> None:
        """See ``Target``."""
        attempts = 0
        while self._guest is None:
            attempts += 1
            try:
                self._start_once()
            except TargetError:
                came_up = self._guest is not None
                self._end_guest()
                if not came_up or attempts == START_ATTEMPTS:
                    raise

    def _start_once(self) -> None:
        """Bring up a guest, and see that what tests rely on is there: kernel log, service manager."""
        try:
            if self._run is None:
                self._begin_run()
            assert self._run is not None
            self._guest = self._new_guest(self._run)
            self._broken = None
            self._touched = False
            self.fence()
            with self._agent_errors("start"):
                self._guest.agent.query_service("kdriver", timeout=START_TIMEOUT)
        except (OSError, AgentError, LinkError, TimeoutError) as error:
            told = f"Wine did not start: {error}{_advice(error)}"
            raise TargetError(told, target=self.name) from error

    def _begin_run(self) -> None:
        collect_garbage(REMOVERS)
        self._run = Run()
        self._spill = (self._artifacts or self._run.path) / f"{self._run.path.name}.events"
        self._run.record(SPILL, self._spill)
        self._log = KernelLog(self._spill)

    def close(self) -> None:
        """See ``Target``."""
        with ExitStack() as last_to_first:
            run, self._run = self._run, None
            if run is not None:
                last_to_first.callback(run.close)
                last_to_first.callback(_remove_file, self._spill)
            if self._log is not None:
                last_to_first.callback(self._log.close)
            self._end_guest()

    @property
    def broken(self) -> str | None:
        """See ``Target``."""
        return self._broken

    def break_down(self, reason: str) -> None:
        """See ``Target``."""
        self._broken = self._broken or reason

    def repair(self) -> None:
        """See ``Target``."""
        if self._guest is not None and self._guest.agent.closed:
            self.break_down("its agent is gone")
        if self._broken is not None:
            self._renew()
        self.start()

    def revert(self) -> None:
        """See ``Target``. Here it is a new clone."""
        if self._touched or self._broken is not None:
            self._renew()
        self.repair()

    def fence(self) -> None:
        """See ``Target``. The agent says a word that the trace has to bring."""
        position = len(self.log)
        cookie = uuid.uuid4().hex
        if self._guest is None:
            raise TargetError("it is not running", target=self.name)
        try:
            with self._agent_errors("fence"):
                self._guest.agent.fence(cookie, timeout=FENCE_TIMEOUT)
        except TimeoutError:
            seen = None
        else:
            pump = self._guest.pump
            seen = self.log.window(None, position).wait_for(
                lambda _, event: isinstance(event, Fence) and event.cookie == cookie,
                0.0 if pump.failure is not None else FENCE_TIMEOUT,
            )
            self._check_pump(pump)
        if seen is None:
            self.break_down("its kernel log does not flow")
            raise TargetError(
                f"its kernel log does not flow: the agent's word did not come in {FENCE_TIMEOUT:g} s",
                target=self.name,
            )

    def preflight(self, image: Path) -> Report:
        """See ``Target``."""
        windows = self.prefix / "drive_c" / "windows"
        return preflight(image, KernelExports(windows, self.describe()), guest="wine")

    def install(
        self, service: str, image: Path, parameters: Mapping[str, ParameterValue], timeout: float
    ) -> None:
        """See ``Target``."""
        self._layouts[service] = read_layout(image)
        deadline = time.monotonic() + timeout
        agent = self.agent
        self._installs += 1
        path = self._paths[service] = f"{FOLDER}\\{self._installs}\\{service}.sys"
        key = f"SYSTEM\\CurrentControlSet\\Services\\{service}\\Parameters"
        with self._agent_errors("install"):
            try:
                agent.put(image, path, timeout=_left(deadline))
                agent.create_service(service, path, timeout=_left(deadline))
            except AgentError as error:
                if agent.query_service(service, timeout=_left(deadline)) is None:
                    raise
                raise ConfigError(
                    f"target {self.name!r} has a service {service!r} already; "
                    "give this driver's another name, with service="
                ) from error
            for name, value in parameters.items():
                agent.set_value(key, name, value, timeout=_left(deadline))

    def uninstall(self, service: str, timeout: float) -> None:
        """See ``Target``."""
        with self._agent_errors("uninstall"):
            self.agent.delete_service(service, timeout=timeout)
            with suppress(AgentError):  # still mapped, where the driver has not quite gone
                self.agent.delete(self._paths[service], timeout=timeout)

    def load(self, service: str, timeout: float) -> LoadOutcome:
        """See ``Target``."""
        position = len(self.log)
        deadline = time.monotonic() + timeout
        for _ in range(START_ATTEMPTS):
            code = self._service_call(
                lambda: self.agent.submit_start(service), service, DriverInitCalled, _left(deadline)
            )
            called = self._last(DriverInitCalled, service, position)
            if called is not None or code != _STILLBORN:
                break
        if called is not None:
            self._note_image(called)
        returned = self._last(DriverInit, service, position)
        if called is not None and returned is None:
            self._note_death_in_init(called, position)
        loaded = code == Win32Error.ERROR_SUCCESS
        if loaded and called is not None:
            self._watch(service, called.process)
        return LoadOutcome(status=self._status(service, code, position), loaded=loaded, code=code)

    def load_by_service_manager(self, service: str, timeout: float) -> LoadOutcome:
        """See ``Target``. On Wine there is no other way to load."""
        return self.load(service, timeout)

    def unload(self, service: str, timeout: float) -> NTSTATUS | Win32Error:
        """See ``Target``."""
        position = len(self.log)
        watch = self._unwatch(service)
        code = self._service_call(
            lambda: self.agent.submit_stop(service), service, DriverUnloadCalled, timeout
        )
        if self._last(DriverUnload, service, position) is not None:
            return code
        called = self._last(DriverUnloadCalled, service, position)
        if called is None and code == Win32Error.ERROR_SUCCESS:
            raise NoUnload
        # A stop that failed, or did not come back: Wine 8 still says RUNNING of a driver whose process
        # is dead, so its process is asked.
        if watch is not None and find_crash(self.log.window(service, position), service) is None:
            with suppress(TimeoutError, AgentError):
                watch.future.result(DEATH_TIMEOUT)
            if watch.future.done() and _tells_of_death(watch.future):
                self.log.append([_death(service, watch.process, watch.future)])
        return code

    def device_io(self, service: str, io: Callable[[Agent, float], Io], timeout: float) -> Io:
        """See ``Target``."""
        position = len(self.log)
        with self._agent_errors("device I/O"):
            try:
                result: Io | None = io(self.agent, timeout)
            except TimeoutError:
                result = None
        self._catch_up()
        if result is None or result.outcome is IoOutcome.STUCK:
            raise CallTimeout(self._cut_device(service))
        if result.status == _DEVICE_GONE:
            self._note_death_in_io(service, position)
        return result

    def _note_death_in_io(self, service: str, position: int) -> None:
        """See to it that the log has the death of the driver's process, if it is that."""
        watch = self._watch_of(service)
        if watch is None or find_crash(self.log.window(service, position), service) is not None:
            return
        with self._agent_errors("processes"), suppress(TimeoutError):
            if any(process.pid == watch.process for process in self._guest_agent().processes()):
                return  # the driver itself said so
        self.log.window(service, position).wait_for(
            lambda _, event: is_crash(event, service), DEATH_TIMEOUT
        )

    def _catch_up(self) -> None:
        """Have the log hold what was printed up to now.

        Whoever prints writes into the trace's socket before it goes on, so what was printed before an answer
        was sent is there when the answer is.
        """
        if self._guest is None:
            raise TargetError("it is not running", target=self.name)
        self._guest.pump.catch_up()
        self._check_pump(self._guest.pump)

    def _check_pump(self, pump: MessagePump) -> None:
        if pump.failure is not None:
            self.break_down("its kernel log broke")
            raise TargetError(f"its kernel log broke: {pump.failure}", target=self.name)

    def _cut_device(self, service: str) -> str:
        """End the process of a driver that hangs in its device's I/O; what was done, in words."""
        watch = self._unwatch(service)
        if watch is None:
            self.break_down("a device's I/O hangs")
            return "the guest will be put back"
        self.break_down(f"{service} was cut short")
        with suppress(AgentError, TimeoutError):
            self._guest_agent().terminate(watch.process, timeout=CUT_TIMEOUT)
            watch.future.result(CUT_TIMEOUT)
        return _PROCESS_ENDED

    def _status(self, service: str, code: Win32Error, position: int) -> NTSTATUS:
        kinds: tuple[type[DriverInit | DriverLoadFailed], ...] = (DriverInit, DriverLoadFailed)
        for kind in kinds:
            event = self._last(kind, service, position)
            if event is not None:
                return event.status
        if code == Win32Error.ERROR_SUCCESS:
            return NTSTATUS.STATUS_SUCCESS
        if code == Win32Error.ERROR_SERVICE_DATABASE_LOCKED:
            raise TargetError(
                f"{service} can't be started while another driver is still in its DriverEntry: "
                f"Wine starts one at a time ({code})",
                target=self.name,
            )
        return _STATUS_OF_CODE.get(code, NTSTATUS.STATUS_UNSUCCESSFUL)

    def _service_call(
        self,
        submit: Callable[[], Future[Win32Error]],
        service: str,
        called: type[DriverInitCalled | DriverUnloadCalled],
        timeout: float,
    ) -> Win32Error:
        """Do a start or stop; at its deadline end the process that the driver hangs in."""
        position = len(self.log)
        with self._agent_errors("service call"):
            future = submit()
            try:
                code = future.result(timeout)
            except TimeoutError:
                self.fence()
                begun = self._last(called, service, position)
                if isinstance(begun, DriverInitCalled):
                    self._note_image(begun)
                raise CallTimeout(self._cut_short(begun, future)) from None
        self.fence()
        if code in _SERVICES_GONE:
            raise self._services_gone(f"service call: {code}")
        return code

    def _cut_short(
        self, begun: DriverInitCalled | DriverUnloadCalled | None, future: Future[Win32Error]
    ) -> str:
        if begun is None:
            self.break_down("a service call hangs outside of the driver")
            return "the driver was not reached; the prefix will be made anew"
        self.break_down(f"{begun.driver} was cut short")
        self._watched.pop(begun.process, None)
        with suppress(AgentError, TimeoutError):
            self._guest_agent().terminate(begun.process, timeout=CUT_TIMEOUT)
            future.result(CUT_TIMEOUT)
        return _PROCESS_ENDED

    def _guest_agent(self) -> Agent:
        assert self._guest is not None
        return self._guest.agent

    def _last(self, kind: type[E], service: str, position: int) -> E | None:
        events = [
            event
            for event in self.log.window(service, position).of(kind)
            if event.driver == service
        ]
        return events[-1] if events else None

    def _note_image(self, called: DriverInitCalled) -> None:
        layout = self._layouts.get(called.driver)
        if layout is not None:
            base = called.entry - layout.entry
            self.log.append([ImageLoaded(time.monotonic(), called.driver, base, layout.size)])

    def _watch(self, service: str, process: int) -> None:
        """Have the log say so if ``process`` ends by itself while the driver is loaded."""
        log, watched = self.log, self._watched
        loaded = log.window(service)
        future = self.agent.wait_process(process)
        watched[process] = _Watch(service, process, future)

        def ended(future: Future[int]) -> None:
            # It must not hold the watch, which holds the future that holds it, and so the log's file.
            if not _tells_of_death(future):
                return
            watch = watched.get(process)
            if watch is None or watch.future is not future:
                return  # expected
            if future.exception() is None and any(loaded.of(DriverUnload)):
                return  # somebody else stopped it, as it should be done
            if isinstance(future.exception(), LinkError):
                told = "the agent is gone, and with it the guest"
                log.append([KernelMessage(time.monotonic(), service, told)])
            log.append([_death(service, process, future)])
            watched.pop(process, None)

        future.add_done_callback(ended)

    def _watch_of(self, service: str) -> _Watch | None:
        return next((w for w in list(self._watched.values()) if w.service == service), None)

    def _unwatch(self, service: str) -> _Watch | None:
        """From here on the end of the process is expected."""
        watch = self._watch_of(service)
        return None if watch is None else self._watched.pop(watch.process, None)

    def _note_death_in_init(self, called: DriverInitCalled, position: int) -> None:
        """See to it that the log says why DriverEntry did not return."""
        if find_crash(self.log.window(called.driver, position), called.driver) is not None:
            return
        future = self._guest_agent().wait_process(called.process)
        with suppress(TimeoutError, AgentError):
            future.result(DEATH_TIMEOUT)
        if future.done() and _tells_of_death(future):
            self.log.append([_death(called.driver, called.process, future)])

    @contextmanager
    def _agent_errors(self, phase: str) -> Iterator[None]:
        """Make of a lost agent, or a lost services.exe, what it is: a target that has to be put back."""
        try:
            yield
        except LinkError as error:
            self.break_down("its agent is gone")
            raise TargetError(f"{phase}: {error}", target=self.name) from error
        except AgentError as error:
            if error.code not in _SERVICES_GONE:
                raise
            raise self._services_gone(f"{phase}: {error}") from error

    def _services_gone(self, told: str) -> TargetError:
        self.break_down("its services.exe is gone")
        return TargetError(f"{told}; its services.exe is gone", target=self.name)

    def _new_guest(self, run: Run) -> _Guest:
        source = prefix.template(self._wine, run)
        self.generation += 1
        path = run.path / f"prefix-{self.generation}"
        run.record(prefix.RESOURCE, path)
        prefix.clone(source, path)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pump = MessagePump(ours, WineTrace(), self.log, self.name)
        try:
            with theirs:
                _enlarge_send_buffer(theirs)
                link = ProcessLink(
                    [self._wine.loader, str(agent_executable())],
                    env=self._wine.environment(path, DEBUG_CHANNELS),
                    stderr=theirs.fileno(),
                    cwd=str(path),
                )
            try:
                agent = Agent.connect(link, timeout=START_TIMEOUT)
            except BaseException:
                prefix.end(path)
                link.close()
                raise
        except BaseException:
            pump.close()
            prefix.remove(path)
            raise
        return _Guest(path, agent, pump)

    def _end_guest(self) -> None:
        guest, self._guest = self._guest, None
        self._watched.clear()
        if guest is None:
            return
        with ExitStack() as last_to_first:
            last_to_first.callback(prefix.remove, guest.path)
            last_to_first.callback(guest.pump.close)
            last_to_first.callback(guest.agent.close)
            prefix.end(guest.path)

    def _renew(self) -> None:
        self._end_guest()
        self.start()


@dataclass(frozen=True, slots=True)
class _Guest:
    """What one generation is made of."""

    path: Path
    agent: Agent
    pump: MessagePump


@dataclass(frozen=True, slots=True)
class _Watch:
    """A loaded driver's process, and the agent's answer to when it ends."""

    service: str
    process: int
    future: Future[int]


def _tells_of_death(future: Future[int]) -> bool:
    """Whether a finished wait means an end: an agent that could not wait says nothing about the process."""
    error = future.exception()
    return (
        error is None
        or isinstance(error, LinkError)
        or (isinstance(error, AgentError) and error.code is not None)
    )


def _advice(error: Exception) -> str:
    match error:
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return f"; {prefix.MORE_ROOM}"
        case OSError(errno=errno.EROFS | errno.EACCES):
            return "; make it writable, or set KDRIVER_CACHE to a folder elsewhere"
        case _:
            return ""


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.0)


def _death(service: str, process: int, future: Future[int]) -> ProcessDied:
    """What a finished wait says; a process that is gone so long that it is unknown has no exit code."""
    code = future.result() if future.exception() is None else None
    return ProcessDied(time.monotonic(), service, process, code)


def _enlarge_send_buffer(connection: socket.socket) -> None:
    """Let more of the trace wait; beyond the system's limit only root may."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SEND_BUFFER)
    except PermissionError:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
