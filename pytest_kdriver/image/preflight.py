"""Pre-flight: what can be said of a driver's file before a kernel sees it.

What will surely fail is an error, what may fail a warning, and each says what to do. What Wine does with
such an image was measured on Wine 8 (``tests/wine/test_preflight.py`` shows it); for Windows the sources
are Microsoft's documentation and the published loader (sysload.c of the Windows Research Kernel).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, Literal, TypeAlias

from pytest_kdriver.errors import ImageError
from pytest_kdriver.image.authenticode import NotSigned, SignatureError, read_signature
from pytest_kdriver.image.exports import Availability, KernelExports, KernelModule
from pytest_kdriver.image.pe import (
    PAGE,
    FileFlag,
    Image,
    Import,
    SectionFlag,
    Subsystem,
    Symbol,
    read_image,
)

Guest: TypeAlias = Literal["wine", "windows"]
"""Whose loader it is that the image has to please."""

_SHOWN: Final = 8
"""How many names of one kind a message has; the others are counted."""

_CHUNK: Final = 1 << 16
"""Bytes that are added as one number; an even count."""

_USER_MODE: Final = re.compile(
    r"(kernel32|kernelbase|ntdll|user32|gdi32|advapi32|sechost|shell32|shlwapi|ole32|oleaut32|combase"
    r"|rpcrt4|ws2_32|crypt32|bcrypt|bcryptprimitives|userenv|version|winmm|dbghelp|psapi"
    r"|msvcrt|msvcr\d+d?|msvcp.*|vcruntime.*|ucrtbased?|api-ms-win-.*"
    r"|libgcc_s.*|libstdc\+\+.*|libwinpthread.*|libunwind|libc\+\+)(\.dll)?",
    re.IGNORECASE,
)
"""Modules that live in processes. Kernel modules that end in .dll too are hal, bootvid, ci and the like."""

_MAKES_A_PROGRAM: Final = re.compile(r"(kernel32|ntdll)\.dll", re.IGNORECASE)
"""What Wine takes an image that imports it for no driver by (``is_dll_native_subsystem``)."""

_API_SET: Final = re.compile(r"api-ms-win-.*", re.IGNORECASE)
"""Names that the loader has other modules for; there need be no such file."""


class Severity(Enum):
    """An error: the load, or the driver's first step, will fail. A warning: it may."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. ``code`` is a word for it that stays; ``message`` says what to do."""

    severity: Severity
    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity.value}: {self.message} [{self.code}]"


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found about ``image``."""

    image: Path
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings because of which the load will fail."""
        return tuple(f for f in self.findings if f.severity is Severity.ERROR)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings because of which something may fail."""
        return tuple(f for f in self.findings if f.severity is Severity.WARNING)

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings)) or f"{self.image.name}: nothing is wrong"


def preflight(path: Path, kernel: KernelExports | None, *, guest: Guest = "wine") -> Report:
    """Check the driver's file ``path`` for a guest whose kernel has ``kernel`` for it.

    Without a ``kernel`` of imports only that is told which no kernel has. Raises ``ImageError`` where the
    file can't be read, or is no x86-64 image.
    """
    image = read_image(path)
    return Report(path, tuple(_Check(image, kernel, guest).findings()))


@dataclass(frozen=True, slots=True)
class _Check:
    image: Image
    kernel: KernelExports | None
    guest: Guest

    def findings(self) -> Iterator[Finding]:
        yield from self._subsystem()
        layout = list(self._layout())
        yield from layout
        if not any(finding.severity is Severity.ERROR for finding in layout):
            yield from self._entry()
            yield from self._protection()
            yield from self._relocations()
            yield from self._imports()
        yield from self._checksum()
        yield from self._signature()

    def _error(self, code: str, what: str) -> Finding:
        return Finding(Severity.ERROR, code, f"{self.image.path.name}: {what}")

    def _warning(self, code: str, what: str) -> Finding:
        return Finding(Severity.WARNING, code, f"{self.image.path.name}: {what}")

    def _error_on(self, guest: Guest, code: str, what: str) -> Finding:
        return (self._error if self.guest == guest else self._warning)(code, what)

    def _subsystem(self) -> Iterator[Finding]:
        if self.image.subsystem == Subsystem.NATIVE:
            return
        try:
            name = Subsystem(self.image.subsystem).name
        except ValueError:
            name = str(self.image.subsystem)
        told = (
            f"its subsystem is {name}, a driver's is NATIVE: link with /SUBSYSTEM:NATIVE (lld-link, "
            "link.exe) or --subsystem native (mingw ld)"
        )
        if self.guest == "wine" and self.image.flags & FileFlag.DLL:
            yield self._error(
                "subsystem",
                f"{told}; Wine calls such a DLL's entry point as DllMain, and refuses it",
            )
        else:
            yield self._warning("subsystem", told)

    def _layout(self) -> Iterator[Finding]:
        """What is wrong with where its parts are; an error here makes the rest unreadable."""
        image = self.image
        again = "link it again, with nothing that edits the image afterwards"
        if not image.sections:
            yield self._error("sections", f"it has no sections: {again}")
            return
        if image.alignment < PAGE or image.alignment & (image.alignment - 1):
            yield self._error_on(
                "wine",
                "alignment",
                f"its sections are aligned to {image.alignment} bytes, not to pages: neither Wine loads "
                "that, nor Windows with memory integrity (HVCI); link without /ALIGN (lld-link, link.exe) or "
                "--section-alignment (mingw ld)",
            )
        last = max(image.sections, key=lambda section: section.stored and section.stored_end)
        if last.stored and last.stored_end > len(image.data):
            yield self._error(
                "truncated",
                f"it is truncated: its section {last.name} ends at {last.stored_end} in the file, which has "
                f"{len(image.data)} bytes: build or copy it again",
            )
        unit = min(max(image.alignment, 1), PAGE)
        end = image.sections[0].address
        for section in image.sections:
            if section.address < end:
                yield self._error(
                    "sections",
                    f"its section {section.name} begins at 0x{section.address:X} in memory, the one before "
                    f"it ends at 0x{end:X}: {again}",
                )
            elif section.address - end >= max(image.alignment, PAGE):
                yield self._error_on(
                    "windows",
                    "sections",
                    f"nothing is between 0x{end:X} and its section {section.name} at 0x{section.address:X}: "
                    f"Windows wants sections to follow one another; {again}",
                )
            end = section.address + -(-max(section.size, 1) // unit) * unit
        if end > -(-image.size // PAGE) * PAGE:
            yield self._error(
                "sections",
                f"its sections end at 0x{end:X}, but its size is given as 0x{image.size:X}: {again}",
            )

    def _entry(self) -> Iterator[Finding]:
        entry = self.image.entry
        how = "link with /ENTRY:DriverEntry (lld-link, link.exe) or --entry DriverEntry (mingw ld)"
        section = self.image.section_at(entry)
        if not entry:
            yield self._error(
                "entry", f"it has no entry point, so DriverEntry is never called: {how}"
            )
        elif section is None:
            yield self._error(
                "entry", f"its entry point, 0x{entry:X}, is outside of its sections: {how}"
            )
        elif not section.flags & SectionFlag.EXECUTE:
            yield self._error(
                "entry",
                f"its entry point, 0x{entry:X}, is in {section.name}, which is not executable: {how}, and "
                "leave the code's section readable and executable",
            )

    def _protection(self) -> Iterator[Finding]:
        both = SectionFlag.EXECUTE | SectionFlag.WRITE
        names = [section.name for section in self.image.sections if section.flags & both == both]
        if names:
            yield self._warning(
                "writable-code",
                f"{_names(names)} can be written and executed: Windows with memory integrity (HVCI) refuses "
                "it; keep code and data apart, and link without /SECTION:...,RWX or -N (mingw ld)",
            )

    def _relocations(self) -> Iterator[Finding]:
        if self.image.flags & FileFlag.RELOCS_STRIPPED:
            yield self._error_on(
                "windows",
                "relocations",
                f"it has no relocations, so it can run at 0x{self.image.base:X} only. Windows loads drivers "
                "elsewhere, and refuses it (STATUS_CONFLICTING_ADDRESSES); so does Wine where that is taken, "
                "or runs it with wrong addresses. Link without /FIXED (lld-link, link.exe), or with "
                "--dynamicbase and --enable-reloc-section (mingw ld)",
            )

    def _imports(self) -> Iterator[Finding]:
        try:
            imports = list(self.image.imports())
            delayed = list(self.image.delayed())
        except ImageError as error:
            yield Finding(Severity.ERROR, "imports", f"{error}: link it again")
            return
        user_mode = [found.module for found in imports if _USER_MODE.fullmatch(found.module)]
        refused = [module for module in user_mode if self._refuses(module)]
        loaded = [module for module in user_mode if module not in refused]
        if refused:
            yield self._error(
                "user-mode", self._from_user_mode(refused, "a kernel does not have it")
            )
        if loaded:
            but = "Wine loads it, Windows will refuse it, since its kernel does not have it"
            yield self._warning("user-mode", self._from_user_mode(loaded, but))
        if delayed:
            yield self._warning(
                "delay-load",
                f"it loads {_names(delayed)} when first called, with code that is made for programs: "
                "link without /DELAYLOAD",
            )
        for found in imports:
            if found.module not in refused and not _API_SET.fullmatch(found.module):
                yield from self._import(found)

    def _refuses(self, user_mode: str) -> bool:
        """Whether the guest does not load a driver that imports the module ``user_mode``."""
        if self.guest == "windows" or _MAKES_A_PROGRAM.fullmatch(user_mode):
            return True
        if self.kernel is None or _API_SET.fullmatch(user_mode):
            return False
        return not self.kernel.has(user_mode)

    def _from_user_mode(self, modules: Sequence[str], so: str) -> str:
        return (
            f"it imports {_names(modules)}, which is for programs: {so}. Mostly a C runtime, or Rust's std, "
            "came along: link with /NODEFAULTLIB (lld-link, link.exe) or -nostdlib (mingw) and take memcpy "
            "and the like from ntoskrnl; in Rust, #![no_std] and kernel_module!"
        )

    def _import(self, wanted: Import) -> Iterator[Finding]:
        ordinals = [symbol for symbol in wanted.symbols if isinstance(symbol, int)]
        if ordinals:
            yield self._warning(
                "ordinal",
                f"it imports {_names(ordinals)} of {wanted.module} by number, which is another function in "
                "another kernel: import by name",
            )
        if self.kernel is None:
            return
        try:
            module = self.kernel.module(wanted.module)
            if module is None:
                yield self._error("module", self._no_module(wanted.module, self.kernel.name))
                return
            found = [(symbol, module.look_up(symbol)) for symbol in dict.fromkeys(wanted.symbols)]
        except ImageError as error:
            yield self._warning(
                "module", f"its imports of {wanted.module} were not checked: {error}"
            )
            return
        yield from self._lacking(module, found)

    def _no_module(self, module: str, kernel: str) -> str:
        what = " (it is KMDF's loader)" if module.lower() == "wdfldr.sys" else ""
        return (
            f"it imports {module}{what}, which {kernel} does not have: the load fails. "
            f"Do without, or put {module} into C:\\windows\\system32\\drivers first"
        )

    def _lacking(
        self, module: KernelModule, found: Iterable[tuple[Symbol, Availability]]
    ) -> Iterator[Finding]:
        kernel, found = module.kernel.name, list(found)
        missing = [symbol for symbol, availability in found if availability is Availability.MISSING]
        stubs = [symbol for symbol, availability in found if availability is Availability.STUB]
        instead = (
            "look it up with MmGetSystemRoutineAddress, and have another way where it is not there"
        )
        if missing:
            then = "calling it crashes the driver" if self.guest == "wine" else "the load fails"
            yield self._error_on(
                "windows",
                "missing-import",
                f"it imports {_names(missing)}, which {module.name} of {kernel} does not have: {then}; "
                f"{instead}",
            )
        if stubs:
            yield self._warning(
                "stub-import",
                f"it imports {_names(stubs)}, which {module.name} of {kernel} has only as a stub: "
                "calling it crashes the driver",
            )

    def _checksum(self) -> Iterator[Finding]:
        stated = self.image.checksum
        if not stated:
            if self.guest == "windows":
                yield self._warning(
                    "checksum",
                    "it has no checksum, which Windows wants of drivers: sign it, which writes one, or link "
                    "with /RELEASE (lld-link, link.exe)",
                )
            return
        computed = checksum(self.image.data, self.image.checksum_offset)
        if stated != computed:
            yield self._error_on(
                "windows",
                "checksum",
                f"its checksum is 0x{computed:X}, but it says 0x{stated:X}: it was changed after it was "
                "linked or signed, and Windows refuses it (STATUS_IMAGE_CHECKSUM_MISMATCH); build it or sign "
                "it again",
            )

    def _signature(self) -> Iterator[Finding]:
        if self.guest != "windows":
            return
        try:
            read_signature(self.image)
        except NotSigned as error:
            yield Finding(
                Severity.ERROR,
                "unsigned",
                f"{error}, unless a debugger is attached. kdriver sign makes a signed copy, for a Windows "
                "with test-signing on; targets with such a Windows sign by themselves",
            )
        except SignatureError as error:
            yield Finding(
                Severity.ERROR, "signature", f"{error}; sign it again, by kdriver sign, say"
            )


def checksum(data: bytes, field: int) -> int:
    """The checksum of the image ``data``, which has it, or what is there instead, at offset ``field``.

    It is the sum of its 16-bit words with the carries added, the field left out, plus its length. Such a
    sum is a remainder by 0xFFFF, and a long number has the same one as the sum of its words.
    """
    total = sum(
        int.from_bytes(data[start : start + _CHUNK], "little")
        for start in range(0, len(data), _CHUNK)
    )
    total -= int.from_bytes(data[field : field + 4], "little") << 8 * (field % 2)
    return ((total - 1) % 0xFFFF + 1 if total else 0) + len(data)


def _names(names: Sequence[Symbol]) -> str:
    """``a, b and 3 more``."""
    names = list(dict.fromkeys(names))
    shown = ", ".join(str(name) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
