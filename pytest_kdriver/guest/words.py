"""What a guest says, on its way into an error: somebody's terminal will show it."""

from __future__ import annotations

import re
from typing import Final

LONGEST: Final = 4000
"""The most characters that are kept; it is said that there were more."""

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def words(text: str) -> str:
    r"""``text`` without what a terminal would act on, which is shown as ``\xNN``, and not without end."""
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}... and {len(text) - LONGEST} characters more"
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
