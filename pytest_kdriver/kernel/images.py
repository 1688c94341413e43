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
        calls: list[DriverInitCalled] = []
        self._positions: list[int] = []
        self._images: list[ImageLoaded | None] = []
        for position, event in window.numbered(None, (DriverInitCalled, ImageLoaded)):
            if event.driver != driver:
                continue
            if isinstance(event, DriverInitCalled):
                calls.append(event)
                self._positions.append(position)
                self._images.append(None)
            elif isinstance(event, ImageLoaded) and calls:  # told when its load is over
                self._images[-1] = event
        pairs = zip(calls, self._images, strict=True)
        known = next(((call, image) for call, image in pairs if image is not None), None)
        if known is not None:  # a load that never came back, for one: the same image elsewhere
            entry, one = known[0].entry, known[1]
            self._images = [
                image or replace(one, base=one.base + call.entry - entry)
                for call, image in zip(calls, self._images, strict=True)
            ]

    def at(self, position: int) -> ImageLoaded | None:
        """The image of the load that log position ``position`` is of; None where that is not known."""
        load = bisect_right(self._positions, position) - 1
        return self._images[load] if load >= 0 else None


def has(image: ImageLoaded, address: int) -> bool:
    """Whether ``address`` lies in ``image``."""
    return image.base <= address < image.base + image.size
