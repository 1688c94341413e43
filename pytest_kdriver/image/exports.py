"""What a kernel has for drivers: the exports of its modules, read in the files of its Windows folder."""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Final

from pytest_kdriver.errors import ImageError
from pytest_kdriver.image.pe import Exports, Image, Symbol, read_image

_FOLDERS: Final = ("system32", "system32/drivers")
"""Where a driver's imports are looked for, by Windows and by Wine's winedevice.exe."""

_MAX_FORWARDS: Final = 8
_STUB_SIZE: Final = 19

_STUB: Final = re.compile(
    rb"\x48\x83\xec\x28"  # sub rsp, 0x28
    rb"\x48\x8d\x0d(?P<module>.{4})"  # lea rcx, [the module's name]
    rb"(?:\x48\x8d\x15|\x48\xc7\xc2).{4}"  # lea rdx, [the function's name]; mov rdx, its ordinal
    rb"\xe8",  # call __wine_spec_unimplemented_stub
    re.DOTALL,
)
"""The function that Wine's winebuild (tools/winebuild/spec32.c) makes of a ``@ stub`` in a .spec file."""


class Availability(Enum):
    """Whether a kernel has an export."""

    PRESENT = "present"
    STUB = "stub"
    MISSING = "missing"


@dataclass(frozen=True)
class KernelExports:
    """The kernel whose Windows folder (``drive_c/windows`` in a Wine prefix) is ``windows``.

    ``name`` is the kernel's, for messages. Which modules there are is looked up once, so one of these is
    for one image; a file is read once by all of them, and again when it changes.
    """

    windows: Path
    name: str

    def module(self, name: str) -> KernelModule | None:
        """The kernel's module ``name``; None: it has none. Raises ``ImageError`` where that can't be read.

        Names have no case in Windows, and one without an ending means a .dll.
        """
        wanted = _file_name(name)
        file = self._files.get(wanted)
        return None if file is None else KernelModule(self, wanted, *_read(file))

    def has(self, name: str) -> bool:
        """Whether there is a file for the module ``name``, whatever is in it."""
        return _file_name(name) in self._files

    @cached_property
    def _files(self) -> dict[str, Path]:
        """The file of each name, in lower case; in the order of ``_FOLDERS``, the first is the one."""
        files: dict[str, Path] = {}
        for folder in _FOLDERS:
            for entry in _entries(self.windows / folder):
                files.setdefault(entry.lower(), self.windows / folder / entry)
        return files


@dataclass(frozen=True, slots=True)
class KernelModule:
    """A module of ``kernel``, as its file has it."""

    kernel: KernelExports
    name: str
    image: Image
    exports: Exports

    def look_up(self, symbol: Symbol) -> Availability:
        """Whether it exports ``symbol``; where it only forwards it, whether the other module does.

        Raises ``ImageError`` where a module's file makes no sense.
        """
        module: KernelModule | None = self
        for _ in range(_MAX_FORWARDS):
            address = None if module is None else module.exports.address(symbol)
            if module is None or address is None:
                return Availability.MISSING
            if address not in module.exports.directory:
                return Availability.STUB if module.is_stub(address) else Availability.PRESENT
            forwarder = module.image.forwarder(address)
            module, symbol = self.kernel.module(forwarder.module), forwarder.symbol
        return Availability.MISSING

    def is_stub(self, address: int) -> bool:
        """Whether the code at ``address`` is a stub: it hands on the name of the module it was made for."""
        try:
            match = _STUB.match(self.image.read(address, _STUB_SIZE))
            if match is None:
                return False
            (distance,) = struct.unpack("<i", match["module"])
            return self.image.text(address + match.end("module") + distance).lower() == self.name
        except ImageError:  # data near a section's end, for one
            return False


def _file_name(module: str) -> str:
    return module.lower() if "." in module else f"{module.lower()}.dll"


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 -- a thousand names, and no paths
    except OSError:
        return []


def _read(file: Path) -> tuple[Image, Exports]:
    try:
        status = file.stat()
    except OSError as error:
        raise ImageError(f"{file} can't be read: {error}") from error
    return _read_version(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=32)
def _read_version(file: Path, changed: int, size: int) -> tuple[Image, Exports]:  # noqa: ARG001 -- keys
    image = read_image(file)
    return image, image.exports()
