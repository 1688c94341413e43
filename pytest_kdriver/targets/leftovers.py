"""How each kind of thing that runs leave behind is removed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets import prefix
from pytest_kdriver.targets.runs import Remover

SPILL: Final = "spilled-kernel-log"


def remove_file(path: Path) -> None:
    """Remove a file, if it is there."""
    with suppress(OSError):  # its folder may be gone, or never have been one
        path.unlink()


def _remove_prefix(path: Path) -> None:
    with suppress(TargetError):
        prefix.remove(path)


REMOVERS: Final[dict[str, Remover]] = {prefix.RESOURCE: _remove_prefix, SPILL: remove_file}
