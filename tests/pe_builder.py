"""Small x86-64 images made by hand, for the faults that no linker makes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PAGE = 0x1000
RAW = 0x200

TEXT = 0x60000020
"""IMAGE_SCN_CNT_CODE, readable and executable."""
DATA = 0x40000040
"""IMAGE_SCN_CNT_INITIALIZED_DATA, readable."""
WRITABLE = 0x80000000

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
    entry: int | None = None,
    pointers: int = 0,
    relocations: bool = True,
    text: int = TEXT,
    alignment: int = PAGE,
) -> bytes:
    """An image: .text, .rdata with its imports, ``sections``, and .reloc.

    ``call`` has DriverEntry call the first import; ``pointers`` is how many absolute addresses there
    are, which .reloc tells of. ``characteristics`` are the file's: executable, large addresses.
    """
    code_at, data_at = PAGE, 2 * PAGE
    tables, first_slot = _import_tables(imports or {}, data_at)
    if call:
        slot = struct.pack("<i", first_slot - code_at - 11)
        code = bytes.fromhex("51 4883ec20 ff15") + slot + bytes.fromhex("4883c420 59") + code
    absolute = struct.pack("<Q", base + code_at) * pointers
    parts = [
        Section(b".text", code, text),
        Section(b".rdata", tables.ljust(-len(tables) % 8 + len(tables), b"\0") + absolute, DATA),
        *sections,
    ]
    at = data_at + len(parts[1].content) - len(absolute)
    if relocations and pointers:
        entries = b"".join(struct.pack("<H", 0xA000 | (at + 8 * n) % PAGE) for n in range(pointers))
        entries += b"\0" * (len(entries) % 4)
        block = struct.pack("<II", at & -PAGE, 8 + len(entries)) + entries
        parts.append(Section(b".reloc", block, DATA | 0x02000000))
    headers = (0x80 + 24 + 240 + 40 * len(parts) + RAW - 1) & -RAW
    table, body, address, raw = b"", b"", code_at, headers
    reloc = (0, 0)
    for part in parts:
        size = len(part.content) if part.size is None else part.size
        stored = part.content.ljust(-len(part.content) % RAW + len(part.content), b"\0")
        table += struct.pack(
            "<8sIIIIIIHHI",
            part.name,
            size,
            address,
            len(stored),
            raw,
            0,
            0,
            0,
            0,
            part.characteristics,
        )
        if part.name == b".reloc":
            reloc = (address, size)
        body += stored
        raw += len(stored)
        address += -(-max(size, 1) // PAGE) * PAGE
    directories = [(0, 0)] * 16
    if imports:
        directories[1] = (data_at, 20 * (len(imports) + 1))
    directories[5] = reloc
    optional = struct.pack(
        "<HBBIIIII", 0x20B, 14, 0, len(code), 0, 0, code_at if entry is None else entry, code_at
    )
    optional += struct.pack("<QII", base, alignment, RAW)
    optional += struct.pack("<HHHHHHIIII", 10, 0, 0, 0, 10, 0, 0, address, headers, 0)
    optional += struct.pack(
        "<HHQQQQII", subsystem, 0x0160, 0x100000, 0x1000, 0x100000, 0x1000, 0, 16
    )
    optional += b"".join(struct.pack("<II", *directory) for directory in directories)
    file = struct.pack("<HHIIIHH", machine, len(parts), 0, 0, 0, len(optional), characteristics)
    start = (b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x80)).ljust(0x80, b"\0")
    return (start + b"PE\0\0" + file + optional + table).ljust(headers, b"\0") + body


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
