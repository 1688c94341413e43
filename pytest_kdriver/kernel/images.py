"""Where a driver's image lay in a window, load by load."""

from __future__ import annotations

from pytest_kdriver.kernel.events import DriverInitCalled, ImageLoaded
from pytest_kdriver.kernel.log import Window


class Images:
    """The loads of ``driver``'s image, as far as the window tells of them."""

    def __init__(self, window: Window, driver: str) -> None:
        self._loaded = [event for event in window.of(ImageLoaded) if event.driver == driver]
        self._current: ImageLoaded | None = self._loaded[0] if self._loaded else None

    def begin(self, init: DriverInitCalled) -> None:
        """A load: the image that the entry point lies in is the one that counts."""
        self._current = self.find(init.entry)

    def own(self, address: int) -> bool:
        """Whether ``address`` may lie in the image of the load that counts."""
        return self._current is None or _has(self._current, address)

    def find(self, address: int) -> ImageLoaded | None:
        """The load whose image ``address`` lies in."""
        return next((image for image in self._loaded if _has(image, address)), None)


def _has(image: ImageLoaded, address: int) -> bool:
    return image.base <= address < image.base + image.size
