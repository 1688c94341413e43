"""Drivers on Windows: NtLoadDriver and NtUnloadDriver, which give the exact status.

Not verified on Windows.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Final

from pytest_kdriver.errors import TargetError
from pytest_kdriver.image.pe import ImageLayout
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.targets.loader import Surroundings
from pytest_kdriver.targets.refusals import ALREADY_LOADED, UNLOAD_PENDED
from pytest_kdriver.targets.target import CallTimeout, LoadOutcome, NoUnload
from pytest_kdriver.win32error import Win32Error

_CUT: Final = "a driver that hangs in Windows can't be ended; the guest will be put back"
_STAYS: Final = "a driver that hangs in Windows can't be ended: restart the machine"

UNLOAD_TIMEOUT: Final = 5.0
"""Seconds in which the service manager shall see that a driver is gone that was unloaded."""

_POLL: Final = 0.05
_STOPPED: Final = 1
"""SERVICE_STATUS's; the other states are of drivers that are there."""

_STATUS_OF_CODE: Final = {
    Win32Error.ERROR_SERVICE_ALREADY_RUNNING: NTSTATUS.STATUS_IMAGE_ALREADY_LOADED,
    Win32Error.ERROR_FILE_NOT_FOUND: NTSTATUS.STATUS_OBJECT_NAME_NOT_FOUND,
}


class NtLoader:
    """See ``Loader``."""

    def __init__(self, target: Surroundings) -> None:
        self._target = target
        self._loaded: set[str] = set()

    def close(self) -> None:
        """See ``Loader``."""

    def load(self, service: str, layout: ImageLayout, timeout: float) -> LoadOutcome:  # noqa: ARG002
        """See ``Loader``."""
        with self._target.agent_errors("load"):
            try:
                status = self._target.agent.load_driver(service, timeout=timeout)
            except TimeoutError:
                raise self._cut(f"{service} hangs in its DriverEntry") from None
        self._target.fence()
        self._note(service, status.is_success, status == NTSTATUS.STATUS_IMAGE_ALREADY_LOADED)
        return LoadOutcome(status=status, loaded=status.is_success)

    def load_by_service_manager(
        self,
        service: str,
        layout: ImageLayout,  # noqa: ARG002
        timeout: float,
    ) -> LoadOutcome:
        """See ``Loader``. The manager's code keeps little of DriverEntry's status."""
        with self._target.agent_errors("service start"):
            future: Future[Win32Error] = self._target.agent.submit_start(service)
            try:
                code = future.result(timeout)
            except TimeoutError:
                raise self._cut(f"{service} hangs in its DriverEntry") from None
        self._target.fence()
        loaded = code == Win32Error.ERROR_SUCCESS
        self._note(service, loaded, code == Win32Error.ERROR_SERVICE_ALREADY_RUNNING)
        status = (
            NTSTATUS.STATUS_SUCCESS
            if loaded
            else _STATUS_OF_CODE.get(code, NTSTATUS.STATUS_UNSUCCESSFUL)
        )
        return LoadOutcome(status=status, loaded=loaded, code=code)

    def _note(self, service: str, loaded: bool, already: bool) -> None:
        """Remember that we loaded it. Raises ``TargetError`` where it was there, and not by us."""
        if loaded:
            self._loaded.add(service)
        elif already and service not in self._loaded:
            self._target.break_down(f"{service} is loaded already")
            raise TargetError(ALREADY_LOADED.format(subject=service), target=self._target.name)

    def unload(self, service: str, timeout: float) -> NTSTATUS | Win32Error:
        """See ``Loader``."""
        with self._target.agent_errors("unload"):
            try:
                status = self._target.agent.unload_driver(service, timeout=timeout)
            except TimeoutError:
                raise self._cut(f"{service} hangs in its DriverUnload") from None
        self._target.fence()
        if status == NTSTATUS.STATUS_INVALID_DEVICE_REQUEST:
            raise NoUnload
        if status.is_success:
            self._see_it_gone(service)
            self._loaded.discard(service)
        return status

    def _see_it_gone(self, service: str) -> None:
        """NtUnloadDriver is content, too, with an unload that is pended. Raises ``TargetError`` for that."""
        deadline = time.monotonic() + UNLOAD_TIMEOUT
        with self._target.agent_errors("unload"):
            while True:
                status = self._target.agent.query_service(service)
                if status is None or status.state == _STOPPED:
                    return
                if time.monotonic() >= deadline:
                    break
                time.sleep(_POLL)
        self._target.break_down(f"{service}'s unload is pended")
        raise TargetError(UNLOAD_PENDED.format(subject=service), target=self._target.name)

    def note_io(self, service: str, status: NTSTATUS, position: int) -> None:
        """See ``Loader``. A driver of Windows does not die alone."""

    def cut_io(self, service: str) -> str:
        """See ``Loader``."""
        self._target.examine_hang()
        self._target.break_down(f"{service} hangs in a device's I/O")
        return self._cut_words()

    def _cut(self, reason: str) -> CallTimeout:
        self._target.examine_hang()
        self._target.break_down(reason)
        return CallTimeout(self._cut_words())

    def _cut_words(self) -> str:
        return _CUT if "snapshots" in self._target.capabilities else _STAYS
