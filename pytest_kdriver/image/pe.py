"""What a driver's file says of itself: the few facts of its PE header that a target needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pytest_kdriver.errors import ImageError


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """Where things are in an image, once it is loaded: offsets from its base, and sizes, in bytes."""

    entry: int
    size: int


def read_layout(path: Path) -> ImageLayout:
    """The layout of the PE file ``path``. Raises ``ImageError`` for anything else."""
    import pefile

    try:
        with pefile.PE(str(path), fast_load=True) as image:
            header = image.OPTIONAL_HEADER
            return ImageLayout(entry=header.AddressOfEntryPoint, size=header.SizeOfImage)
    except FileNotFoundError as error:
        raise ImageError(f"there is no {path}") from error
    except (OSError, pefile.PEFormatError, AttributeError) as error:
        raise ImageError(f"{path} is no Windows image: {error}") from error
