"""What a user is told besides what a command, or pytest, shows: progress, and what is not as it should be."""

from __future__ import annotations

import sys
from collections.abc import Callable


def _print(line: str) -> None:
    print(line, file=sys.__stderr__, flush=True)


_show: Callable[[str], object] = _print


def tell(text: str) -> None:
    """Tell it, in a line or more."""
    _show(f"kdriver: {text}")


def show_by(show: Callable[[str], object]) -> None:
    """Have ``show`` tell it from here on: pytest keeps to itself what is written while a test runs."""
    global _show  # noqa: PLW0603
    _show = show
