"""What a target is: a guest that drivers can be loaded in, and what is seen of its kernel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from pytest_kdriver.guest.agent import Agent, IoResult, OpenResult
from pytest_kdriver.image.preflight import Report
from pytest_kdriver.kernel.events import Moment
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.win32error import Win32Error

Io = TypeVar("Io", IoResult, OpenResult)

ParameterValue = int | str | bytes | Sequence[str]
"""A value of a service's Parameters key: REG_DWORD or REG_QWORD, REG_SZ, REG_BINARY, REG_MULTI_SZ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOutcome:
    """What came of a load.

    ``status`` is DriverEntry's own, or the loader's where DriverEntry never ran. ``loaded`` says
    whether the driver is there now. ``code`` is the service control manager's answer where it was
    asked.
    """

    status: NTSTATUS
    loaded: bool
    code: Win32Error | None = None


class CallTimeout(Exception):
    """A load, an unload or I/O was not over by its deadline; ``cut`` says what was done about it."""

    def __init__(self, cut: str) -> None:
        super().__init__(cut)
        self.cut = cut


class NoUnload(Exception):
    """The driver has no DriverUnload, and is still there."""


class Target(Protocol):
    """A guest, and the host's side of it. One thread at a time.

    A target is started when it is first used, and has to be closed. ``generation`` grows each time
    the guest is put back: whatever was installed before is gone then. ``log`` lives as long as the
    target, through all its generations.
    """

    name: str
    capabilities: frozenset[str]
    generation: int
    crashes_told_to: int
    """The log position up to which a test knows of what ended the guest, by whichever of its drivers."""

    @property
    def log(self) -> KernelLog:
        """What was seen of its kernel, from the first start on. Raises ``TargetError`` before that."""
        ...

    @property
    def agent(self) -> Agent:
        """The agent in the guest. Raises ``TargetError`` where there is none."""
        ...

    def start(self) -> None:
        """Bring the guest up, if it is not. Raises ``TargetError``."""
        ...

    def see_through(self) -> None:
        """Raise ``TargetError`` for a guest that went down by itself, which nobody was told of."""
        ...

    def close(self) -> None:
        """End the guest and remove all that was made for it. Never raises for what is gone already."""
        ...

    def describe(self) -> str:
        """What this target is, in one line, for a report's header."""
        ...

    def collect(self, stem: Path, *, dump: bool) -> list[str]:
        """Write what there is of a guest in which a test failed, to files named ``stem`` and a suffix.

        With ``dump`` a kernel that crashed is let write its minidump, which takes its restart. What could not
        be had, in words; raises nothing for it.
        """
        ...

    def describe_feed(self) -> str:
        """How long the guest waited for who feeds the log, in half a sentence; "" where guests don't wait."""
        ...

    def fence(self) -> None:
        """Return once the log has all that the kernel said before. Raises ``TargetError``."""
        ...

    def keep(self) -> str | None:
        """Let the guest live on behind this run, for somebody to look at it; how to reach it, in lines.

        None where there is none that could. The next start makes a new one.
        """
        ...

    @property
    def broken(self) -> str | None:
        """Why the guest can't be trusted any more; None where it can."""
        ...

    def break_down(self, reason: str) -> None:
        """Note that the guest can't be trusted any more; ``repair`` will put it back."""
        ...

    def agent_errors(self, phase: str) -> AbstractContextManager[None]:
        """Make of a lost agent, or a guest whose services are gone, a target that has to be put back."""
        ...

    def repair(self) -> None:
        """Put the guest back if it broke down, or lost its agent. Raises ``TargetError``.

        So it does when that is done, too, for what ``see_through`` would tell.
        """
        ...

    def revert(self) -> None:
        """Put the guest back into the state that it had at first, unless it is in it. As ``repair``."""
        ...

    def preflight(self, image: Path) -> Report:
        """What this guest's kernel will make of ``image``. Raises ``ImageError``, ``TargetError``."""
        ...

    def install(
        self, service: str, image: Path, parameters: Mapping[str, ParameterValue], timeout: float
    ) -> None:
        """Copy ``image`` in and register it as kernel service ``service``, with its Parameters."""
        ...

    def uninstall(self, service: str, timeout: float) -> None:
        """Delete the service; its image stays until the guest is put back."""
        ...

    def load(self, service: str, timeout: float) -> LoadOutcome:
        """Load an installed driver. Raises ``CallTimeout``, or what the agent raises.

        The log holds all that happened. A crash is not raised, it is in the log.
        """
        ...

    def load_by_service_manager(self, service: str, timeout: float) -> LoadOutcome:
        """The same, but as ``sc start`` does it."""
        ...

    @property
    def samples_pool(self) -> bool:
        """Whether its pool is seen by ``sample_pool`` alone; elsewhere the log has each block, or nothing."""
        ...

    def sample_pool(self, service: str, tags: Collection[str], moment: Moment) -> None:
        """Have the log hold the kernel's counters of a driver's ``tags``, once they have settled.

        To be done before each load, and when the driver is gone again. Raises ``TargetError``.
        """
        ...

    def unload(self, service: str, timeout: float) -> NTSTATUS | Win32Error:
        """Unload it; what the guest said. Raises ``CallTimeout``, ``NoUnload``."""
        ...

    def device_io(self, service: str, io: Callable[[Agent, float], Io], timeout: float) -> Io:
        """Do I/O with a device of a driver; any thread may, others beside it.

        Raises ``CallTimeout`` where it could not be cancelled after ``timeout`` seconds: the driver was cut
        short. The log holds all that the kernel said until the I/O ended, the driver's death too. Raises
        ``TargetError``.
        """
        ...
