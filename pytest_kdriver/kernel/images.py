"""Where a driver's image lay in a window, load by load."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace

from pytest_kdriver.kernel.events import DriverInitCalled, ImageLoaded
from pytest_kdriver.kernel.log import Window


class Images:
    """The loads of ``driver``'s image, as far as the window tells of them.

    Loads may overlap one another, so an address means nothing without the moment that it is from.
    """

    def __init__(self, window: Window, driver: str) -> None:
        entries: list[int | None] = []
        self._positions: list[int] = []
        self._images: list[ImageLoaded | None] = []
        for position, event in window.numbered(None, (DriverInitCalled, ImageLoaded)):
            if event.driver != driver:
                continue
            if isinstance(event, DriverInitCalled):
                entries.append(event.entry)
                self._positions.append(position)
                self._images.append(None)
            elif isinstance(event, ImageLoaded) and event.path:  # told when its load begins
                entries.append(None)
                self._positions.append(position)
                self._images.append(event)
            elif isinstance(event, ImageLoaded) and entries:  # told when its load is over
                self._images[-1] = event
        loads = list(zip(entries, self._images, strict=True))
        known = next(((entry, image) for entry, image in loads if entry and image), None)
        if known is not None:  # a load that never came back, for one: the same image elsewhere
            entry, one = known
            self._images = [
                image or replace(one, base=one.base + called - entry) if called else image
                for called, image in loads
            ]

    def at(self, position: int) -> ImageLoaded | None:
        """The image of the load that log position ``position`` is of; None where that is not known."""
        load = bisect_right(self._positions, position) - 1
        return self._images[load] if load >= 0 else None


def has(image: ImageLoaded, address: int) -> bool:
    """Whether ``address`` lies in ``image``."""
    return image.base <= address < image.base + image.size
