"""What can be seen happening in a guest's kernel, as small immutable facts.

Every source yields these and nothing else. ``time`` is the host's monotonic clock in seconds, at the
moment the bytes arrived. ``driver`` is the service's name of the driver that did it, None where the
source can't tell. Addresses are the guest's virtual ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

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
    """An image lies at ``base``, ``size`` bytes long: a driver's, or another of the kernel's.

    ``driver`` is the stem of its file's name where the source knows no service; drivers under test have their
    service's name as their file's. ``path`` is the file, as the kernel calls it; "" where the source can't
    tell.
    """

    time: float
    driver: str
    base: int
    size: int
    path: str = ""


@dataclass(frozen=True, slots=True)
class ImageUnloaded:
    """The image at ``base`` is gone; ``driver`` and ``path`` as in ``ImageLoaded``."""

    time: float
    driver: str
    base: int
    path: str = ""


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

    ``caller`` is the call's return address, None where the source can't tell. ``driver`` is the one that it
    ended; None where it ended the guest. ``blamed`` is the image that the kernel itself names as its cause, a
    file's name. ``stack`` has return addresses, innermost first.
    """

    time: float
    driver: str | None
    code: int
    parameters: tuple[int, ...]
    caller: int | None = None
    blamed: str | None = None
    stack: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Breakpoint:
    """A breakpoint or an assertion in the code, which without a debugger is a bug check.

    ``code`` is 0x80000003 (int 3) or 0xC0000420 (int 2Ch), ``address`` that of the instruction.
    """

    time: float
    driver: str | None
    code: int
    address: int


@dataclass(frozen=True, slots=True)
class ProcessorState:
    """Where a processor was when the kernel was stopped from outside; ``stack`` as in ``BugCheck``."""

    time: float
    driver: None
    processor: int
    address: int
    stack: tuple[int, ...] = ()


Moment: TypeAlias = Literal["before", "after"]
"""When a sample is taken: before a driver's load, or when it is gone again."""


@dataclass(frozen=True, slots=True)
class PoolTagUse:
    """What a kernel's counters say of one tag and pool type, "Paged" or "NonPaged".

    ``blocks`` is allocations less frees, modulo 2^32; ``size`` is in bytes.
    """

    tag: bytes
    pool_type: str
    blocks: int
    size: int


@dataclass(frozen=True, slots=True)
class PoolTags:
    """The counters of the tags that ``driver`` is known by.

    A tag that the kernel never saw has none. ``settled`` is False where they were still changing at the
    deadline; then they are the lowest that were seen.
    """

    time: float
    driver: str
    moment: Moment
    uses: tuple[PoolTagUse, ...]
    settled: bool = True


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
    | ImageUnloaded
    | PoolAllocated
    | PoolStack
    | PoolFreed
    | PoolTags
    | BugCheck
    | Breakpoint
    | ProcessorState
    | UnhandledException
    | MissingExport
    | ProcessDied
    | Fence
    | KernelMessage
)
