"""From an offset in a driver's image to its source: what a view is handed, and never makes itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from pytest_kdriver.source_frame import SourceFrame


class Symbolizer(Protocol):
    """What knows the source of one image."""

    @property
    def problem(self) -> str | None:
        """Why it knows nothing, as half a sentence; None where it does."""
        ...

    def locate(self, offset: int) -> tuple[SourceFrame, ...]:
        """The source of the instruction that has its first, or any other, byte at ``offset``.

        ``offset`` counts from the image's base. The innermost inlined function comes first, the
        function that the instruction lies in last; () where nothing is known. A return address is the
        *next* instruction's, which may be another line's: the call's is ``locate(offset - 1)``.
        """
        ...


LoadSymbols: TypeAlias = Callable[[], Symbolizer]
"""Gives what knows the source of the driver's image. Called only where a line is wanted; it may take long."""
