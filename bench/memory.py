"""The memory of this process, by proc(5)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

MEBIBYTE: Final = 1 << 20


def forget_peak() -> int:
    """The bytes that this process has in memory now, from which its peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return _field("VmRSS")


def peak() -> int:
    """The most bytes that it had since."""
    return _field("VmHWM")


def _field(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)
