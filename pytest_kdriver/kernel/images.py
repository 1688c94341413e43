"""Where a driver's image lay in a window, load by load."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace

from pytest_kdriver.kernel.events import DriverInitCalled, ImageLoaded, ImageUnloaded
from pytest_kdriver.kernel.log import KernelLog, Window


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


class Modules:
    """All images of the guest's kernel that a log tells of, as they lay at log position ``position``.

    Where images lay in the same place one after the other, the last one counts.
    """

    def __init__(self, log: KernelLog, position: int) -> None:
        loaded: dict[int, ImageLoaded] = {}
        for _, event in log.numbered(0, position, (ImageLoaded, ImageUnloaded)):
            if isinstance(event, ImageUnloaded):
                loaded.pop(event.base, None)
            elif isinstance(event, ImageLoaded) and event.path:
                for base in [base for base, other in loaded.items() if _overlap(other, event)]:
                    del loaded[base]  # the guest was put back to where it was not loaded yet
                loaded[event.base] = event
        self._bases = sorted(loaded)
        self._loaded = loaded

    def where(self, address: int) -> str | None:
        """An address as ``name+0x12``; None where no image lies there."""
        at = bisect_right(self._bases, address) - 1
        if at < 0 or not has(image := self._loaded[self._bases[at]], address):
            return None
        return f"{image.driver}+0x{address - image.base:X}"


def _overlap(one: ImageLoaded, other: ImageLoaded) -> bool:
    return one.base < other.base + other.size and other.base < one.base + one.size


def has(image: ImageLoaded, address: int) -> bool:
    """Whether ``address`` lies in ``image``."""
    return image.base <= address < image.base + image.size
