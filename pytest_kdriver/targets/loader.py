"""How drivers get into a guest's kernel and out of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Final, Protocol

from pytest_kdriver.errors import TargetError
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.image.pe import ImageLayout
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.targets.target import LoadOutcome
from pytest_kdriver.win32error import Win32Error

SERVICES_GONE: Final = (Win32Error.RPC_S_SERVER_UNAVAILABLE, Win32Error.RPC_S_CALL_FAILED)
"""What every call to the service control manager says once services.exe has ended, or when it does."""


class Surroundings(Protocol):
    """What a loader may use of its target."""

    name: str
    capabilities: frozenset[str]

    @property
    def sees_kernel(self) -> bool:
        """Whether there is a kernel log."""
        ...

    @property
    def agent(self) -> Agent:
        """The agent in the guest."""
        ...

    @property
    def log(self) -> KernelLog:
        """The kernel log."""
        ...

    def fence(self) -> None:
        """See ``Target``."""
        ...

    def break_down(self, reason: str) -> None:
        """See ``Target``."""
        ...

    def examine_hang(self) -> None:
        """Have the log tell where the guest's processors are, as far as that can be had. Raises nothing."""
        ...

    def agent_errors(self, phase: str) -> AbstractContextManager[None]:
        """Make of a lost agent, or a guest whose services are gone, a target that has to be put back."""
        ...

    def services_gone(self, told: str) -> TargetError:
        """What to raise where the guest's service control manager is gone."""
        ...


class Loader(Protocol):
    """Loads the drivers that are installed, in one generation of a guest."""

    def load(self, service: str, layout: ImageLayout, timeout: float) -> LoadOutcome:
        """See ``Target``. ``layout`` is the image's."""
        ...

    def load_by_service_manager(
        self, service: str, layout: ImageLayout, timeout: float
    ) -> LoadOutcome:
        """See ``Target``."""
        ...

    def unload(self, service: str, timeout: float) -> NTSTATUS | Win32Error:
        """See ``Target``."""
        ...

    def note_io(self, service: str, status: NTSTATUS, position: int) -> None:
        """See to it that the log has the driver's death, if that is what ``status`` of its I/O means."""
        ...

    def cut_io(self, service: str) -> str:
        """End I/O that hangs; what was done, in words."""
        ...

    def close(self) -> None:
        """Forget the guest: what happens in it from here on is expected."""
        ...
