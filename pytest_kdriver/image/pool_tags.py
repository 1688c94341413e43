"""Which pool tags an image uses, as far as its code says so.

The routines that it imports take the tag as their third argument, in r8d, and compilers load a constant
there right before the call: ``mov r8d, imm32``, 41 B8 and the tag's four letters. The code is not
disassembled, so what is found may be none: nothing has that tag then.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pytest_kdriver.errors import ImageError
from pytest_kdriver.image.pe import Image, SectionFlag, read_image

ALLOCATORS: Final = frozenset(
    {
        "ExAllocatePool2",
        "ExAllocatePool3",
        "ExAllocatePoolWithTag",
        "ExAllocatePoolWithTagPriority",
        "ExAllocatePoolWithQuotaTag",
    }
)
"""The kernel's routines whose third argument is a tag."""

MAX_CODE: Final = 16 << 20
"""Bytes of an image's code that are looked through."""

_REACH: Final = 48
"""So many bytes before a call its tag may be loaded."""

_TAG: Final = re.compile(rb"\x41\xb8([\x20-\x7e]{4})")

_REFERENCE: Final = re.compile(
    rb"(?=(?:\xff[\x15\x25]|\x8b[\x05\x0d\x15\x1d\x25\x2d\x35\x3d])(.{4}))", re.DOTALL
)
"""``call [rip+n]``, ``jmp [rip+n]``, ``mov REGISTER, [rip+n]``."""

_CALL: Final = re.compile(rb"(?=[\xe8\xe9](.{4}))", re.DOTALL)
"""``call n``, ``jmp n``."""

_REGISTER_CALL: Final = re.compile(rb"\xff[\xd0-\xd7]")
_REX_W: Final = b"\x48"
"""What a function's last jump begins with; one without it is a linker's, which others call."""


@dataclass(frozen=True, slots=True)
class UsedTags:
    """The tags that an image is seen to use. ``all_seen``: it has calls, and each names its tag."""

    tags: frozenset[str]
    all_seen: bool


def used_tags(path: Path) -> UsedTags:
    """The tags that the image ``path`` uses; none where it can't be read."""
    tags: set[str] = set()
    all_seen = True
    calls = 0
    try:
        for before in _calls(read_image(path)):
            found = _TAG.findall(before)
            tags.update(tag.decode() for tag in found[-1:])
            all_seen &= bool(found)
            calls += 1
    except ImageError:
        all_seen = False
    return UsedTags(frozenset(tags), all_seen and calls > 0)


def default_tags(name: str) -> frozenset[str]:
    """The tags that ``kernel_module!`` may give to a driver of that name, if it names none itself.

    They are made of the package's name, in which a dash may stand where a file's has an underscore.
    """
    return frozenset(package[:4].ljust(4) for package in (name, name.replace("_", "-")))


def _calls(image: Image) -> Iterator[bytes]:
    """The code right before each call of an allocator; nothing where the call itself is not seen."""
    slots = {
        imported.slots + 8 * index
        for imported in image.imports()
        for index, symbol in enumerate(imported.symbols)
        if symbol in ALLOCATORS
    }
    sections = list(_code(image)) if slots else []
    if sum(len(code) for _, code in sections) == MAX_CODE:
        yield b""
    thunks = set()
    held = False
    for address, code in sections:
        for at in _to(_REFERENCE, address, code, slots, length=6):
            if code[at] == 0x8B:
                held = True
            elif code[at + 1] == 0x25 and code[at - 1 : at] != _REX_W:
                thunks.add(address + at)
            else:
                yield _before(code, at)
    for address, code in sections:
        if thunks:
            for at in _to(_CALL, address, code, thunks, length=5):
                yield _before(code, at)
        if held:
            yield from _calls_by_register(code)


def _code(image: Image) -> Iterator[tuple[int, bytes]]:
    """The sections that can be executed, and their addresses; ``MAX_CODE`` bytes at most."""
    left = MAX_CODE
    for section in image.sections:
        if section.flags & SectionFlag.EXECUTE:
            size = min(section.size, section.stored, left)
            left -= size
            yield section.address, image.read(section.address, size)


def _calls_by_register(code: bytes) -> Iterator[bytes]:
    """Which of them are an allocator's is not known: those with a tag, and one more, not seen."""
    for match in _REGISTER_CALL.finditer(code):
        if _TAG.search(before := _before(code, match.start())):
            yield before
    yield b""


def _to(
    pattern: re.Pattern[bytes], address: int, code: bytes, targets: Container[int], *, length: int
) -> Iterator[int]:
    """Where in ``code`` an instruction of ``length`` bytes may stand that refers to one of ``targets``."""
    for match in pattern.finditer(code):
        if _target(address, code, match.start(), length=length) in targets:
            yield match.start()


def _target(address: int, code: bytes, at: int, *, length: int) -> int:
    (distance,) = struct.unpack_from("<i", code, at + length - 4)
    return int(address + at + length + distance)


def _before(code: bytes, at: int) -> bytes:
    return code[max(at - _REACH, 0) : at]
