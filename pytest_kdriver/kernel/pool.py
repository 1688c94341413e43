"""The pool view of a window: what a driver allocated, what is left, and who allocated it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from pytest_kdriver.kernel.events import (
    DriverInitCalled,
    ImageLoaded,
    PoolAllocated,
    PoolFreed,
)
from pytest_kdriver.kernel.log import Window


@dataclass(frozen=True, slots=True)
class Frame:
    """A place in the guest's code: ``offset`` bytes into ``image``, or from 0 where ``image`` is None.

    ``address`` is where that was; the same place of another load is an equal frame.
    """

    address: int = field(compare=False)
    image: str | None
    offset: int

    def __str__(self) -> str:
        return f"{self.image}+0x{self.offset:X}" if self.image else f"0x{self.address:X}"


@dataclass(frozen=True, slots=True)
class Caller:
    """A call stack, innermost frame first."""

    frames: tuple[Frame, ...]

    def __str__(self) -> str:
        return str(self.frames[0]) if self.frames else "unknown"


@dataclass(frozen=True, slots=True)
class PoolUse:
    """``count`` blocks, ``size`` bytes in all, of one tag and pool type, allocated by one caller."""

    tag: str
    size: int
    count: int
    pool_type: str
    caller: Caller

    def __str__(self) -> str:
        return (
            f"{_blocks(self.count, width=6):13}  {self.size:10} bytes  tag {self.tag!r}  "
            f"{self.pool_type}  from {self.caller}"
        )


class PoolUses(Sequence[PoolUse]):
    """Pool uses, the largest first. Empty is false."""

    def __init__(self, uses: Iterable[PoolUse] = ()) -> None:
        self._uses = tuple(uses)

    @property
    def total_size(self) -> int:
        """Bytes in all."""
        return sum(use.size for use in self._uses)

    @property
    def total_count(self) -> int:
        """Blocks in all."""
        return sum(use.count for use in self._uses)

    @overload
    def __getitem__(self, index: int) -> PoolUse: ...
    @overload
    def __getitem__(self, index: slice) -> PoolUses: ...
    def __getitem__(self, index: int | slice) -> PoolUse | PoolUses:
        """One use, or some of them."""
        return PoolUses(self._uses[index]) if isinstance(index, slice) else self._uses[index]

    def __len__(self) -> int:
        return len(self._uses)

    def __iter__(self) -> Iterator[PoolUse]:
        return iter(self._uses)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PoolUses):
            return self._uses == other._uses
        return list(self._uses) == other if isinstance(other, list) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # equal to lists, which have none

    def __repr__(self) -> str:
        return f"PoolUses({list(self._uses)!r})"

    def __str__(self) -> str:
        return "\n".join(map(str, self._uses)) or "nothing"


@dataclass(frozen=True, slots=True)
class WrongFree:
    """A block that was freed twice (``allocated_tag`` None), or with another tag than its own."""

    address: int
    tag: str | None
    allocated_tag: str | None
    caller: Caller

    def __str__(self) -> str:
        if self.allocated_tag is None:
            return f"0x{self.address:X} freed twice, the second time from {self.caller}"
        return (
            f"0x{self.address:X} with tag {self.allocated_tag!r} "
            f"freed with tag {self.tag!r} from {self.caller}"
        )


@dataclass(frozen=True, slots=True)
class _Balance:
    """What a window comes to."""

    left: PoolUses
    allocated: PoolUses
    double_frees: tuple[WrongFree, ...]
    wrong_tags: tuple[WrongFree, ...]


class Pool:
    """What a driver did with the pool in a window.

    Only calls that come from the driver's own image count. With ``tags``, only blocks with one of them.
    ``refuse`` raises where the view can't be had; it is asked before each look, with True where the
    answer would be wrong while the driver is loaded.
    """

    def __init__(
        self,
        window: Window,
        *,
        driver: str,
        tags: Collection[str] = (),
        refuse: Callable[[bool], None],
    ) -> None:
        self._window = window
        self._driver = driver
        self._tags = frozenset(tags)
        self._refuse = refuse
        self._given_up: list[int] = []

    def give_up(self) -> None:
        """What is in use now went with a guest, or a process, that ended: no later start leaked it."""
        self._given_up.append(self._window.stop)

    @property
    def leaked(self) -> PoolUses:
        """What was allocated and is not freed, now that the driver is not loaded any more."""
        self._refuse(True)
        return self._balance().left

    @property
    def in_use(self) -> PoolUses:
        """What is allocated and not freed at this moment."""
        self._refuse(False)
        return self._balance().left

    @property
    def allocated(self) -> PoolUses:
        """All that was ever allocated, freed or not."""
        self._refuse(False)
        return self._balance().allocated

    @property
    def double_frees(self) -> tuple[WrongFree, ...]:
        """Frees of blocks that were free already, in order."""
        self._refuse(False)
        return self._balance().double_frees

    @property
    def wrong_tags(self) -> tuple[WrongFree, ...]:
        """Frees with another tag than the block's own, in order."""
        self._refuse(False)
        return self._balance().wrong_tags

    def problems(self, *, leaks: bool, start: int | None = None) -> str:
        """The double frees, frees with a wrong tag and, with ``leaks``, the leaks, as a table for a person.

        "" for none. ``start``: only what came from this log position on.
        """
        self._refuse(True)
        balance = self._balance(start)
        parts = []
        if balance.left and leaks:
            left = balance.left
            parts.append(f"{_blocks(left.total_count)}, {left.total_size} bytes leaked:\n{left}")
        if balance.double_frees:
            parts.append("freed twice:\n" + "\n".join(map(str, balance.double_frees)))
        if balance.wrong_tags:
            parts.append("freed with a wrong tag:\n" + "\n".join(map(str, balance.wrong_tags)))
        return "\n".join(parts)

    def _balance(self, start: int | None = None) -> _Balance:
        images = _Images(self._window, self._driver)
        live: dict[int, PoolAllocated] = {}
        freed: dict[int, PoolAllocated] = {}
        lost: list[PoolAllocated] = []
        ever: list[PoolAllocated] = []
        double_frees: list[WrongFree] = []
        wrong_tags: list[WrongFree] = []
        begin = self._window.start
        for position, event in self._window.numbered(start):
            if event.driver != self._driver:
                continue
            if isinstance(event, DriverInitCalled):
                if not any(begin < at <= position for at in self._given_up):
                    lost += live.values()
                live, freed, begin = {}, {}, position
                images.begin(event)
            elif isinstance(event, PoolAllocated) and images.own(event.caller):
                live[event.address] = event
                freed.pop(event.address, None)
                ever.append(event)
            elif isinstance(event, PoolFreed):
                block = live.pop(event.address, None)
                if block is not None:
                    freed[event.address] = block
                    wrong = event.tag is not None and event.tag != block.tag
                    if wrong and self._counts(block):
                        wrong_tags.append(images.wrong_free(event, block.tag))
                elif (
                    not event.found
                    and event.address in freed
                    and self._counts(freed[event.address])
                ):
                    double_frees.append(images.wrong_free(event, None))
        return _Balance(
            self._grouped([*lost, *live.values()], images),
            self._grouped(ever, images),
            tuple(double_frees),
            tuple(wrong_tags),
        )

    def _counts(self, block: PoolAllocated) -> bool:
        return not self._tags or _tag(block.tag) in self._tags

    def _grouped(self, blocks: Iterable[PoolAllocated], images: _Images) -> PoolUses:
        groups: dict[tuple[str, str, Caller], list[int]] = {}
        for block in blocks:
            if not self._counts(block):
                continue
            key = (_tag(block.tag), block.pool_type, images.caller(block.caller))
            groups.setdefault(key, []).append(block.size)
        uses = [
            PoolUse(tag, sum(sizes), len(sizes), pool_type, caller)
            for (tag, pool_type, caller), sizes in groups.items()
        ]
        return PoolUses(sorted(uses, key=lambda use: -use.size))


class _Images:
    """Where the driver's image lay, load by load."""

    def __init__(self, window: Window, driver: str) -> None:
        self._loaded = [event for event in window.of(ImageLoaded) if event.driver == driver]
        self._current: ImageLoaded | None = self._loaded[0] if self._loaded else None

    def begin(self, init: DriverInitCalled) -> None:
        """A load: the image that the entry point lies in is the one that counts."""
        fitting = [i for i in self._loaded if i.base <= init.entry < i.base + i.size]
        self._current = fitting[0] if fitting else None

    def own(self, address: int) -> bool:
        image = self._current
        return image is None or image.base <= address < image.base + image.size

    def caller(self, address: int) -> Caller:
        """The same place in the same image is the same caller, wherever the image was loaded."""
        for image in self._loaded:
            if image.base <= address < image.base + image.size:
                return Caller((Frame(address, image.driver, address - image.base),))
        return Caller((Frame(address, None, address),))

    def wrong_free(self, event: PoolFreed, allocated_tag: bytes | None) -> WrongFree:
        return WrongFree(
            event.address,
            _tag(event.tag) if event.tag is not None else None,
            _tag(allocated_tag) if allocated_tag is not None else None,
            self.caller(event.caller),
        )


def _blocks(count: int, width: int = 0) -> str:
    return f"{count:{width}} block{'' if count == 1 else 's'}"


def _tag(tag: bytes) -> str:
    """A tag as poolmon shows it: four characters, one a byte."""
    return tag.rstrip(b"\0").decode("latin-1")
