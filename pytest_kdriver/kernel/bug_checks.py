"""Bug checks: their names, what they say, and the text by which a kernel tells a debugger of one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias

from pytest_kdriver.kernel.bug_check_names import BUG_CHECK_NAMES
from pytest_kdriver.kernel.bug_check_words import ACCESSES, FAULTS, IRQLS, KINDS, RULES, WORDS
from pytest_kdriver.ntstatus import NTSTATUS

Where: TypeAlias = Callable[[int], str | None]
"""Tells an address as "driver+0x12", or by file and line; None where nothing is known of it."""

_MINIDUMP: Final = 0x10000000
"""Set in the codes of some, which mean what those without it mean: 0x1000007E is 0x7E."""

_NULL_PAGE: Final = 0x1000
"""Below, a bad address is a null pointer's, says the page on bug check 0xA."""

_PROTECTED_POOL: Final = 0x80000000

_FATAL = re.compile(
    r"\*\*\* Fatal System Error: 0x([0-9a-f]{1,8})\s{0,64}"
    r"\(\s{0,8}0x([0-9a-f]{1,16})\s{0,8},\s{0,8}0x([0-9a-f]{1,16})\s{0,8},"
    r"\s{0,8}0x([0-9a-f]{1,16})\s{0,8},\s{0,8}0x([0-9a-f]{1,16})\s{0,8}\)",
    re.IGNORECASE,
)
_BLAMED = re.compile(
    r"Driver at fault:\s{0,8}(?:\*{3}\s{1,8})?([^\x00-\x1f\x7f-\x9f]{1,256}?)"
    r"(?: - Address |\.?[ \t\r]{0,8}(?:\n|\Z))"
)
"""Both as ReactOS prints them, ntoskrnl/ke/bug.c; a Windows has CR LF as its line's end, and the name in a
line of its own, as its blue screen had it: ``***  name.sys - Address ... base at ...``."""


class FatalError(NamedTuple):
    """What the kernel's text says of a bug check.

    ``blamed`` is the name of a driver's file, None where the text names none.
    """

    code: int
    parameters: tuple[int, int, int, int]
    blamed: str | None


def name_of(code: int) -> str:
    """The name of the bug check ``code``, as Microsoft's headers have it; "" where they have none."""
    return BUG_CHECK_NAMES.get(code, "")


def parse_fatal(text: str) -> FatalError | None:
    """The first bug check that ``text`` tells of whole, its four parameters and all; None without any.

    The text may have come in several prints; the line that names a driver is looked for behind it.
    """
    fatal = _FATAL.search(text)
    if fatal is None:
        return None
    code, *parameters = (int(value, 16) for value in fatal.groups())
    first, second, third, fourth = parameters
    blamed = _BLAMED.search(text, fatal.end())
    return FatalError(code, (first, second, third, fourth), blamed[1] if blamed else None)


def describe_bug_check(
    code: int, parameters: Sequence[int], where: Where, *, blamed: str | None = None
) -> list[str]:
    """What a bug check and its four parameters say, in words; nothing for those that are not known here.

    ``blamed`` is the file's name of the driver that the kernel names as its cause.
    """
    if len(parameters) != 4:
        return []
    if code & _MINIDUMP and code in BUG_CHECK_NAMES:
        code &= ~_MINIDUMP
    template = WORDS.get(code, "")
    if (kinds := KINDS.get(code)) is not None:
        template = kinds.templates.get(parameters[kinds.index], kinds.other)
    if code == 0xC4 and (rule := RULES.get(parameters[0])):
        template = f"the DDI compliance rule {rule} was violated"
    if not template:
        return []
    values = [_Parameter(value, where) for value in parameters]
    return [template.format(*values, blamed=blamed or "the driver")]


class _Parameter:
    """A parameter for the templates of ``bug_check_words``."""

    def __init__(self, value: int, where: Where) -> None:
        self._value = value
        self._where = where

    def __format__(self, form: str) -> str:
        value = self._value
        told = f"0x{value:X}"
        match form:
            case "d":
                return str(value)
            case "at":
                return self._where(value) or told
            case "memory":
                return f"{told} (likely a null pointer)" if value < _NULL_PAGE else told
            case "access":
                return ACCESSES.get(value, f"access {told}")
            case "fault":
                return FAULTS.get(value, f"access {told}")
            case "irql":
                return f"{value} ({IRQLS[value]})" if value in IRQLS else told
            case "status":
                return str(NTSTATUS(value & 0xFFFFFFFF))
            case "pool":
                return ("nonpaged", "paged")[value] if value < 2 else f"type {told}"
            case "tag":
                tag = (value & 0xFFFFFFFF & ~_PROTECTED_POOL).to_bytes(4, "little")
                return repr(tag)[1:]
            case _:
                return told
