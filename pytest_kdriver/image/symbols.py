"""Offsets in an image to functions, files and lines, by the debug information that belongs to it.

That is a PDB, as MSVC and LLVM's lld write it beside the image, or DWARF in sections of the image itself, as
mingw's gcc has it. Both are read by Sentry's ``symbolic``, inlined functions included.
"""

from __future__ import annotations

import atexit
import functools
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeAlias, cast

from pytest_kdriver.image.pdb import pdb_candidates
from pytest_kdriver.image.symcache import NO_SYMBOLS
from pytest_kdriver.source_frame import SourceFrame

READ_TIMEOUT: Final = 60.0
"""Seconds for reading the debug information; a PDB of 2 MB takes a fifth of one."""

_BRACKET: Final = re.compile(r"->|[<>(]")
"""What encloses types in a name, and an arrow, which does not."""


class _Location(Protocol):
    symbol: str
    full_path: str | None
    line: int


class _Table(Protocol):
    """What is used of ``symbolic.symcache.SymCache``, which has no types."""

    def lookup(self, addr: int, /) -> Sequence[_Location]: ...


@dataclass(frozen=True, slots=True)
class Symbols:
    """What is known of an image's source; ``problem`` says why it is nothing, None where it is something.

    Nobody constructs it: ``load_symbols`` does.
    """

    problem: str | None
    _table: _Table | None = None

    def locate(self, offset: int) -> tuple[SourceFrame, ...]:
        """See ``Symbolizer``: ``offset`` is an instruction's, and a call's is its return address less one."""
        if self._table is None or offset < 0:
            return ()
        return tuple(
            SourceFrame(_name(location.symbol), location.full_path, location.line or None)
            for location in self._table.lookup(offset)
        )


def load_symbols(image: Path) -> Symbols:
    """The symbols of ``image``, from itself or its PDB.

    The PDB is looked for beside the image, by the image's name and by the name that the image gives it, and
    at the path that the image gives; one of another build is not used. Raises nothing: what is missing, or
    broken, leaves the symbols without an answer, and ``problem`` says so. Those of the last few images are
    kept for as long as all these files stay the same; what failed for another reason is tried again.
    """
    stamp = _stamp(image)
    try:
        return _load(image, stamp, *map(_stamp, _pdb_candidates(image, stamp)))
    except _NotRead as reason:
        return Symbols(str(reason))


_Stamp: TypeAlias = tuple[int, int] | None
"""What changes when a file does; None where there is none."""


class _NotRead(Exception):
    """Why the reader did not come to an end, as a sentence. It says nothing about the files."""


@functools.lru_cache(maxsize=16)
def _pdb_candidates(image: Path, _stamp: _Stamp) -> tuple[Path, ...]:
    return pdb_candidates(image)


@functools.lru_cache(maxsize=16)
def _load(image: Path, *_stamps: _Stamp) -> Symbols:
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", f"{__package__}.symcache", image],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=READ_TIMEOUT,
            check=False,
        )
    except OSError as error:
        reason = f"{sys.executable}, which reads the symbols, does not run: {error.strerror}"
        raise _NotRead(reason) from error
    except subprocess.TimeoutExpired as error:
        reason = f"the debug information of {image} took more than {READ_TIMEOUT:g} s to read"
        raise _NotRead(reason) from error
    if done.returncode < 0:
        told = f"it brought its reader down (signal {-done.returncode})"
        return Symbols(f"the debug information of {image} is broken: {told}")
    said = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
    if done.returncode == NO_SYMBOLS:
        return Symbols(said)
    if done.returncode:
        _, _, told = said.partition(": ")  # behind the exception's name
        return Symbols(
            f"the debug information of {image} can't be read: its reader failed"
            + (f": {told}" if told else "")
        )
    from symbolic.symcache import SymCache

    table = SymCache.from_bytes(done.stdout)  # type: ignore[no-untyped-call]
    return Symbols(None, cast("_Table", table))


atexit.register(_load.cache_clear)  # symbolic's objects can't be freed once its modules are gone


def _stamp(path: Path) -> _Stamp:
    try:
        state = path.stat()
    except (OSError, ValueError):  # ValueError: a path that can't be one
        return None
    return state.st_mtime_ns, state.st_size


def _name(symbol: str) -> str:
    """A function's name without its parameters, which a PDB's have."""
    depth = 0
    for match in _BRACKET.finditer(symbol, 1):
        if match[0] == "(" and not depth:
            return symbol[: match.start()]
        depth += {"<": 1, ">": -1}.get(match[0], 0)
    return symbol
