"""``python -m pytest_kdriver.image.symcache IMAGE``: an image's debug information, ready to look up in.

A program, and not a function, since a broken PDB can end the process that reads it: Sentry's ``symbolic``,
which does, follows whatever circles are in there until its stack is full. It writes the look-up table, a
symcache, to its stdout. Where there is none it writes the reason to its stderr, and exits with 3.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pytest_kdriver.image.pdb import pdb_candidates

if TYPE_CHECKING:
    from symbolic.debuginfo import Object

MEMORY: Final = 8 << 30
"""Bytes of address space that reading may take, where it is not allowed less; the files are mapped."""

NO_SYMBOLS: Final = 3
"""The exit code that goes with a reason; Python's own, of a program that fails, is 1."""


class _NoSymbols(Exception):
    """Why there is nothing to look up in, as a sentence."""


def main() -> int:
    """Read the image that the command line names; the exit code."""
    image = Path(os.fsdecode(sys.argv[1]))
    _limit_memory()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    output = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # symbolic prints what astonishes it
    try:
        symcache = _symcache(image)
    except _NoSymbols as reason:
        print(reason, file=sys.stderr)
        return NO_SYMBOLS
    with open(output, "wb") as stdout:  # noqa: PTH123 -- a descriptor
        stdout.write(symcache)
    return 0


def _limit_memory() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _symcache(image: Path) -> bytes:
    try:
        from symbolic.exceptions import SymbolicError
        from symbolic.symcache import SymCache
    except (ImportError, OSError) as error:
        raise _NoSymbols(f"the Python package symbolic can't be loaded: {error}") from error
    try:
        symcache: SymCache = _debug_information(image).make_symcache()
        return bytes(symcache.open_stream().read())  # type: ignore[no-untyped-call]
    except SymbolicError as error:
        raise _NoSymbols(
            f"the debug information of {image} is broken: {_one_line(error)}"
        ) from error
    except MemoryError as error:
        raise _NoSymbols(
            f"the debug information of {image} needs more memory than there is to read"
        ) from error


def _debug_information(image: Path) -> Object:
    """The image itself, where it has DWARF, or its PDB."""
    driver = _open(image)
    if "debug" in driver.features:
        return driver
    candidates = pdb_candidates(image)
    found = [path for path in candidates if os.path.isfile(path)]  # noqa: PTH113 -- raises nothing
    if not found:
        raise _NoSymbols(
            f"{image.name} has no debug information, and there is no {candidates[0]}: "
            "build it with debug information"
        )
    for path in found:
        pdb = _open(path)
        if pdb.debug_id == driver.debug_id:
            return pdb
    raise _NoSymbols(
        f"{found[0]} is of another build than {image.name}: keep the two of one build together"
    )


def _open(path: Path) -> Object:
    """The first object in a file; a PE file and a PDB have one."""
    from symbolic.debuginfo import Archive
    from symbolic.exceptions import SymbolicError

    try:
        found = next(Archive.open(os.fsencode(path)).iter_objects(), None)
    except SymbolicError as error:
        raise _NoSymbols(f"{path} can't be read: {_one_line(error)}") from error
    if found is None:
        raise _NoSymbols(f"{path} has no code in it")
    return found


def _one_line(error: Exception) -> str:
    """What symbolic says, which puts each cause on a line of its own, and some twice."""
    causes = [line.strip().removeprefix("caused by: ") for line in str(error).splitlines()]
    return ": ".join(dict.fromkeys(causes))


if __name__ == "__main__":
    sys.exit(main())
