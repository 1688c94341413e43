"""From an offset in a driver's image to its source: what a view is handed, and never makes itself."""

from __future__ import annotations

from typing import Protocol

from pytest_kdriver.source_frame import SourceFrame


class Symbolizer(Protocol):
    """What knows the source of one image."""

    def locate(self, offset: int) -> tuple[SourceFrame, ...]:
        """The source of the instruction that has its first, or any other, byte at ``offset``.

        ``offset`` counts from the image's base. The innermost inlined function comes first, the
        function that the instruction lies in last; () where nothing is known. A return address is the
        *next* instruction's, which may be another line's: the call's is ``locate(offset - 1)``.
        """
        ...
