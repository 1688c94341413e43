"""Where the PDB that belongs to an image may be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

from pytest_kdriver.errors import ImageError
from pytest_kdriver.image.pe import read_image


def pdb_candidates(image: Path) -> tuple[Path, ...]:
    """Beside ``image``, by its name and by the one that it gives; and where it says. There need be none."""
    return tuple(dict.fromkeys(_candidates(image)))


def _candidates(image: Path) -> Iterator[Path]:
    yield image.with_suffix(".pdb")
    named = _named(image)
    if named:
        name = PureWindowsPath(named).name
        if name:  # a path may be a folder's alone
            yield image.with_name(name)
        if Path(named).is_absolute():
            yield Path(named)


def _named(image: Path) -> str | None:
    """The path in the image's CodeView record."""
    try:
        return read_image(image).pdb_path()
    except ImageError:
        return None
