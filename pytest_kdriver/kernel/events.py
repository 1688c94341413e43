"""What can be seen happening in a guest's kernel, as small immutable facts.

Every source yields these and nothing else. ``time`` is the host's monotonic clock in seconds, at the
moment the bytes arrived. ``driver`` is the service's name of the driver that did it, None where the
source can't tell. Addresses are the guest's virtual ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from pytest_kdriver.ntstatus import NTSTATUS


@dataclass(frozen=True, slots=True)
class DebugPrint:
    """One call of DbgPrint. ``raw`` is its text as the guest encoded it."""

    time: float
    driver: str | None
    raw: bytes
    component: int | None = None
    level: int | None = None

    @property
    def text(self) -> str:
        r"""The text as UTF-8; what is not, as ``\xNN``."""
        return self.raw.decode("utf-8", "backslashreplace")

    @property
    def lines(self) -> list[str]:
        """The text's lines; what stands behind the last newline counts if it is not empty."""
        lines = self.text.split("\n")
        if not lines[-1]:
            del lines[-1]
        return lines


@dataclass(frozen=True, slots=True)
class DriverInitCalled:
    """DriverEntry, at ``entry``, is about to run, in the guest's process ``process``."""

    time: float
    driver: str
    process: int
    entry: int


@dataclass(frozen=True, slots=True)
class DriverInit:
    """DriverEntry returned ``status``."""

    time: float
    driver: str
    process: int
    status: NTSTATUS


@dataclass(frozen=True, slots=True)
class DriverLoadFailed:
    """The loader gave up with ``status``; where DriverEntry ran, its ``DriverInit`` came before."""

    time: float
    driver: str
    status: NTSTATUS


@dataclass(frozen=True, slots=True)
class DriverUnloadCalled:
    """DriverUnload is about to run."""

    time: float
    driver: str
    process: int


@dataclass(frozen=True, slots=True)
class DriverUnload:
    """DriverUnload returned."""

    time: float
    driver: str
    process: int


@dataclass(frozen=True, slots=True)
class ImageLoaded:
    """A driver's image lies at ``base``, ``size`` bytes long."""

    time: float
    driver: str
    base: int
    size: int


@dataclass(frozen=True, slots=True)
class PoolAllocated:
    """``size`` bytes of pool were handed out at ``address``; ``caller`` is the return address."""

    time: float
    driver: str | None
    address: int
    size: int
    tag: bytes
    pool_type: str
    caller: int


@dataclass(frozen=True, slots=True)
class PoolStack:
    """Who allocated the pool block at ``address``, which was handed out before.

    ``frames`` are return addresses, innermost first.
    """

    time: float
    driver: str | None
    address: int
    frames: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PoolFreed:
    """The pool block at ``address`` was given back. ``found`` is False where there was none.

    ``tag`` is None where the call names none, or any tag will do.
    """

    time: float
    driver: str | None
    address: int
    tag: bytes | None
    caller: int
    found: bool


@dataclass(frozen=True, slots=True)
class BugCheck:
    """The kernel, or the driver, called KeBugCheckEx.

    ``caller`` is the call's return address, None where the source can't tell.
    """

    time: float
    driver: str | None
    code: int
    parameters: tuple[int, ...]
    caller: int | None = None


@dataclass(frozen=True, slots=True)
class UnhandledException:
    """An exception that nobody handled. For a page fault ``access`` is what was tried, and where."""

    time: float
    driver: str | None
    code: int
    address: int
    access: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class MissingExport:
    """A call from ``address`` to ``module.name``, which the kernel does not export."""

    time: float
    driver: str | None
    module: str
    name: str
    address: int


@dataclass(frozen=True, slots=True)
class ProcessDied:
    """The guest's process that ran the driver ended while the driver was loaded.

    ``exit_code`` is None where nobody could tell.
    """

    time: float
    driver: str
    process: int
    exit_code: int | None


@dataclass(frozen=True, slots=True)
class Fence:
    """Everything that the guest's kernel said before the agent wrote ``cookie`` is in the log."""

    time: float
    driver: None
    cookie: str


@dataclass(frozen=True, slots=True)
class KernelMessage:
    """Something else that was said, by the kernel or by what stands for it, as text."""

    time: float
    driver: str | None
    text: str


Event: TypeAlias = (
    DebugPrint
    | DriverInitCalled
    | DriverInit
    | DriverLoadFailed
    | DriverUnloadCalled
    | DriverUnload
    | ImageLoaded
    | PoolAllocated
    | PoolStack
    | PoolFreed
    | BugCheck
    | UnhandledException
    | MissingExport
    | ProcessDied
    | Fence
    | KernelMessage
)
