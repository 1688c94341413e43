"""The images of a kernel, as it tells of them to its debugger."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right, insort
from typing import Final, NamedTuple

MOST_IMAGES: Final = 4096
"""The first ones are forgotten behind that. A Windows loads a few hundred."""

_KERNEL: Final = re.compile(r"nt(?:oskrnl|k\w*mp|krnlpa)|hal", re.IGNORECASE)
"""The stems of the kernel's own files. Breakpoints there stand for somebody who called."""


class KnownImage(NamedTuple):
    """An image from ``base`` up to ``end``. ``driver`` is the stem of its file's name."""

    base: int
    end: int
    driver: str
    path: str


class KnownImages:
    """What lies where, as far as it was told."""

    def __init__(self) -> None:
        self._images: dict[int, KnownImage] = {}
        self._bases: list[int] = []

    def __len__(self) -> int:
        return len(self._images)

    def clear(self) -> None:
        """Forget all."""
        self._images.clear()
        self._bases.clear()

    def load(self, base: int, size: int, path: str) -> KnownImage:
        """An image was loaded; what is known to lie there is gone."""
        image = KnownImage(base, base + size, stem(path), path)
        self.unload(base)
        while index := bisect_left(self._bases, image.end):
            other = self._images[self._bases[index - 1]]
            if other.end <= base:
                break
            self.unload(other.base)
        self._images[base] = image
        insort(self._bases, base)
        if len(self._images) > MOST_IMAGES:
            self.unload(next(iter(self._images)))
        return image

    def unload(self, base: int) -> KnownImage | None:
        """The image at ``base``, which is gone now; None where none was known."""
        image = self._images.pop(base, None)
        if image is not None:
            del self._bases[bisect_right(self._bases, base) - 1]
        return image

    def at(self, address: int) -> KnownImage | None:
        """The image that holds ``address``."""
        index = bisect_right(self._bases, address) - 1
        if index < 0:
            return None
        image = self._images[self._bases[index]]
        return image if address < image.end else None

    def driver_at(self, address: int) -> str | None:
        """The driver that holds ``address``; None in the kernel itself, and where nothing is known."""
        image = self.at(address)
        return None if image is None or _KERNEL.fullmatch(image.driver) else image.driver


def stem(path: str) -> str:
    r"""The file's name without its extension, of a path like ``\SystemRoot\system32\drivers\x.sys``."""
    name = re.split(r"[\\/]", path)[-1]
    return name.rpartition(".")[0] or name
