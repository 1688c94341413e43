"""The kernel's own counters of its pool, tag by tag, and what they say of a driver's loads.

They are what NtQuerySystemInformation gives for SystemPoolTagInformation; the layout is that of
SYSTEM_POOLTAG in phnt's ntexapi.h, for x64: a ULONG count, and from offset 8 on entries of 40 bytes. The
counts of allocations and frees have 32 bits and wrap. Not verified on Windows.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Collection
from typing import Final, TypeAlias

from pytest_kdriver.errors import KernelLogError
from pytest_kdriver.kernel.events import PoolTags, PoolTagUse
from pytest_kdriver.kernel.log import Window

SYSTEM_POOL_TAG_INFORMATION: Final = 22

SHARED: Final = {
    "rust": "every driver with Microsoft's wdk-alloc has it",
    "None": "what asks for no tag has it",
    "Ddk ": "ntddk.h gives it to what asks for none",
}
"""Tags that no driver has for itself."""

_ENTRIES: Final = 8
_ENTRY: Final = struct.Struct("<4sII4xQIIQ")

Key: TypeAlias = tuple[bytes, str]
"""A tag, and a pool type."""

Amount: TypeAlias = tuple[int, int]
"""Blocks and bytes; what went away is negative."""


def decode(data: bytes, tags: Collection[str]) -> tuple[PoolTagUse, ...]:
    """What SystemPoolTagInformation says of ``tags``, in order. Raises ``KernelLogError`` for nonsense."""
    if len(data) < _ENTRIES:
        raise KernelLogError(f"{len(data)} bytes are no pool tag information")
    (count,) = struct.unpack_from("<I", data)
    end = _ENTRIES + count * _ENTRY.size
    if end > len(data):
        raise KernelLogError(f"pool tag information of {len(data)} bytes can't have {count} tags")
    blocks: Counter[Key] = Counter()
    sizes: Counter[Key] = Counter()
    for entry in _ENTRY.iter_unpack(memoryview(data)[_ENTRIES:end]):
        tag, *numbers = entry
        if shown(tag) not in tags:
            continue
        for pool_type, (allocated, freed, size) in (
            ("Paged", numbers[:3]),
            ("NonPaged", numbers[3:]),
        ):
            blocks[tag, pool_type] += allocated - freed
            sizes[tag, pool_type] += size
    return tuple(
        PoolTagUse(*key, blocks[key] % (1 << 32), sizes[key] % (1 << 64)) for key in sorted(blocks)
    )


def difference(before: Collection[PoolTagUse], after: Collection[PoolTagUse]) -> dict[Key, Amount]:
    """By how much each tag grew, modulo the counters' width: to the nearest, so it may be negative."""
    begin = {(use.tag, use.pool_type): use for use in before}
    end = {(use.tag, use.pool_type): use for use in after}
    return {
        key: (
            _nearest(_blocks(end.get(key)) - _blocks(begin.get(key)), 32),
            _nearest(_size(end.get(key)) - _size(begin.get(key)), 64),
        )
        for key in {**begin, **end}
    }


class Samples:
    """The samples of ``driver``'s tags in a window: what its loads left, from position ``start`` on.

    A load that has no sample behind it, since its guest did not outlive it, counts for nothing.
    """

    def __init__(self, window: Window, driver: str, start: int | None = None) -> None:
        self.taken = False
        """Whether there are any."""
        self.unsettled = False
        self.left: dict[Key, Amount] = {}
        self.there_before: dict[bytes, int] = {}
        """The blocks of each tag that were there before the first load: earlier ones left them, or others."""
        before: PoolTags | None = None
        for sample in window.of(PoolTags, start):
            if sample.driver != driver:
                continue
            if not self.taken:
                self._note_first(sample)
            self.taken = True
            if sample.moment == "before":
                before = sample
            elif before is not None:
                self._add(before, sample)
                before = None

    def _note_first(self, sample: PoolTags) -> None:
        for use in sample.uses:
            self.there_before[use.tag] = self.there_before.get(use.tag, 0) + use.blocks

    def _add(self, before: PoolTags, after: PoolTags) -> None:
        self.unsettled |= not (before.settled and after.settled)
        for key, (blocks, size) in difference(before.uses, after.uses).items():
            more = self.left.get(key, (0, 0))
            self.left[key] = (more[0] + blocks, more[1] + size)


def shown(tag: bytes) -> str:
    """A tag as poolmon shows it: four characters, one a byte."""
    return tag.rstrip(b"\0").decode("latin-1")


def _nearest(number: int, bits: int) -> int:
    half = 1 << bits - 1
    return (number + half) % (1 << bits) - half


def _blocks(use: PoolTagUse | None) -> int:
    return 0 if use is None else use.blocks


def _size(use: PoolTagUse | None) -> int:
    return 0 if use is None else use.size
