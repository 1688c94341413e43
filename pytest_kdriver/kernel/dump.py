"""Crash dumps of Windows: what their headers say, and of a minidump its modules and its stack.

A reader of 64-bit dumps alone, made for files that nobody vouches for: what is no dump is a ``DumpError``,
and time and memory are bounded whatever the file says. Layouts: the header is QEMU's ``win_dump_defs.h``,
whose 0x2000 bytes all dumps have; a minidump's (DumpType 4) second header, driver list and names are rizin's
``dmp_specs.h``. What Windows did not fill in is "PAGE" again and again, and None here.
"""

from __future__ import annotations

import stat
import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path, PureWindowsPath
from typing import BinaryIO, Final

from pytest_kdriver.errors import DumpError
from pytest_kdriver.kernel.bug_checks import describe_bug_check, name_of

HEADER_SIZE: Final = 0x2000
MODULES_MOST: Final = 4096
STACK_MOST: Final = 32
"""So many return addresses are looked for on a stack."""

_TRIAGE_SIZE: Final = 0x80
_NAMES_MOST: Final = 4 << 20
_NAME_MOST: Final = 260
_STACK_BYTES_MOST: Final = 64 << 10
_ENTRY_LEAST, _ENTRY_SIZE, _ENTRY_MOST = 0x70, 0x90, 0x400
"""Bytes of an entry of the driver list; it grew since Windows 7."""

_KERNEL_SPACE: Final = 0xFFFF_8000_0000_0000
_PAGE: Final = 0x1000
_IMAGE_MOST: Final = 512 << 20
_UNSET: Final = (0x4547_4150, 0x4547_4150_4547_4150)
_HEADER_ALONE: Final = 3
_MINIDUMP: Final = 4
_AMD64: Final = 0x8664
_CONTEXT_CONTROL: Final = 0x0010_0001
_MACHINES: Final = {_AMD64: "x64", 0xAA64: "ARM64"}
_TYPES: Final = {
    1: "complete dump",
    2: "kernel dump",
    _HEADER_ALONE: "header of a dump",
    _MINIDUMP: "minidump",
    5: "complete dump",
    6: "kernel dump",
    7: "automatic dump",
    8: "kernel dump",
    9: "kernel and user dump",
    10: "complete dump",
}
"""By DumpType; 5 and 6 are those with a bitmap, 8 to 10 of about 2022, by kdmp-parser."""

_OTHER_FORMATS: Final = (
    (b"PAGEDUMP", "it is a dump of a 32-bit Windows"),
    (b"MDMP", "it is a minidump of a process, not of the kernel"),
    (b"\x7fELF", "it is an ELF file, as QEMU dumps a guest: ask it for the format win-dmp"),
)
_EPOCH: Final = datetime(1601, 1, 1, tzinfo=UTC)
_TICKS: Final = 10_000_000
"""Of 100 ns, a second."""


@dataclass(frozen=True, slots=True)
class Module:
    """An image of the kernel's: ``name`` is its file's, ``base`` its address, ``size`` in bytes."""

    name: str
    base: int
    size: int


@dataclass(frozen=True, slots=True)
class DumpException:
    """The exception that a dump was written for."""

    code: int
    address: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Dump:
    """What a dump says. None, or nothing, is what it does not say; ``missing`` has that in words.

    ``build`` is Windows' build number, ``time`` the guest's, ``uptime`` in seconds; ``instruction`` where the
    processor was. ``stack`` has the addresses on the crashed thread's that lie in a module, innermost first:
    return addresses mostly, and some that were left there by chance.
    """

    kind: str
    code: int
    parameters: tuple[int, int, int, int]
    build: int
    machine: str
    processors: int
    time: datetime | None = None
    uptime: float | None = None
    exception: DumpException | None = None
    instruction: int | None = None
    modules: tuple[Module, ...] = ()
    stack: tuple[int, ...] = ()
    missing: tuple[str, ...] = ()
    module_list: int | None = None
    """Of x64, where the dump has memory: the address of PsLoadedModuleList, for ``dump_memory``."""
    stack_pointer: int | None = None

    @property
    def name(self) -> str:
        """The bug check's; "" where it has none."""
        return name_of(self.code)

    @property
    def words(self) -> list[str]:
        """What the bug check says, where that is known."""
        return describe_bug_check(self.code, self.parameters, self.where)

    def where(self, address: int) -> str | None:
        """``address`` as "driver+0x12"; None where it lies in no module that the dump names."""
        at = bisect_right(self.modules, address, key=lambda module: module.base) - 1
        if at < 0 or address >= self.modules[at].base + self.modules[at].size:
            return None
        module = self.modules[at]
        return f"{PureWindowsPath(module.name).stem}+0x{address - module.base:X}"


def read_dump(path: Path) -> Dump:
    """What the dump in file ``path`` says. Raises ``DumpError`` where that is none, and ``OSError``."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DumpError(f"{path} is no file")
    with path.open("rb") as file:
        return parse_dump(file, path.name)


def parse_dump(file: BinaryIO, name: str) -> Dump:
    """The same of an open ``file``, which is called ``name`` in errors."""
    reader = _Reader(file, name)
    header = reader.read(0, min(HEADER_SIZE, reader.size))
    if header[:8] != b"PAGEDU64":
        told = next((words for magic, words in _OTHER_FORMATS if header.startswith(magic)), None)
        raise DumpError(f"{name} is no crash dump" + (f": {told}" if told else ""))
    if len(header) < HEADER_SIZE:
        raise DumpError(f"{name} is cut: it has {len(header)} bytes, and the header {HEADER_SIZE}")
    build, machine, processors, code = struct.unpack_from("<I32xIII", header, 0x0C)
    first, second, third, fourth = struct.unpack_from("<4Q", header, 0x40)
    (kind,) = struct.unpack_from("<I", header, 0xF98)
    missing: list[str] = []
    modules: tuple[Module, ...] = ()
    stack: tuple[int, ...] = ()
    if kind == _MINIDUMP:
        try:
            triage = reader.read(HEADER_SIZE, _TRIAGE_SIZE)
            modules = tuple(sorted(_modules(reader, triage), key=lambda module: module.base))
            stack = tuple(_stack(reader, triage, modules))
        except DumpError as error:
            missing.append(str(error))
    if not modules:
        missing.append("modules" if kind == _MINIDUMP else "modules, which are in its memory")
    told_time, uptime, exception = _time(header), _uptime(header), _exception(header)
    instruction, pointer = _registers(header, machine) or (None, None)
    (listed,) = struct.unpack_from("<Q", header, 0x20)
    has_memory = pointer is not None and kind not in (_HEADER_ALONE, _MINIDUMP)
    for what, value in (
        ("time", told_time),
        ("uptime", uptime),
        ("exception", exception),
        ("instruction pointer", instruction),
    ):
        if value is None:
            missing.append(what)
    (wanted,) = struct.unpack_from("<Q", header, 0xFA0)
    if wanted not in _UNSET and reader.size < wanted:
        missing.append(f"its end: {reader.size} of {wanted} bytes are there")
    return Dump(
        kind=_TYPES.get(kind, f"dump of type {kind}"),
        code=code,
        parameters=(first, second, third, fourth),
        build=build,
        machine=_MACHINES.get(machine, f"machine 0x{machine:X}"),
        processors=processors,
        time=told_time,
        uptime=uptime,
        exception=exception,
        instruction=instruction,
        modules=modules,
        stack=stack,
        missing=tuple(missing),
        module_list=listed if has_memory else None,
        stack_pointer=pointer if has_memory else None,
    )


def is_image(base: int, size: int) -> bool:
    """Whether an image of the kernel's may lie at ``base``, ``size`` bytes long."""
    return base >= _KERNEL_SPACE and not base % _PAGE and 0 < size <= _IMAGE_MOST


def addresses_in(modules: tuple[Module, ...], stack: bytes) -> Iterator[int]:
    """The first addresses in ``stack`` that lie in one of ``modules``, which are sorted."""
    bases = [module.base for module in modules]
    found = 0
    for (value,) in struct.iter_unpack("<Q", stack[: len(stack) & ~7]):
        nearest = bisect_right(bases, value) - 1
        if nearest >= 0 and value < bases[nearest] + modules[nearest].size:
            yield value
            found += 1
            if found == STACK_MOST:
                return


class _Reader:
    """A file's bytes; what lies behind its end is a ``DumpError``."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self.size = file.seek(0, 2)

    def read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(size) if offset + size <= self.size else b""
        if len(data) != size:
            raise DumpError(f"{self._name} is cut: it ends before byte {offset + size}")
        return data


def _time(header: bytes) -> datetime | None:
    (ticks,) = struct.unpack_from("<Q", header, 0xFA8)
    try:
        return _EPOCH + timedelta(microseconds=ticks // 10) if ticks not in (0, *_UNSET) else None
    except OverflowError:
        return None


def _uptime(header: bytes) -> float | None:
    (ticks,) = struct.unpack_from("<Q", header, 0x1030)
    return ticks / _TICKS if ticks not in (0, *_UNSET) else None


def _exception(header: bytes) -> DumpException | None:
    code, address = struct.unpack_from("<I12xQ", header, 0xF00)
    return None if code in (0, *_UNSET) else DumpException(code, address)


def _registers(header: bytes, machine: int) -> tuple[int, int] | None:
    """Rip and Rsp of the CONTEXT at 0x348, where its flags say that it is one of x64 and has them."""
    (flags,) = struct.unpack_from("<I", header, 0x348 + 0x30)
    stack, instruction = struct.unpack_from("<Q88xQ", header, 0x348 + 0x98)
    there = machine == _AMD64 and flags & _CONTEXT_CONTROL == _CONTEXT_CONTROL
    return (instruction, stack) if there else None


def _modules(reader: _Reader, triage: bytes) -> Iterator[Module]:
    """The modules of a minidump. An entry that can't be one is left out."""
    at, count, names_at, names_size = struct.unpack_from("<4I", triage, 0x30)
    count = min(count, MODULES_MOST)
    size = (names_at - at) // count if count and names_at > at else _ENTRY_SIZE
    if not _ENTRY_LEAST <= size <= _ENTRY_MOST:
        size = _ENTRY_SIZE
    entries = reader.read(at, count * size)
    names = reader.read(names_at, min(names_size, _NAMES_MOST))
    for entry in range(0, count * size, size):
        (name_at,) = struct.unpack_from("<I", entries, entry)
        (base,) = struct.unpack_from("<Q", entries, entry + 0x38)
        (image,) = struct.unpack_from("<I", entries, entry + 0x48)
        name = _name(names, name_at - names_at)
        if name and is_image(base, image):
            yield Module(name, base, image)


def _name(names: bytes, at: int) -> str:
    """The last part of the path at ``at``: a count of UTF-16 units, then these. "" where none is."""
    if not 0 <= at <= len(names) - 4:
        return ""
    (units,) = struct.unpack_from("<I", names, at)
    if units > _NAME_MOST or at + 4 + 2 * units > len(names):
        return ""
    path = names[at + 4 : at + 4 + 2 * units].decode("utf-16-le", "replace").rstrip("\0")
    return PureWindowsPath(path).name


def _stack(reader: _Reader, triage: bytes, modules: tuple[Module, ...]) -> Iterator[int]:
    at, size = struct.unpack_from("<2I", triage, 0x28)
    return addresses_in(modules, reader.read(at, min(size, _STACK_BYTES_MOST)))
