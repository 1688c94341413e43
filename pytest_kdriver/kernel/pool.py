"""The pool view of a window: what a driver allocated, what is left, and who allocated it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, overload

from pytest_kdriver.kernel.caller import Caller, Callers, Frame
from pytest_kdriver.kernel.events import (
    DriverInitCalled,
    ImageLoaded,
    PoolAllocated,
    PoolFreed,
    PoolStack,
)
from pytest_kdriver.kernel.images import Images, has
from pytest_kdriver.kernel.log import Window
from pytest_kdriver.kernel.pool_tags import SHARED, Amount, Key, Samples, shown
from pytest_kdriver.kernel.symbolizer import LoadSymbols

__all__ = ["Caller", "Frame", "Pool", "PoolUse", "PoolUses", "WrongFree"]

_LOOKED_AT: Final = (DriverInitCalled, PoolAllocated, PoolStack, PoolFreed)

_NO_STACK: Final = (
    "Where a crate stands for the line, its call alone is known: build the driver with the feature "
    "capture-stacks of windows-kernel-rs, and each block has its stack."
)

_NO_CALLER: Final = (
    "The kernel's counters name no caller, and count what the kernel adds to each block, too."
)


@dataclass(frozen=True, slots=True)
class PoolUse:
    """``count`` blocks, ``size`` bytes in all, of one tag and pool type, allocated by one caller."""

    tag: str
    size: int
    count: int
    pool_type: str
    caller: Caller

    def __str__(self) -> str:
        return self.describe()

    def describe(self, depth: int = 1) -> str:
        """The use as a line of a table, with ``depth`` of its caller's frames."""
        return (
            f"{_blocks(self.count, width=6):13}  {self.size:10} bytes  tag {self.tag!r}  "
            f"{self.pool_type}  from {self.caller.describe(depth)}"
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
        return "\n".join(self._lines()) or "nothing"

    def _lines(self) -> list[str]:
        """A line for each; where callers would read the same, more of their frames until they differ."""
        depths = [1] * len(self._uses)
        while True:
            places = [
                (use.tag, use.pool_type, use.caller.describe(depth))
                for use, depth in zip(self._uses, depths, strict=True)
            ]
            alike = Counter(places)
            deeper = [
                depth + (alike[place] > 1 and depth < len(use.caller.own_frames))
                for use, depth, place in zip(self._uses, depths, places, strict=True)
            ]
            if deeper == depths:
                return [use.describe(depth) for use, depth in zip(self._uses, depths, strict=True)]
            depths = deeper


@dataclass(frozen=True, slots=True)
class WrongFree:
    """A block that was freed twice (``allocated_tag`` None), or with another tag than its own.

    ``caller`` freed it then, ``allocated_by`` is who had allocated it.
    """

    address: int
    tag: str | None
    allocated_tag: str | None
    caller: Caller
    allocated_by: Caller

    def __str__(self) -> str:
        if self.allocated_tag is None:
            how = f"freed twice, the second time from {self.caller}"
        else:
            how = f"with tag {self.allocated_tag!r} freed with tag {self.tag!r} from {self.caller}"
        return f"0x{self.address:X} {how}; it was allocated from {self.allocated_by}"


@dataclass(slots=True)
class _Block:
    """A block, and its stack, innermost frame first; at first that is the allocating call alone.

    ``image`` is that of the load that the block was allocated in, and so freed in.
    """

    allocated: PoolAllocated
    image: ImageLoaded | None
    stack: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Balance:
    """What a window comes to: blocks, and frees with the block that each was of."""

    left: list[_Block] = field(default_factory=list)
    allocated: list[_Block] = field(default_factory=list)
    double_frees: list[tuple[PoolFreed, _Block]] = field(default_factory=list)
    wrong_tags: list[tuple[PoolFreed, _Block]] = field(default_factory=list)


class Pool:
    """What a driver did with the pool in a window.

    A window with a trace of the kernel's is judged by that: only calls that come from the driver's own
    image count, and with ``tags``, only blocks with one of them. One without is judged by the samples of the
    kernel's counters that it has (``PoolTags``): they tell what is left, and no more.
    ``load_symbols`` is called when a caller is to be shown, and names its function, file and line.
    ``refuse`` raises where the view can't be had; it is asked before each look, with True where the
    answer would be wrong while the driver is loaded.
    """

    def __init__(
        self,
        window: Window,
        *,
        driver: str,
        tags: Collection[str] = (),
        load_symbols: LoadSymbols | None = None,
        refuse: Callable[[bool], None],
    ) -> None:
        self._window = window
        self._load_symbols = load_symbols
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
        samples = self._samples()
        return _sampled(samples) if samples else self._uses(self._balance().left)

    @property
    def in_use(self) -> PoolUses:
        """What is allocated and not freed at this moment."""
        self._refuse(False)
        return self._uses(self._balance().left)

    @property
    def allocated(self) -> PoolUses:
        """All that was ever allocated, freed or not."""
        self._refuse(False)
        return self._uses(self._balance().allocated)

    @property
    def double_frees(self) -> tuple[WrongFree, ...]:
        """Frees of blocks that were free already, in order."""
        self._refuse(False)
        return self._wrong_frees(self._balance().double_frees, twice=True)

    @property
    def wrong_tags(self) -> tuple[WrongFree, ...]:
        """Frees with another tag than the block's own, in order."""
        self._refuse(False)
        return self._wrong_frees(self._balance().wrong_tags, twice=False)

    @property
    def left(self) -> dict[Key, Amount]:
        """What is left of each tag and pool type; by counters, negative where others freed more."""
        self._refuse(True)
        if samples := self._samples():
            return samples.left
        left: dict[Key, Amount] = {}
        for block in self._balance().left:
            key = (block.allocated.tag, block.allocated.pool_type)
            blocks, size = left.get(key, (0, 0))
            left[key] = (blocks + 1, size + block.allocated.size)
        return left

    @property
    def shared(self) -> frozenset[bytes]:
        """The tags whose blocks may be others' too."""
        if (samples := self._samples()) is None:
            return frozenset()
        return frozenset(tag for tag, _ in samples.left if _why_shared(samples, tag))

    def problems(self, *, leaks: bool, start: int | None = None) -> str:
        """The double frees, frees with a wrong tag and, with ``leaks``, the leaks, as a table for a person.

        "" for none. ``start``: only what came from this log position on.
        """
        self._refuse(True)
        samples = self._samples(start)
        if samples:
            return _problems_by(samples) if leaks else ""
        balance = self._balance(start)
        left = self._uses(balance.left) if leaks else PoolUses()
        double_frees = self._wrong_frees(balance.double_frees, twice=True)
        wrong_tags = self._wrong_frees(balance.wrong_tags, twice=False)
        parts = []
        if left:
            parts.append(_leaked(left))
        if double_frees:
            parts.append("freed twice:\n" + "\n".join(map(str, double_frees)))
        if wrong_tags:
            parts.append("freed with a wrong tag:\n" + "\n".join(map(str, wrong_tags)))
        if parts:
            parts += self._what_is_missing(left)
        return "\n".join(parts)

    def _what_is_missing(self, left: PoolUses) -> list[str]:
        """Why the table names no lines, where it does not."""
        problem = self._load_symbols().problem if self._load_symbols else None
        if problem:
            return [f"no file and line: {problem}"]
        lone = [use.caller for use in left if len({f.address for f in use.caller.frames}) == 1]
        in_crates = any(caller.frames[0].crate and not caller.own_frames for caller in lone)
        return [_NO_STACK] if in_crates else []

    def _samples(self, start: int | None = None) -> Samples | None:
        """The samples that judge the window; None where it has a trace, or where none were taken."""
        calls = self._window.of(DriverInitCalled, start)
        if any(event.driver == self._driver for event in calls):
            return None
        samples = Samples(self._window, self._driver, start)
        return samples if samples.taken else None

    def _balance(self, start: int | None = None) -> _Balance:
        images = Images(self._window, self._driver)
        image = images.at(self._window.start if start is None else start)
        live: dict[int, _Block] = {}
        freed: dict[int, _Block] = {}
        balance = _Balance()
        begin = self._window.start
        for position, event in self._window.numbered(start, _LOOKED_AT):
            if event.driver != self._driver:
                continue
            if isinstance(event, DriverInitCalled):
                if not any(begin < at <= position for at in self._given_up):
                    balance.left.extend(live.values())
                live, freed, begin = {}, {}, position
                image = images.at(position)
            elif isinstance(event, PoolAllocated) and (image is None or has(image, event.caller)):
                live.pop(event.address, None)
                freed.pop(event.address, None)
                if self._counts(event):
                    live[event.address] = _Block(event, image, (event.caller,))
                    balance.allocated.append(live[event.address])
            elif isinstance(event, PoolStack):
                if event.address in live and event.frames:
                    live[event.address].stack = event.frames
            elif isinstance(event, PoolFreed):
                block = live.pop(event.address, None)
                if block is not None:
                    freed[event.address] = block
                    if event.tag is not None and event.tag != block.allocated.tag:
                        balance.wrong_tags.append((event, block))
                elif not event.found and event.address in freed:
                    balance.double_frees.append((event, freed[event.address]))
        balance.left.extend(live.values())
        return balance

    def _counts(self, block: PoolAllocated) -> bool:
        return not self._tags or shown(block.tag) in self._tags

    def _uses(self, blocks: Iterable[_Block]) -> PoolUses:
        sizes: dict[tuple[bytes, str, ImageLoaded | None, tuple[int, ...]], list[int]] = {}
        for block in blocks:
            allocated = block.allocated
            alike = (allocated.tag, allocated.pool_type, block.image, block.stack)
            sizes.setdefault(alike, []).append(allocated.size)
        callers = Callers(self._load_symbols)
        groups: dict[tuple[str, str, Caller], list[int]] = {}
        for (tag, pool_type, image, stack), some in sizes.items():
            caller = callers.caller(image, stack)
            groups.setdefault((shown(tag), pool_type, caller), []).extend(some)
        uses = [
            PoolUse(tag, sum(some), len(some), pool_type, caller)
            for (tag, pool_type, caller), some in groups.items()
        ]
        return PoolUses(sorted(uses, key=lambda use: -use.size))

    def _wrong_frees(
        self, frees: Iterable[tuple[PoolFreed, _Block]], *, twice: bool
    ) -> tuple[WrongFree, ...]:
        callers = Callers(self._load_symbols)
        return tuple(
            WrongFree(
                event.address,
                shown(event.tag) if event.tag is not None else None,
                None if twice else shown(block.allocated.tag),
                callers.caller(block.image, (event.caller,)),
                callers.caller(block.image, block.stack),
            )
            for event, block in frees
        )


def _sampled(samples: Samples) -> PoolUses:
    uses = [
        PoolUse(shown(tag), size, blocks, pool_type, Caller(()))
        for (tag, pool_type), (blocks, size) in samples.left.items()
        if blocks > 0
    ]
    return PoolUses(sorted(uses, key=lambda use: -use.size))


def _problems_by(samples: Samples) -> str:
    left = _sampled(samples)
    if not left:
        return ""
    leaking = {use.tag for use in left}
    tags = sorted({tag for tag, _ in samples.left if shown(tag) in leaking})
    parts = [_leaked(left), _NO_CALLER]
    parts += [
        f"Tag {shown(tag)!r} may be others' as well: {why}. Where the driver has a tag that is its alone, "
        "name that: tags=; else see what many cycles leave: cycle(20).growth."
        for tag in tags
        if (why := _why_shared(samples, tag)) is not None
    ]
    if samples.unsettled:
        parts.append("The counters were still changing when they were read: others were at work.")
    return "\n".join(parts)


def _why_shared(samples: Samples, tag: bytes) -> str | None:
    if known := SHARED.get(shown(tag)):
        return known
    before = samples.there_before.get(tag, 0)
    return f"{_blocks(before)} had it before the first load" if before else None


def _leaked(left: PoolUses) -> str:
    return f"{_blocks(left.total_count)}, {left.total_size} bytes leaked:\n{left}"


def _blocks(count: int, width: int = 0) -> str:
    return f"{count:{width}} block{'' if count == 1 else 's'}"
