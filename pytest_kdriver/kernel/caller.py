"""Who called: a stack of frames, and which of them a person wants to see.

A pool block that a Rust driver leaks is allocated by its framework, for ``alloc``, for the driver. So a
caller is shown by its first frame in the driver's *own source*: not the Rust project's, not the
framework's, not what cargo downloaded, not a C compiler's run-time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Final

from pytest_kdriver.kernel.events import ImageLoaded
from pytest_kdriver.kernel.images import has
from pytest_kdriver.kernel.symbolizer import LoadSymbols

FRAMEWORK: Final = (
    "windows-kernel-rs",
    "windows-kernel-sys",
    "kernel-device",
    "kernel-pool",
    "kernel-text",
)
"""The crates that the framework for drivers consists of."""

_COMMON_NAMES: Final = ("kernel_device", "kernel_pool", "kernel_text")
"""Those of them that a crate of the driver's author may be named as well: their folder has to fit too."""

_RUST: Final = ("core", "alloc", "std", "compiler_builtins")

_FOREIGN_CRATE: Final = re.compile(
    r"(?:enum2\$<)*(" + "|".join((*_RUST, *FRAMEWORK)).replace("-", "_") + r")::"
)
"""A function of theirs. A PDB writes the methods of an enum as those of an ``enum2$<...>``."""

_FOREIGN_FILE: Final = re.compile(
    r"/rustc/[^/]+/library/"  # as the Rust project's own builds name it
    r"|/rustlib/src/rust/library/|/usr/src/rustc[^/]*/library/"  # where its source is installed
    r"|/registry/src/[^/]+-[0-9a-f]{16}/|/git/checkouts/[^/]+-[0-9a-f]{16}/[0-9a-f]{7,}/"  # cargo's
    r"|/mingw-w64-crt/|/(?:lib|share)/mingw-w64/|/x86_64-w64-mingw32/|/libgcc/"
    r"|/windows-kernel-(?:rs|sys)/src/"
)


@dataclass(frozen=True, slots=True)
class Frame:
    """A place in the guest's code: ``offset`` bytes into ``image``, or from 0 where ``image`` is None.

    ``function``, ``file`` and ``line`` are its source, None where that is not known. ``address`` is where it
    was, and the same place of another load is an equal frame. A call's frame has the return address, and the
    call's line. Functions that are inlined there have frames of their own, with the same address.
    """

    address: int = field(compare=False)
    image: str | None
    offset: int
    function: str | None = None
    file: str | None = None
    line: int | None = None

    @property
    def in_own_source(self) -> bool:
        """Whether it is known to lie in the driver's own source."""
        return self.file is not None and self.crate is None and not _is_foreign(self.file)

    @property
    def crate(self) -> str | None:
        """The crate of the Rust project, or of the framework, that the function is of; None for others."""
        match = _FOREIGN_CRATE.match(self.function or "")
        if match is None:
            return None
        if match[1] in _COMMON_NAMES and self.file is not None:
            folder = f"/{match[1].replace('_', '-')}/src/"
            return match[1] if folder in self.file.replace("\\", "/") else None
        return match[1]

    def __str__(self) -> str:
        if self.in_own_source and self.file is not None:
            line = "" if self.line is None else f":{self.line}"
            return f"{short_path(self.file)}{line} in {self.function}"
        place = f"{self.image}+0x{self.offset:X}" if self.image else f"0x{self.address:X}"
        known = self.crate or self.function
        return f"{known} ({place})" if known else place


@dataclass(frozen=True, slots=True, eq=False)
class Caller:
    """A call stack, innermost frame first.

    Two are equal that come by the same lines of the driver's own source, whatever lies between; without
    such lines, by the same offsets in its image.
    """

    frames: tuple[Frame, ...]

    @property
    def own_frames(self) -> tuple[Frame, ...]:
        """The frames in the driver's own source."""
        return tuple(frame for frame in self.frames if frame.in_own_source)

    def describe(self, depth: int = 1) -> str:
        """The first ``depth`` frames in the driver's own source; without any, the first frame there is."""
        return (
            ", called from ".join(map(str, self.own_frames[:depth] or self.frames[:1])) or "unknown"
        )

    def __str__(self) -> str:
        return self.describe()

    def __eq__(self, other: object) -> bool:
        return self._place() == other._place() if isinstance(other, Caller) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._place())

    def _place(self) -> Hashable:
        lines = [(frame.function, frame.file, frame.line) for frame in self.own_frames]
        return tuple(lines or [frame for frame in self.frames if frame.image] or self.frames)


class Callers:
    """Makes callers of addresses. ``load_symbols`` None: nothing is known of the source."""

    def __init__(self, load_symbols: LoadSymbols | None) -> None:
        self._load_symbols = load_symbols
        self._known: dict[tuple[ImageLoaded | None, tuple[int, ...]], Caller] = {}

    def caller(self, image: ImageLoaded | None, addresses: tuple[int, ...]) -> Caller:
        """The caller whose return addresses these are, innermost first, while ``image`` was loaded."""
        known = self._known.get((image, addresses))
        if known is None:
            frames = [f for address in addresses for f in self.frames(image, address, address - 1)]
            known = self._known[image, addresses] = Caller(tuple(frames))
        return known

    def frames(self, image: ImageLoaded | None, address: int, instruction: int) -> Iterator[Frame]:
        """The frames at ``address``, by the line of the instruction at ``instruction``."""
        if image is None or not has(image, address):
            yield Frame(address, None, address)
            return
        offset = address - image.base
        sources = (
            self._load_symbols().locate(instruction - image.base) if self._load_symbols else ()
        )
        for source in sources:
            yield Frame(address, image.driver, offset, source.function, source.file, source.line)
        if not sources:
            yield Frame(address, image.driver, offset)


def short_path(file: str) -> str:
    """``file`` relative to the current folder, if it lies below it."""
    path = PurePath(file)
    here = os.getcwd()  # noqa: PTH109 -- Path.cwd() does the same, and is no PurePath
    return str(path.relative_to(here)) if path.is_relative_to(here) else file


def _is_foreign(file: str) -> bool:
    return _FOREIGN_FILE.search(file.replace("\\", "/")) is not None
