"""Crash dumps made by hand, from the layouts: no real one is at hand here.

The header is QEMU's ``include/qemu/win_dump_defs.h``, what a minidump has behind it rizin's
``dmp_specs.h``. A complete dump has runs of physical pages behind it; x64's page tables are among them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

HEADER = 0x2000
TRIAGE = HEADER
ENTRY = 0x90
AMD64 = 0x8664
BREAKPOINT = 0x80000003

MINIDUMP, COMPLETE, KERNEL = 4, 1, 6

PAGE = 0x1000
MODULE_LIST = 0xFFFFF80013000000
STACK = 0xFFFFA00012340000
"""Where ``complete`` puts PsLoadedModuleList, and the stack."""

Module = tuple[str, int, int]
"""The path of its file, its address, its size."""


def header(
    *,
    kind: int = MINIDUMP,
    code: int = 0xD1,
    parameters: tuple[int, int, int, int] = (0, 2, 0, 0),
    build: int = 19041,
    machine: int = AMD64,
    processors: int = 4,
    time: int = 0x01DC_5C6B_0000_0000,
    uptime: int = 905_000_000,
    exception: tuple[int, int] | None = (BREAKPOINT, 0),
    instruction: int | None = 0,
    size: int = 0,
) -> bytearray:
    """The first header; times are in 100 ns, ``time`` since 1601. None is what Windows did not fill in."""
    data = bytearray(b"PAGE" * (HEADER // 4))
    data[4:8] = b"DU64"
    struct.pack_into("<2I", data, 0x08, 15, build)
    struct.pack_into("<3I4x4Q", data, 0x30, machine, processors, code, *parameters)
    if instruction is not None:
        struct.pack_into("<I", data, 0x348 + 0x30, 0x0010_001F)
        struct.pack_into("<Q", data, 0x348 + 0xF8, instruction)
    if exception is not None:
        struct.pack_into("<I12xQ", data, 0xF00, *exception)
    struct.pack_into("<I4xQQ", data, 0xF98, kind, size, time)
    struct.pack_into("<Q", data, 0x1030, uptime)
    return data


def minidump(
    modules: Sequence[Module] = (),
    stack: Sequence[int] = (),
    *,
    head: bytes | None = None,
    entry: int = ENTRY,
) -> bytes:
    """A minidump: header, second header, stack, driver list, names. ``entry`` is an entry's size."""
    stack_at = TRIAGE + 0x80
    list_at = stack_at + 8 * len(stack)
    names_at = list_at + entry * len(modules)
    names = bytearray()
    entries = bytearray()
    for path, base, size in modules:
        one = bytearray(entry)
        struct.pack_into("<I", one, 0, names_at + len(names))
        struct.pack_into("<Q8xI", one, 0x38, base, size)
        entries += one
        text = path.encode("utf-16-le")
        names += struct.pack("<I", len(text) // 2) + text + b"\0\0"
        names += bytes(-len(names) % 8)
    end = names_at + len(names)
    triage = bytearray(0x80)
    struct.pack_into("<3I", triage, 0, 0, end + 4, end)
    fields = (stack_at, 8 * len(stack), list_at, len(modules), names_at, len(names))
    struct.pack_into("<6I", triage, 0x28, *fields)
    head = bytes(header()) if head is None else head
    return b"".join((head, triage, struct.pack(f"<{len(stack)}Q", *stack), entries, names, b"TRGD"))


def complete(
    modules: Sequence[Module], stack: Sequence[int], *, looped: bool = False, **fields: int
) -> bytes:
    """A complete dump, with its list of modules and a stack in its memory; ``fields`` as ``header`` has.

    ``looped`` has the last module be the next of itself.
    """
    listed = bytearray(PAGE)
    entries = [MODULE_LIST + 0x100 * (1 + number) for number in range(len(modules))]
    after = [*entries[1:], entries[-1] if looped else MODULE_LIST]
    struct.pack_into("<2Q", listed, 0, entries[0], entries[-1])
    names = bytearray()
    for (path, base, size), at, following in zip(modules, entries, after, strict=True):
        text = path.encode("utf-16-le")
        buffer = MODULE_LIST + PAGE + len(names)
        struct.pack_into("<2Q", listed, at - MODULE_LIST, following, MODULE_LIST)
        struct.pack_into("<Q8xI", listed, at - MODULE_LIST + 0x30, base, size)
        name = (len(text), len(text), buffer)
        struct.pack_into("<HH4xQ", listed, at - MODULE_LIST + 0x58, *name)
        names += text
    memory = {
        MODULE_LIST: bytes(listed),
        MODULE_LIST + PAGE: bytes(names).ljust(PAGE, b"\0"),
        STACK: struct.pack(f"<{len(stack)}Q", *stack).ljust(PAGE, b"\0"),
    }
    pages = _page_tables(memory)
    head = header(kind=COMPLETE, size=HEADER + PAGE * len(pages), **fields)  # type: ignore[arg-type]
    struct.pack_into("<3Q", head, 0x10, PAGE, 0, MODULE_LIST)
    struct.pack_into("<Q", head, 0x348 + 0x98, STACK)
    struct.pack_into("<I4xQQQ", head, 0x88, 1, len(pages), 1, len(pages))
    return bytes(head) + b"".join(pages)


def _page_tables(memory: Mapping[int, bytes]) -> list[bytes]:
    """The pages from physical page 1 on: the page tables, the first of them the topmost, and ``memory``."""
    tables = [bytearray(PAGE)]
    contents: list[bytes] = []
    leaves: list[tuple[bytearray, int]] = []
    known: dict[int, bytearray] = {}
    for address, content in memory.items():
        table = tables[0]
        for shift in (39, 30, 21):
            place = address >> shift
            if place not in known:
                known[place] = bytearray(PAGE)
                tables.append(known[place])
                struct.pack_into("<Q", table, (place & 511) * 8, len(tables) * PAGE | 3)
            table = known[place]
        leaves.append((table, (address >> 12 & 511) * 8))
        contents.append(content)
    for number, (table, offset) in enumerate(leaves, len(tables) + 1):
        struct.pack_into("<Q", table, offset, number * PAGE | 3)
    return [*map(bytes, tables), *contents]
