"""Bug checks: their names, and the text by which a kernel tells a debugger of one."""

from __future__ import annotations

import re
from typing import NamedTuple

from pytest_kdriver.kernel.bug_check_names import BUG_CHECK_NAMES

_FATAL = re.compile(
    r"\*\*\* Fatal System Error: 0x([0-9a-f]{1,8})\s{0,64}"
    r"\(\s{0,8}0x([0-9a-f]{1,16})\s{0,8},\s{0,8}0x([0-9a-f]{1,16})\s{0,8},"
    r"\s{0,8}0x([0-9a-f]{1,16})\s{0,8},\s{0,8}0x([0-9a-f]{1,16})\s{0,8}\)",
    re.IGNORECASE,
)
_BLAMED = re.compile(r"Driver at fault: ([^\x00-\x1f]{1,256}?)\.?[ \t\r]{0,8}(?:\n|\Z)")
"""Both as ReactOS prints them, ntoskrnl/ke/bug.c; a Windows has CR LF as its line's end."""


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
