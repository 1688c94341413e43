"""PE images: what a file says of itself in its headers, sections, imports and exports.

A reader of x86-64 images (PE32+) alone, made for files that nobody vouches for: what it can't make sense
of is an ``ImageError``, and time and memory are bounded whatever the file says. Layouts, and the limits
that Windows sets, are those of Microsoft's "PE Format".
"""

from __future__ import annotations

import stat
import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Final, TypeAlias

from pytest_kdriver.errors import ImageError

Symbol: TypeAlias = str | int
"""What is imported or exported: a name, or an ordinal."""

MAX_FILE: Final = 256 << 20
MAX_SECTIONS: Final = 96
MAX_MODULES: Final = 256
MAX_IMPORTS: Final = 1 << 14
MAX_EXPORTS: Final = 1 << 16
MAX_NAME: Final = 1024
MAX_DEBUG: Final = 64
PAGE: Final = 0x1000

_AMD64: Final = 0x8664
_MACHINES: Final = {
    0x014C: "32-bit x86",
    0x01C4: "32-bit ARM",
    0xA641: "ARM64EC",
    0xAA64: "ARM64",
    0x0200: "Itanium",
}
_OTHER_FORMATS: Final = (
    (b"\x7fELF", "it is an ELF file, made for Linux: build for x86_64-pc-windows-msvc or mingw"),
    (b"!<arch>\n", "it is a library of objects: link it into a driver first"),
    (b"\x64\x86", "it is an object file: link it into a driver first"),
    (b"Microsoft C/C++ MSF", "it is a PDB, the symbols of an image"),
    (b"#!", "it is a script"),
)
_CODEVIEW: Final = 2
_ORDINAL: Final = 1 << 63


class Subsystem(IntEnum):
    """IMAGE_SUBSYSTEM_*, the ones that linkers know by name."""

    UNKNOWN = 0
    NATIVE = 1
    WINDOWS_GUI = 2
    WINDOWS_CUI = 3
    POSIX_CUI = 7
    WINDOWS_CE_GUI = 9
    EFI_APPLICATION = 10
    EFI_BOOT_SERVICE_DRIVER = 11
    EFI_RUNTIME_DRIVER = 12
    EFI_ROM = 13
    XBOX = 14
    WINDOWS_BOOT_APPLICATION = 16


class Directory(IntEnum):
    """Places in the header's table of directories."""

    EXPORT = 0
    IMPORT = 1
    SECURITY = 4
    RELOCATION = 5
    DEBUG = 6
    DELAY_IMPORT = 13


class FileFlag(IntFlag):
    """IMAGE_FILE_*."""

    RELOCS_STRIPPED = 0x0001
    DLL = 0x2000


class SectionFlag(IntFlag):
    """IMAGE_SCN_MEM_*."""

    EXECUTE = 0x20000000
    WRITE = 0x80000000


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """Where things are in an image, once it is loaded: offsets from its base, and sizes, in bytes."""

    entry: int
    size: int


@dataclass(frozen=True, slots=True)
class Section:
    """A section: ``address`` and ``size`` in memory, ``offset`` and ``stored`` in the file, in bytes."""

    name: str
    address: int
    size: int
    offset: int
    stored: int
    flags: SectionFlag

    @property
    def end(self) -> int:
        """The address behind it, at a page's border."""
        return self.address + -(-max(self.size, 1) // PAGE) * PAGE

    @property
    def stored_end(self) -> int:
        """The offset in the file behind it."""
        return self.offset + self.stored


@dataclass(frozen=True, slots=True)
class Import:
    """What an image wants of one module. At ``slots`` is the table of their addresses, 8 bytes each."""

    module: str
    symbols: tuple[Symbol, ...]
    slots: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Forwarder:
    """An export that is another module's."""

    module: str
    symbol: Symbol


@dataclass(frozen=True, slots=True)
class Exports:
    """A module's exports: their addresses by ordinal, and the ordinals of their names."""

    addresses: dict[int, int]
    ordinals: dict[str, int]
    directory: range

    def address(self, symbol: Symbol) -> int | None:
        """The address of an export; None: there is none. One inside of ``directory`` is a forwarder's."""
        ordinal = self.ordinals.get(symbol) if isinstance(symbol, str) else symbol
        return None if ordinal is None else self.addresses.get(ordinal)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An x86-64 image, read as far as its section table.

    ``path`` is for messages, ``data`` the whole file. Addresses are offsets from the base that it is
    loaded at; ``directories`` are pairs of address and size.
    """

    path: Path
    data: bytes
    flags: FileFlag
    entry: int
    base: int
    alignment: int
    size: int
    headers: int
    checksum: int
    checksum_offset: int
    subsystem: int
    directories: tuple[tuple[int, int], ...]
    sections: tuple[Section, ...]

    def directory(self, which: Directory) -> tuple[int, int]:
        """A directory's address and size; zeros where the image has none."""
        return self.directories[which] if which < len(self.directories) else (0, 0)

    def section_at(self, address: int) -> Section | None:
        """The section that ``address`` is in. The sections have to be in order."""
        index = bisect_right(self.sections, address, key=lambda section: section.address) - 1
        if index < 0 or address >= self.sections[index].end:
            return None
        return self.sections[index]

    def read(self, address: int, size: int) -> bytes:
        """``size`` bytes as they will be in memory. Raises ``ImageError`` where they are in no section."""
        section = self.section_at(address)
        if section is None:
            if address + size <= self.headers:
                return self._slice(address, size)
            raise self._wrong(f"it refers to 0x{address:X}, where nothing is")
        if address + size > section.end:
            raise self._wrong(
                f"it refers to {size} bytes at 0x{address:X}, which are not in one section"
            )
        return self._content(section, address, size)

    def text(self, address: int) -> str:
        """The zero-terminated string at ``address``, with what can't be printed escaped."""
        section = self.section_at(address)
        if section is None:
            raise self._wrong(f"it refers to 0x{address:X}, where nothing is")
        content = self._content(section, address, min(section.end - address, MAX_NAME))
        end = content.find(b"\0")
        if end < 0:
            raise self._wrong(f"the name at 0x{address:X} has no end")
        return _printable(content[:end])

    def imports(self) -> Iterator[Import]:
        """What it imports, module by module. Raises ``ImageError`` where that makes no sense."""
        at, _ = self.directory(Directory.IMPORT)
        left = MAX_IMPORTS
        for descriptor in self._table(at, "<IIIII"):
            lookup, _, _, name, slots = descriptor
            if not name or not slots:
                return
            symbols = self._symbols(lookup or slots, left)
            left -= len(symbols)
            yield Import(self.text(name), symbols, slots)

    def delayed(self) -> Iterator[str]:
        """The names of the modules whose imports it looks up by itself, when they are first called."""
        at, _ = self.directory(Directory.DELAY_IMPORT)
        for descriptor in self._table(at, "<IIIIIIII"):
            if not descriptor[1]:
                return
            yield self.text(descriptor[1])

    def exports(self) -> Exports:
        """What it exports. Raises ``ImageError`` where that makes no sense."""
        at, size = self.directory(Directory.EXPORT)
        if not at:
            return Exports({}, {}, range(0))
        header = struct.unpack("<IIHHIIIIIII", self.read(at, 40))
        first, functions, names, addresses_at, names_at, indices_at = header[5:]
        if functions > MAX_EXPORTS or names > MAX_EXPORTS:
            raise self._wrong(f"it claims {max(functions, names)} exports")
        addresses = struct.unpack(f"<{functions}I", self.read(addresses_at, 4 * functions))
        name_addresses = struct.unpack(f"<{names}I", self.read(names_at, 4 * names))
        indices = struct.unpack(f"<{names}H", self.read(indices_at, 2 * names))
        return Exports(
            {first + index: address for index, address in enumerate(addresses) if address},
            {
                self.text(address): first + index
                for address, index in zip(name_addresses, indices, strict=True)
            },
            range(at, at + size),
        )

    def pdb_path(self) -> str | None:
        """The path of its PDB, as the linker wrote it; None: none. Raises ``ImageError`` for nonsense."""
        at, size = self.directory(Directory.DEBUG)
        for entry in range(at, at + min(size, MAX_DEBUG * 28) // 28 * 28, 28):
            kind, length, address = struct.unpack("<12xIII4x", self.read(entry, 28))
            if kind == _CODEVIEW and length > 24 and self.read(address, 4) == b"RSDS":
                return self.text(address + 24)  # behind a GUID and an age
        return None

    def forwarder(self, address: int) -> Forwarder:
        """The forwarder whose text is at ``address``: a module without its ending, a dot, a symbol."""
        module, _, symbol = self.text(address).rpartition(".")
        ordinal = symbol.removeprefix("#")
        return Forwarder(
            module, int(ordinal) if ordinal != symbol and ordinal.isdecimal() else symbol
        )

    def _table(self, at: int, layout: str) -> Iterator[tuple[int, ...]]:
        """The entries of a table that ends with an entry of its own kind; none where ``at`` is 0."""
        size = struct.calcsize(layout)
        for index in range(MAX_MODULES if at else 0):
            yield struct.unpack(layout, self.read(at + index * size, size))
        if at:
            raise self._wrong(f"it imports from more than {MAX_MODULES} modules")

    def _symbols(self, at: int, most: int) -> tuple[Symbol, ...]:
        symbols: list[Symbol] = []
        for index in range(most):
            (thunk,) = struct.unpack("<Q", self.read(at + 8 * index, 8))
            if not thunk:
                return tuple(symbols)
            if thunk & _ORDINAL:
                symbols.append(thunk & 0xFFFF)
            else:
                symbols.append(self.text((thunk & 0x7FFFFFFF) + 2))
        raise self._wrong(f"it imports more than {MAX_IMPORTS} symbols")

    def _content(self, section: Section, address: int, size: int) -> bytes:
        """Bytes of a section; where memory goes on behind the file, zeros."""
        begin = address - section.address
        stored = max(min(size, section.stored - begin), 0)
        return self._slice(section.offset + begin, stored).ljust(size, b"\0")

    def _slice(self, offset: int, size: int) -> bytes:
        if offset + size > len(self.data):
            raise self._wrong("it is truncated: its sections go on behind the file's end")
        return self.data[offset : offset + size]

    def _wrong(self, what: str) -> ImageError:
        return ImageError(f"{self.path.name}: {what}")


def read_layout(path: Path) -> ImageLayout:
    """The layout of the PE file ``path``. Raises ``ImageError`` for anything else."""
    image = read_image(path)
    return ImageLayout(entry=image.entry, size=image.size)


def read_image(path: Path) -> Image:
    """The image in file ``path``. Raises ``ImageError`` where that is no x86-64 image."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{path} is no file")
        if status.st_size > MAX_FILE:
            raise ImageError(f"{path} is no driver: it is larger than {MAX_FILE >> 20} MiB")
        with path.open("rb") as file:
            data = file.read(status.st_size)
    except FileNotFoundError as error:
        raise ImageError(f"there is no {path}") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise ImageError(f"{path} can't be read: {error}") from error
    return parse_image(data, path)


def parse_image(data: bytes, path: Path) -> Image:
    """The image that ``data`` is, read from ``path``. Raises ``ImageError`` where it is none."""
    no_image = f"{path} is no Windows image"
    if not data.startswith(b"MZ"):
        raise ImageError(f"{no_image}: {_what_else(data)}")
    try:
        return _parse(data, path, no_image)
    except struct.error:
        raise ImageError(f"{no_image}: it is truncated, its headers are not complete") from None


def _parse(data: bytes, path: Path, no_image: str) -> Image:
    (start,) = struct.unpack_from("<I", data, 0x3C)
    if start + 4 <= len(data) and data[start : start + 4] != b"PE\0\0":
        raise ImageError(f"{no_image}: it is a DOS program, or damaged: it has no PE header")
    machine, count, _, _, _, optional_size, flags = struct.unpack_from("<HHIIIHH", data, start + 4)
    optional = start + 24
    if machine != _AMD64:
        kind = _MACHINES.get(machine, f"machine 0x{machine:04X}")
        raise ImageError(
            f"{path} is an image for {kind}, the kernel is x86-64: build it for x86_64-pc-windows-msvc "
            "(cargo), with /MACHINE:X64 (lld-link, link.exe) or x86_64-w64-mingw32-gcc"
        )
    (magic,) = struct.unpack_from("<H", data, optional)
    if magic != 0x20B or optional_size < 112:
        raise ImageError(f"{no_image}: its optional header is damaged, it is not that of PE32+")
    entry, _, base, alignment = struct.unpack_from("<IIQI", data, optional + 16)
    size, headers, checksum, subsystem = struct.unpack_from("<IIIH", data, optional + 56)
    (directories,) = struct.unpack_from("<I", data, optional + 108)
    directories = min(directories, 16, (optional_size - 112) // 8)
    if count > MAX_SECTIONS:
        raise ImageError(f"{no_image}: it claims {count} sections, Windows allows {MAX_SECTIONS}")
    table = optional + optional_size
    return Image(
        path=path,
        data=data,
        flags=FileFlag(flags),
        entry=entry,
        base=base,
        alignment=alignment,
        size=size,
        headers=headers,
        checksum=checksum,
        checksum_offset=optional + 64,
        subsystem=subsystem,
        directories=tuple(
            struct.unpack_from("<II", data, optional + 112 + 8 * index)
            for index in range(directories)
        ),
        sections=tuple(_section(data, table + 40 * index) for index in range(count)),
    )


def _section(data: bytes, at: int) -> Section:
    name, size, address, stored, offset, _, _, _, _, flags = struct.unpack_from(
        "<8sIIIIIIHHI", data, at
    )
    return Section(
        name=_printable(name.rstrip(b"\0")),
        address=address,
        size=size or stored,
        offset=offset,
        stored=stored,
        flags=SectionFlag(flags & (SectionFlag.EXECUTE | SectionFlag.WRITE)),
    )


def _printable(name: bytes) -> str:
    text = name.decode("latin-1")
    if text.isascii() and text.isprintable():
        return text
    return text.encode("unicode_escape").decode("ascii")


def _what_else(data: bytes) -> str:
    """What a file that does not begin as an image does may be."""
    if not data:
        return "it is empty"
    for start, what in _OTHER_FORMATS:
        if data.startswith(start):
            return what
    if data[:256].isascii() and b"\0" not in data[:256]:
        return "it is text"
    return "it does not begin with MZ"
