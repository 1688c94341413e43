"""Drivers on Wine's ntoskrnl, in a prefix on this host or in a virtual machine.

They are loaded by the service control manager, since Wine has no NtLoadDriver; DriverEntry's status is read
in the trace. services.exe gives each of them a process of its own, so a driver that hangs is cut short by
ending that process, and one that dies silently is found by waiting for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

from pytest_kdriver.errors import AgentError, LinkError, TargetError
from pytest_kdriver.image.pe import ImageLayout
from pytest_kdriver.kernel.crash import find_crash, is_crash
from pytest_kdriver.kernel.events import (
    DriverInit,
    DriverInitCalled,
    DriverLoadFailed,
    DriverUnload,
    DriverUnloadCalled,
    ImageLoaded,
    KernelMessage,
    ProcessDied,
)
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.targets.loader import SERVICES_GONE, Surroundings
from pytest_kdriver.targets.target import CallTimeout, LoadOutcome, NoUnload
from pytest_kdriver.win32error import Win32Error

_DriverEvent: TypeAlias = (
    DriverInit | DriverInitCalled | DriverLoadFailed | DriverUnload | DriverUnloadCalled
)
E = TypeVar("E", bound=_DriverEvent)

START_ATTEMPTS: Final = 3
"""Once in some three thousand starts on a busy machine a driver's process died before anything ran in it."""

_STILLBORN: Final = Win32Error.ERROR_INTERNAL_ERROR
"""What Wine's CreateProcess, called by services.exe, says of such a process (STATUS_INTERNAL_ERROR)."""

CUT_TIMEOUT: Final = 5.0
DEATH_TIMEOUT: Final = 2.0

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


class WineLoader:
    """See ``Loader``."""

    def __init__(self, target: Surroundings) -> None:
        self._target = target
        self._layouts: dict[str, ImageLayout] = {}
        self._watched: dict[int, _Watch] = {}

    def close(self) -> None:
        """See ``Loader``."""
        self._watched.clear()

    def load(self, service: str, layout: ImageLayout, timeout: float) -> LoadOutcome:
        """See ``Loader``."""
        self._layouts[service] = layout
        position = len(self._target.log)
        deadline = time.monotonic() + timeout
        for _ in range(START_ATTEMPTS):
            code = self._service_call(
                lambda: self._target.agent.submit_start(service),
                service,
                DriverInitCalled,
                _left(deadline),
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

    def load_by_service_manager(
        self, service: str, layout: ImageLayout, timeout: float
    ) -> LoadOutcome:
        """See ``Loader``. On Wine there is no other way to load."""
        return self.load(service, layout, timeout)

    def unload(self, service: str, timeout: float) -> NTSTATUS | Win32Error:
        """See ``Loader``."""
        position = len(self._target.log)
        watch = self._unwatch(service)
        code = self._service_call(
            lambda: self._target.agent.submit_stop(service), service, DriverUnloadCalled, timeout
        )
        if self._last(DriverUnload, service, position) is not None:
            return code
        called = self._last(DriverUnloadCalled, service, position)
        if called is None and code == Win32Error.ERROR_SUCCESS and self._target.sees_kernel:
            raise NoUnload
        # A stop that failed, or did not come back: Wine 8 still says RUNNING of a driver whose process
        # is dead, so its process is asked.
        if (
            watch is not None
            and find_crash(self._target.log.window(service, position), service) is None
        ):
            with suppress(TimeoutError, AgentError):
                watch.future.result(DEATH_TIMEOUT)
            if watch.future.done() and _tells_of_death(watch.future):
                self._target.log.append([_death(service, watch.process, watch.future)])
        return code

    def note_io(self, service: str, status: NTSTATUS, position: int) -> None:
        """See ``Loader``."""
        if status != _DEVICE_GONE:
            return
        watch = self._watch_of(service)
        if (
            watch is None
            or find_crash(self._target.log.window(service, position), service) is not None
        ):
            return
        with self._target.agent_errors("processes"), suppress(TimeoutError):
            if any(process.pid == watch.process for process in self._target.agent.processes()):
                return  # the driver itself said so
        self._target.log.window(service, position).wait_for(
            lambda _, event: is_crash(event, service), DEATH_TIMEOUT
        )

    def cut_io(self, service: str) -> str:
        """See ``Loader``. It ends the driver's process."""
        watch = self._unwatch(service)
        if watch is None:
            self._target.break_down("a device's I/O hangs")
            return "the guest will be put back"
        self._target.break_down(f"{service} was cut short")
        with suppress(AgentError, TimeoutError):
            self._target.agent.terminate(watch.process, timeout=CUT_TIMEOUT)
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
                target=self._target.name,
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
        position = len(self._target.log)
        with self._target.agent_errors("service call"):
            future = submit()
            try:
                code = future.result(timeout)
            except TimeoutError:
                self._target.fence()
                begun = self._last(called, service, position)
                if isinstance(begun, DriverInitCalled):
                    self._note_image(begun)
                raise CallTimeout(self._cut_short(begun, future)) from None
        self._target.fence()
        if code in SERVICES_GONE:
            raise self._target.services_gone(f"service call: {code}")
        return code

    def _cut_short(
        self, begun: DriverInitCalled | DriverUnloadCalled | None, future: Future[Win32Error]
    ) -> str:
        if begun is None:
            self._target.break_down("a service call hangs outside of the driver")
            return "the driver was not reached; the guest will be put back"
        self._target.break_down(f"{begun.driver} was cut short")
        self._watched.pop(begun.process, None)
        with suppress(AgentError, TimeoutError):
            self._target.agent.terminate(begun.process, timeout=CUT_TIMEOUT)
            future.result(CUT_TIMEOUT)
        return _PROCESS_ENDED

    def _last(self, kind: type[E], service: str, position: int) -> E | None:
        events = [
            event
            for event in self._target.log.window(service, position).of(kind)
            if event.driver == service
        ]
        return events[-1] if events else None

    def _note_image(self, called: DriverInitCalled) -> None:
        layout = self._layouts.get(called.driver)
        if layout is not None:
            base = called.entry - layout.entry
            self._target.log.append(
                [ImageLoaded(time.monotonic(), called.driver, base, layout.size)]
            )

    def _watch(self, service: str, process: int) -> None:
        """Have the log say so if ``process`` ends by itself while the driver is loaded."""
        log, watched = self._target.log, self._watched
        loaded = log.window(service)
        future = self._target.agent.wait_process(process)
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
        if find_crash(self._target.log.window(called.driver, position), called.driver) is not None:
            return
        future = self._target.agent.wait_process(called.process)
        with suppress(TimeoutError, AgentError):
            future.result(DEATH_TIMEOUT)
        if future.done() and _tells_of_death(future):
            self._target.log.append([_death(called.driver, called.process, future)])


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


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.0)


def _death(service: str, process: int, future: Future[int]) -> ProcessDied:
    """What a finished wait says; a process that is gone so long that it is unknown has no exit code."""
    code = future.result() if future.exception() is None else None
    return ProcessDied(time.monotonic(), service, process, code)
