"""Whether a tag's pool grows with each cycle of a driver, whatever others do with it meanwhile.

What others hold goes up and down; what leaked stays. So those cycles are counted that the counter never falls
back behind again: to what it was before them, or below. How many there are by mere chance is known. In a walk
whose steps go up as often as down by as much, whatever their sizes, n steps have m moments that nothing later
undercuts, the end being one, with the probability C(2n - m + 1, n) / 2^(2n - m + 1) (S. N. Majumdar and R. M.
Ziff, "Universal record statistics of random walks and Levy flights", 2008: backwards in time such a moment is
a record). That holds for steps that are never alike; with others, and in a counter that tends to come back to
some level, there are fewer. A burst of others costs the cycles that it lasts for. A steady growth of another
driver's with the same tag looks the same as a leak.

How much a cycle leaves is the median over pairs of cycles that are half the cycles apart (Theil's incomplete
method, 1950): a quarter of them may be anything.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Final

from pytest_kdriver.kernel.pool_tags import Amount, Key, shown

CERTAIN: Final = 0.99
"""At such a confidence growth is no chance: 9 of 10 cycles, 14 of 20, 34 of 100 leave the level for good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolGrowth:
    """How much each cycle left of one tag and pool type.

    ``blocks`` and ``size``, in bytes, are for one cycle. ``stayed`` is in how many of ``cycles`` the pool
    grew for good; ``confidence`` is one less the probability of so many by chance.
    """

    tag: str
    pool_type: str
    blocks: float
    size: float
    stayed: int
    cycles: int
    confidence: float

    @property
    def certain(self) -> bool:
        """Whether the driver leaks, so that no noise explains it."""
        return self.blocks > 0 and self.confidence >= CERTAIN

    def __str__(self) -> str:
        return (
            f"{self.blocks:g} blocks and {self.size:g} bytes a cycle, tag {self.tag!r}  {self.pool_type}  "
            f"(in {self.stayed} of {self.cycles} cycles for good; confidence {100 * self.confidence:.2f} %)"
        )


def growth(
    cycles: Sequence[Mapping[Key, Amount]], *, shared: Collection[bytes]
) -> tuple[PoolGrowth, ...]:
    """What each cycle leaves, by what each of ``cycles`` left; the surest first.

    ``shared`` are the tags that others use too. What is left of another is no chance, and its mean is told.
    Tags that never changed are left out.
    """
    keys = dict.fromkeys(key for cycle in cycles for key, amount in cycle.items() if any(amount))
    found = [
        _growth(key, [cycle.get(key, (0, 0)) for cycle in cycles], noisy=key[0] in shared)
        for key in keys
    ]
    return tuple(sorted(found, key=lambda one: (-one.confidence, -one.blocks)))


def _growth(key: Key, left: Sequence[Amount], *, noisy: bool) -> PoolGrowth:
    blocks = list(accumulate((amount[0] for amount in left), initial=0))
    sizes = list(accumulate((amount[1] for amount in left), initial=0))
    stayed = _never_undercut(blocks)
    return PoolGrowth(
        tag=shown(key[0]),
        pool_type=key[1],
        blocks=_slope(blocks) if noisy else blocks[-1] / len(left),
        size=_slope(sizes) if noisy else sizes[-1] / len(left),
        stayed=stayed,
        cycles=len(left),
        confidence=1 - chance(stayed, len(left)) if noisy else 1.0,
    )


def _never_undercut(levels: Sequence[int]) -> int:
    """In how many steps a level is left for good."""
    lowest: float = math.inf
    count = -1  # the end is no step
    for level in reversed(levels):
        if level < lowest:
            lowest = level
            count += 1
    return count


def chance(stayed: int, steps: int) -> float:
    """The probability that a walk by chance leaves its level for good in at least ``stayed`` of its steps."""
    exponent = 2 * steps - stayed
    term = math.comb(exponent, steps) / (1 << exponent)
    total = 0.0
    for moments in range(stayed + 1, steps + 2):
        total += term
        term *= 2 * (steps - moments + 1) / (2 * steps - moments + 1)
    return min(total, 1.0)


def _slope(levels: Sequence[int]) -> float:
    apart = max(len(levels) // 2, 1)
    return median(_rises(levels, apart)) / apart


def _rises(levels: Sequence[int], apart: int) -> Iterable[int]:
    return (later - earlier for earlier, later in zip(levels, levels[apart:], strict=False))
