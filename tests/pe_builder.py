"""Small x86-64 images made by hand, for the faults that no linker makes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PAGE = 0x1000
RAW = 0x200

FILE_HEADER = 0x84
OPTIONAL_HEADER = FILE_HEADER + 20
DIRECTORIES = OPTIONAL_HEADER + 112
SECTIONS = OPTIONAL_HEADER + 240
"""Where in a built image's file things are."""

TEXT = 0x60000020
"""IMAGE_SCN_CNT_CODE, readable and executable."""
DATA = 0x40000040
"""IMAGE_SCN_CNT_INITIALIZED_DATA, readable."""
WRITABLE = 0x80000000
DISCARDABLE = 0x02000000

LOADS = bytes.fromhex("488d0507000000 48894168 31c0 c3 c3")
"""``lea rax, [unload]; mov [rcx+DriverUnload], rax; xor eax, eax; ret; unload: ret``"""


@dataclass(frozen=True, slots=True)
class Section:
    """A section: ``size`` is its size in memory, where it is not its content's."""

    name: bytes
    content: bytes
    characteristics: int
    size: int | None = None


Imports = Mapping[str, Sequence[str | int]]


def build(
    *,
    code: bytes = LOADS,
    imports: Imports | None = None,
    call: bool = False,
    sections: Sequence[Section] = (),
    subsystem: int = 1,
    characteristics: int = 0x0022,
    machine: int = 0x8664,
    base: int = 0x1_4000_0000,
    entry: int = PAGE,
    pointers: int = 0,
    text: int = TEXT,
    alignment: int = PAGE,
) -> bytes:
    """An image: .text, .rdata with its imports, ``sections``, and .reloc where there are ``pointers``.

    ``call`` has DriverEntry call the first import; ``pointers`` is how many absolute addresses there
    are. ``characteristics`` are the file's: executable, large addresses.
    """
    code_at, data_at = PAGE, 2 * PAGE
    tables, first_slot = _import_tables(imports or {}, data_at)
    if call:
        slot = struct.pack("<i", first_slot - code_at - 11)
        code = bytes.fromhex("51 4883ec20 ff15") + slot + bytes.fromhex("4883c420 59") + code
    tables = _padded(tables, 8)
    absolute = struct.pack("<Q", base + code_at) * pointers
    parts = [Section(b".text", code, text), Section(b".rdata", tables + absolute, DATA), *sections]
    if pointers:
        at = data_at + len(tables)
        parts.append(Section(b".reloc", _relocations(at, pointers), DATA | DISCARDABLE))
    headers = -(-(SECTIONS + 40 * len(parts)) // RAW) * RAW
    table, body, address, reloc = b"", b"", code_at, (0, 0)
    for part in parts:
        size = len(part.content) if part.size is None else part.size
        stored = _padded(part.content, RAW)
        table += struct.pack("<8sIIII", part.name, size, address, len(stored), headers + len(body))
        table += struct.pack("<IIHHI", 0, 0, 0, 0, part.characteristics)
        if part.name == b".reloc":
            reloc = (address, size)
        body += stored
        address += -(-max(size, 1) // PAGE) * PAGE
    directories = [(0, 0)] * 16
    directories[1] = (data_at, 20 * (len(imports) + 1)) if imports else (0, 0)
    directories[5] = reloc
    optional = struct.pack("<HBBIIIII", 0x20B, 14, 0, len(code), 0, 0, entry, code_at)
    optional += struct.pack("<QII", base, alignment, RAW)
    optional += struct.pack("<HHHHHHIIII", 10, 0, 0, 0, 10, 0, 0, address, headers, 0)
    optional += struct.pack("<HHQQQQII", subsystem, 0x0160, 1 << 20, PAGE, 1 << 20, PAGE, 0, 16)
    optional += b"".join(struct.pack("<II", *directory) for directory in directories)
    file = struct.pack("<HHIIIHH", machine, len(parts), 0, 0, 0, len(optional), characteristics)
    start = (b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x80)).ljust(0x80, b"\0")
    return (start + b"PE\0\0" + file + optional + table).ljust(headers, b"\0") + body


def _padded(content: bytes, alignment: int) -> bytes:
    return content.ljust(-(-len(content) // alignment) * alignment, b"\0")


def _relocations(at: int, count: int) -> bytes:
    """The content of .reloc for ``count`` addresses in a row, all in one page."""
    entries = b"".join(
        struct.pack("<H", 0xA000 | (at + 8 * index) % PAGE) for index in range(count)
    )
    entries = _padded(entries, 4)
    return struct.pack("<II", at & -PAGE, 8 + len(entries)) + entries


def _import_tables(imports: Imports, at: int) -> tuple[bytes, int]:
    """The content of the import directory at ``at``, and where its first slot is."""
    descriptors = 20 * (len(imports) + 1)
    slots = descriptors + sum(16 * (len(names) + 1) for names in imports.values())
    table, lookups, names = b"", b"", b""
    first = 0
    for module, symbols in imports.items():
        thunks = b""
        for symbol in symbols:
            if isinstance(symbol, int):
                thunks += struct.pack("<Q", 1 << 63 | symbol)
            else:
                thunks += struct.pack("<Q", at + slots + len(names))
                names += b"\0\0" + symbol.encode() + b"\0"
        thunks += bytes(8)
        lookup = at + descriptors + len(lookups)
        first = first or lookup + len(thunks)
        table += struct.pack("<IIIII", lookup, 0, 0, at + slots + len(names), lookup + len(thunks))
        names += module.encode() + b"\0"
        lookups += thunks * 2
    return table + bytes(20) + lookups + names, first


def build_module(name: str, exports: Mapping[str, str | None]) -> bytes:
    """A module of a kernel, as Wine's winebuild makes it.

    Each export is a function (``""``), one that is not there yet (``None``: a stub, which hands on the
    module's name and its own), or another module's (``"other.Name"``). The first has ordinal 1.
    """
    text_at, tables_at = PAGE, 3 * PAGE
    names = list(exports)
    count = len(names)
    text_offset = 40 + 10 * count
    texts, places = b"", {}
    for string in (name, *names, *filter(None, exports.values())):
        places[string] = tables_at + text_offset + len(texts)
        texts += string.encode() + b"\0"
    code, addresses = b"", []
    for export, what in exports.items():
        at = text_at + len(code)
        if what:
            addresses.append(places[what])
            continue
        addresses.append(at)
        if what is None:
            code += bytes.fromhex("4883ec28 488d0d") + struct.pack("<i", places[name] - at - 11)
            code += bytes.fromhex("488d15") + struct.pack("<i", places[export] - at - 18)
            code += bytes.fromhex("e800000000 90")
        else:
            code += b"\xc3"
    tables = struct.pack(
        "<IIHHIIIIIII",
        *(0, 0, 0, 0, places[name], 1, count, count),
        *(tables_at + 40, tables_at + 40 + 4 * count, tables_at + 40 + 8 * count),
    )
    tables += struct.pack(f"<{count}I", *addresses)
    tables += struct.pack(f"<{count}I", *(places[export] for export in names))
    tables += struct.pack(f"<{count}H", *range(count)) + texts
    image = build(code=code, sections=[Section(b".edata", tables, DATA)])
    return patched(image, DIRECTORIES, "<II", tables_at, len(tables))


def patched(image: bytes, offset: int, layout: str, *values: int | bytes) -> bytes:
    """``image`` with other values at ``offset`` in the file."""
    changed = bytearray(image)
    struct.pack_into(layout, changed, offset, *values)
    return bytes(changed)
