"""A place in a driver's source, as its debug information names it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SourceFrame:
    """A function, and where in it; ``file`` and ``line`` are None where they are not known.

    ``file`` is the path that the compiler was given, on the machine that built the driver.
    """

    function: str
    file: str | None
    line: int | None
