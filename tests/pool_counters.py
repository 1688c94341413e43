"""What a kernel answers for SystemPoolTagInformation, by the offsets in phnt's ntexapi.h."""

from __future__ import annotations

import struct

Counters = tuple[int, int, int]
"""Allocations, frees, and bytes in use."""


def entry(tag: bytes, paged: Counters = (0, 0, 0), non_paged: Counters = (0, 0, 0)) -> bytes:
    """SYSTEM_POOLTAG of x64."""
    data = bytearray(40)
    struct.pack_into("<4sII", data, 0, tag, *paged[:2])
    struct.pack_into("<Q", data, 16, paged[2])
    struct.pack_into("<IIQ", data, 24, *non_paged)
    return bytes(data)


def information(*entries: bytes) -> bytes:
    """SYSTEM_POOLTAG_INFORMATION of x64."""
    return struct.pack("<I", len(entries)).ljust(8, b"\0") + b"".join(entries)
