"""The kernel's counters of its pool: the layout, the differences, and a window that is judged by them."""

from __future__ import annotations

import itertools
import math
import random
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kdriver.errors import KernelLogError
from pytest_kdriver.kernel.events import (
    DebugPrint,
    DriverInitCalled,
    Event,
    ImageLoaded,
    PoolAllocated,
    PoolFreed,
    PoolTags,
    PoolTagUse,
)
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.kernel.pool import Pool, PoolUse
from pytest_kdriver.kernel.pool_growth import PoolGrowth, chance, growth
from pytest_kdriver.kernel.pool_tags import decode, difference
from tests.pool_counters import Counters, entry, information
from tests.unit.test_kd_replay import replay

RUST = (b"rust", "NonPaged")
BASE = 0x180000000


def rust(blocks: int, size: int = 48) -> tuple[PoolTagUse, ...]:
    return (PoolTagUse(*RUST, blocks, blocks * size),)


class TestLayout:
    def test_has_paged_and_non_paged_counters_of_each_tag(self) -> None:
        data = information(
            entry(b"Irp ", (9, 9, 0), (7, 2, 5000)), entry(b"hell", (10, 4, 600), (1, 0, 1 << 40))
        )
        assert decode(data, {"hell"}) == (
            PoolTagUse(b"hell", "NonPaged", 1, 1 << 40),
            PoolTagUse(b"hell", "Paged", 6, 600),
        )

    def test_a_tag_that_the_kernel_never_saw_has_none(self) -> None:
        assert decode(information(entry(b"hell")), {"rust"}) == ()

    def test_a_tag_is_its_four_characters_with_spaces_and_without_zeros(self) -> None:
        data = information(entry(b"ab  ", (1, 0, 16)), entry(b"ab\0\0", (2, 0, 32)))
        assert [use.blocks for use in decode(data, {"ab  "})] == [0, 1]
        assert [use.blocks for use in decode(data, {"ab"})] == [0, 2]

    def test_counters_wrap(self) -> None:
        (_, paged) = decode(information(entry(b"rust", (2, 0xFFFFFFFF, 144))), {"rust"})
        assert paged == PoolTagUse(b"rust", "Paged", 3, 144)

    def test_a_tag_that_stands_there_twice_is_counted_once_and_again(self) -> None:
        (_, paged) = decode(
            information(entry(b"rust", (3, 1, 9)), entry(b"rust", (1, 0, 1))), {"rust"}
        )
        assert (paged.blocks, paged.size) == (3, 10)

    def test_what_stands_behind_is_not_looked_at(self) -> None:
        data = information(entry(b"rust", (1, 0, 48)))
        assert decode(data + bytes(99), {"rust"}) == decode(data, {"rust"})

    @pytest.mark.parametrize(
        ("data", "told"),
        [
            (b"", "0 bytes are no pool tag"),
            (bytes(7), "7 bytes"),
            (information(entry(b"rust"))[:-1], "47 bytes can't have 1 tags"),
            (b"\xff" * 48, "can't have 4294967295 tags"),
        ],
    )
    def test_nonsense_is_refused(self, data: bytes, told: str) -> None:
        with pytest.raises(KernelLogError, match=told):
            decode(data, {"rust"})

    @given(st.binary(max_size=200), st.integers(0, 6))
    def test_whatever_comes_is_counters_or_refused(self, data: bytes, count: int) -> None:
        try:
            uses = decode(
                struct.pack("<I", count) + data, {data[4:8].rstrip(b"\0").decode("latin-1")}
            )
        except KernelLogError:
            assert 4 + len(data) < 8 + 40 * count
        else:
            assert all(0 <= use.blocks < 1 << 32 and 0 <= use.size < 1 << 64 for use in uses)


class TestDifference:
    def test_is_modulo_the_counters_width(self) -> None:
        before = [PoolTagUse(b"rust", "Paged", 0xFFFFFFFF, (1 << 64) - 10)]
        after = [PoolTagUse(b"rust", "Paged", 2, 38)]
        assert difference(before, after) == {(b"rust", "Paged"): (3, 48)}
        assert difference(after, before) == {(b"rust", "Paged"): (-3, -48)}

    def test_what_is_not_there_is_none(self) -> None:
        assert difference([], rust(2)) == {RUST: (2, 96)}
        assert difference(rust(2), []) == {RUST: (-2, -96)}

    @given(st.integers(0, 2**32 - 1), st.integers(-(2**31), 2**31 - 1))
    def test_finds_what_was_added(self, begin: int, added: int) -> None:
        before = [PoolTagUse(*RUST, begin, 0)]
        after = [PoolTagUse(*RUST, (begin + added) % 2**32, 0)]
        assert difference(before, after)[RUST][0] == added


def sample(
    moment: Literal["before", "after"], *uses: PoolTagUse, driver: str = "a", settled: bool = True
) -> PoolTags:
    return PoolTags(0.0, driver, moment, uses, settled)


def cycle(before: int, after: int) -> list[PoolTags]:
    return [sample("before", *rust(before)), sample("after", *rust(after))]


def pool(*events: Event) -> Pool:
    log = KernelLog()
    window = log.window("a")
    log.append(events)
    return Pool(window, driver="a", refuse=lambda _: None)


class TestAView:
    def test_tells_what_a_load_left_with_its_tag_and_no_caller(self) -> None:
        view = pool(sample("before"), sample("after", PoolTagUse(b"mine", "Paged", 2, 96)))
        (use,) = view.leaked
        assert (use.tag, use.count, use.size, use.pool_type) == ("mine", 2, 96, "Paged")
        assert not use.caller.frames
        assert view.problems(leaks=True).splitlines() == [
            "2 blocks, 96 bytes leaked:",
            "     2 blocks          96 bytes  tag 'mine'  Paged  from unknown",
            "The kernel's counters name no caller, and count what the kernel adds to each block, too.",
        ]
        assert view.problems(leaks=False) == ""
        assert view.left == {(b"mine", "Paged"): (2, 96)}
        assert view.shared == set()

    def test_finds_nothing_where_the_counters_came_back(self) -> None:
        view = pool(*cycle(7, 7))
        assert not view.leaked
        assert view.problems(leaks=True) == ""

    def test_adds_up_its_loads_and_takes_off_what_came_back_later(self) -> None:
        assert pool(*cycle(0, 2), *cycle(2, 5)).leaked.total_count == 5
        assert not pool(*cycle(0, 2), *cycle(2, 0)).leaked
        assert pool(*cycle(3, 1)).left == {RUST: (-2, -96)}

    def test_leaves_out_what_came_between_its_loads(self) -> None:
        assert pool(*cycle(0, 1), *cycle(50, 51)).leaked.total_count == 2

    def test_leaves_out_a_load_that_its_guest_did_not_outlive(self) -> None:
        view = pool(sample("before", *rust(9)), *cycle(0, 1))
        assert view.leaked.total_count == 1

    def test_leaves_out_another_driver_s_samples(self) -> None:
        log = KernelLog()
        log.append([sample("before"), sample("after", *rust(3), driver="b"), sample("after")])
        view = Pool(log.window(None, 0), driver="a", refuse=lambda _: None)
        assert not view.leaked

    def test_judges_what_came_from_a_position_on(self) -> None:
        view = pool(*cycle(0, 1), *cycle(1, 3))
        assert "2 blocks, 96 bytes leaked" in view.problems(leaks=True, start=2)
        assert view.problems(leaks=True, start=4) == ""

    def test_says_of_a_known_tag_that_others_have_it(self) -> None:
        told = pool(sample("before"), sample("after", *rust(1))).problems(leaks=True)
        assert "Tag 'rust' may be others' as well: every driver with Microsoft's wdk-alloc" in told

    def test_says_of_any_tag_that_there_were_blocks_before(self) -> None:
        before, after = (PoolTagUse(b"File", "NonPaged", n, n) for n in (800, 801))
        view = pool(sample("before", before), sample("after", after))
        assert "'File' may be others' as well: 800 blocks had it before the" in view.problems(
            leaks=True
        )
        assert view.shared == {b"File"}

    def test_says_nothing_of_a_shared_tag_that_left_nothing(self) -> None:
        mine = PoolTagUse(b"mine", "Paged", 1, 16)
        view = pool(sample("before", *rust(5)), sample("after", *rust(5), mine))
        assert "rust" not in view.problems(leaks=True)

    def test_says_that_counters_did_not_settle(self) -> None:
        view = pool(sample("before"), sample("after", *rust(1), settled=False))
        assert "were still changing" in view.problems(leaks=True)

    def test_goes_by_a_trace_where_there_is_one(self) -> None:
        view = pool(DriverInitCalled(0.0, "a", 1, BASE), *cycle(0, 1))
        assert not view.leaked
        assert view.shared == set()


class KernelPool:
    """A pool that is traced, and counted as well: 16 bytes for each block more, as an x64 kernel's."""

    def __init__(self) -> None:
        self.trace: list[Event] = []
        self._blocks: dict[int, tuple[bytes, int]] = {}
        self._allocated: dict[bytes, int] = {}
        self._freed: dict[bytes, int] = {}

    def allocate(self, tag: bytes, size: int) -> None:
        address = len(self.trace)
        self._blocks[address] = (tag, size + 16)
        self._allocated[tag] = self._allocated.get(tag, 0) + 1
        self.trace.append(PoolAllocated(0.0, "a", address, size, tag, "PagedPool", BASE + 1))

    def free(self, index: int) -> None:
        if self._blocks:
            address = list(self._blocks)[index % len(self._blocks)]
            tag, _ = self._blocks.pop(address)
            self._freed[tag] = self._freed.get(tag, 0) + 1
            self.trace.append(PoolFreed(0.0, "a", address, tag, BASE + 2, True))

    def information(self) -> bytes:
        return information(
            *(
                entry(tag, (count, self._freed.get(tag, 0), self._used(tag)))
                for tag, count in self._allocated.items()
            )
        )

    def _used(self, tag: bytes) -> int:
        return sum(size for of, size in self._blocks.values() if of == tag)


TAGS = (b"aaaa", b"bbbb")
CALLS = st.lists(
    st.tuples(st.sampled_from(TAGS), st.integers(1, 5000)) | st.integers(0, 99), max_size=30
)


def by_tag(uses: Iterable[PoolUse]) -> dict[str, tuple[int, int]]:
    return {use.tag: (use.count, use.size) for use in uses}


@given(CALLS, CALLS)
def test_trace_and_counters_of_the_same_pool_say_the_same(
    first: list[tuple[bytes, int] | int], second: list[tuple[bytes, int] | int]
) -> None:
    traced: list[Event] = [DriverInitCalled(0, "a", 1, BASE), ImageLoaded(0, "a", BASE, 0x1000)]
    counted: list[Event] = []
    kernel = KernelPool()
    for calls in (first, second):
        tags = {tag.decode() for tag in TAGS}
        counted.append(sample("before", *decode(kernel.information(), tags)))
        for call in calls:
            if isinstance(call, int):
                kernel.free(call)
            else:
                kernel.allocate(*call)
        counted.append(sample("after", *decode(kernel.information(), tags)))
    by_trace = by_tag(pool(*traced, *kernel.trace).leaked)
    by_counters = by_tag(pool(*counted).leaked)
    assert by_counters == {
        tag: (count, size + 16 * count) for tag, (count, size) in by_trace.items()
    }


PRINTED = re.compile(
    r"AGENT pooltag rust (\w+): (?:not found|"
    r"np allocs=(\d+) frees=(\d+) used=(\d+) paged allocs=(\d+) frees=(\d+) used=(\d+))"
)


def recorded() -> list[tuple[str, tuple[PoolTagUse, ...]]]:
    """The counters that a program on a real NT kernel printed, and when; a driver leaks 20 bytes a load."""
    found = []
    for event in replay("boot-load-unload")[0]:
        if isinstance(event, DebugPrint) and (match := PRINTED.match(event.text)):
            moment, *numbers = match.groups()
            entries = [] if numbers[0] is None else [entry(b"rust", *_counters(numbers))]
            found.append((moment, decode(information(*entries), {"rust"})))
    return found


def _counters(numbers: list[str]) -> tuple[Counters, Counters]:
    allocated, freed, used, *paged = map(int, numbers)
    return (paged[0], paged[1], paged[2]), (allocated, freed, used)


def test_a_real_kernel_s_counters_tell_of_each_load_s_block() -> None:
    samples = recorded()
    assert [moment for moment, _ in samples] == [
        *("before", "loaded", "unloaded", "loaded", "unloaded", "loaded", "unloaded", "end")
    ]
    gone = [uses for moment, uses in samples if moment != "loaded"]
    assert gone[0] == ()
    loads = [
        (sample("before", *before), sample("after", *after))
        for before, after in itertools.pairwise(gone)  # the last ones have a load between them, too
    ]
    view = pool(*itertools.chain(*loads))
    (use,) = view.leaked
    assert (use.tag, use.pool_type, use.count, use.size) == ("rust", "NonPaged", 4, 192)
    (found,) = growth([pool(*load).left for load in loads], shared=view.shared)
    assert (found.blocks, found.size, found.stayed, found.cycles) == (1, 48, 4, 4)


# growth


def grown(levels: list[int], *, noisy: bool = True) -> PoolGrowth | None:
    """What cycles are found to leave, by the counter before the first and behind each."""
    cycles = [{RUST: (b - a, 48 * (b - a))} for a, b in itertools.pairwise(levels)]
    found = growth(cycles, shared={RUST[0]} if noisy else ())
    return found[0] if found else None


def leaking(levels: list[int], blocks: int = 1) -> list[int]:
    return [level + blocks * number for number, level in enumerate(levels)]


def is_certain(levels: list[int]) -> bool:
    found = grown(levels)
    return found is not None and found.certain


def bursts(seed: int, cycles: int, *, often: float = 0.1, long: int = 1) -> list[int]:
    """Others have some blocks, and now and then up to 50 more, for ``long`` cycles at most."""
    rng = random.Random(seed)
    levels: list[int] = []
    while len(levels) <= cycles:
        if rng.random() < often:
            levels += [900 + rng.randint(1, 50)] * rng.randint(1, long)
        else:
            levels.append(900)
    return levels[: cycles + 1]


def wanders(seed: int, cycles: int) -> list[int]:
    """Others take and give as it comes, and nothing pulls them back."""
    rng = random.Random(seed)
    steps = (rng.choice((-7, -1, -1, 0, 1, 1, 7)) for _ in range(cycles))
    return list(itertools.accumulate(steps, initial=900))


def fluctuates(seed: int, cycles: int) -> list[int]:
    rng = random.Random(seed)
    return [round(rng.gauss(900, 5)) for _ in range(cycles + 1)]


def saws(seed: int, cycles: int) -> list[int]:
    """Others keep what they free for a while, and free it all at once."""
    tooth = 4 + seed % 8
    return [900 + (number + seed) % tooth for number in range(cycles + 1)]


def grows_in_steps(seed: int, cycles: int) -> list[int]:
    """Others' caches grow, seldom, and for good."""
    rng = random.Random(seed)
    return list(
        itertools.accumulate((rng.choice((0,) * 7 + (30,)) for _ in range(cycles)), initial=9)
    )


class TestGrowth:
    def test_of_a_steady_leak_is_exact_and_certain(self) -> None:
        found = grown(leaking([900] * 21))
        assert found is not None
        assert (found.tag, found.pool_type, found.blocks, found.size) == ("rust", "NonPaged", 1, 48)
        assert (found.stayed, found.cycles, found.certain) == (20, 20, True)
        assert str(found) == (
            "1 blocks and 48 bytes a cycle, tag 'rust'  NonPaged  "
            "(in 20 of 20 cycles for good; confidence 100.00 %)"
        )

    def test_of_what_never_changed_is_none(self) -> None:
        assert grown([900] * 21) is None

    def test_finds_one_block_a_cycle_in_bursts(self) -> None:
        found = [grown(leaking(bursts(seed, 20))) for seed in range(1000)]
        assert sum(one is not None and one.certain for one in found) >= 995
        assert all(one is not None and one.blocks == pytest.approx(1, abs=0.5) for one in found)

    def test_finds_it_in_more_and_longer_bursts_by_more_cycles(self) -> None:
        levels = (bursts(seed, 50, often=0.15, long=2) for seed in range(300))
        assert all(is_certain(leaking(level)) for level in levels)

    @pytest.mark.parametrize("noise", [bursts, fluctuates, saws, grows_in_steps])
    def test_is_never_certain_of_a_driver_that_leaves_nothing(
        self, noise: Callable[[int, int], list[int]]
    ) -> None:
        assert not any(is_certain(noise(seed, 20)) for seed in range(1000))

    def test_is_as_seldom_wrong_as_it_says_where_the_counter_wanders(self) -> None:
        assert sum(is_certain(wanders(seed, 20)) for seed in range(1000)) <= 10

    def test_needs_more_than_a_few_cycles_in_a_shared_tag(self) -> None:
        assert not is_certain(leaking([900] * 4))

    def test_of_a_tag_of_the_driver_s_own_is_what_was_counted(self) -> None:
        found = grown([0, 0, 0, 1, 1], noisy=False)
        assert found is not None
        assert (found.blocks, found.size, found.certain) == (0.25, 12, True)

    def test_of_a_tag_that_shrinks_is_no_leak(self) -> None:
        found = grown([9, 8, 7, 6], noisy=False)
        assert found is not None
        assert (found.blocks, found.certain) == (-1, False)

    def test_tells_the_surest_first(self) -> None:
        noisy, mine = (b"Irp ", "NonPaged"), (b"mine", "Paged")
        found = growth([{noisy: (5, 500), mine: (1, 16)}], shared={b"Irp "})
        assert [one.tag for one in found] == ["mine", "Irp "]

    @pytest.mark.parametrize("steps", [1, 2, 5, 20, 100])
    def test_the_chance_is_a_distribution_s_tail(self, steps: int) -> None:
        terms = [
            math.comb(2 * steps - m + 1, steps) / 2 ** (2 * steps - m + 1)
            for m in range(1, steps + 2)
        ]
        assert sum(terms) == pytest.approx(1)
        for stayed in range(steps + 1):
            assert chance(stayed, steps) == pytest.approx(sum(terms[stayed:]))

    @pytest.mark.parametrize("alike", [False, True])
    def test_the_chance_is_what_walks_show(self, *, alike: bool) -> None:
        """Exactly, where no two steps are alike; where they are, so many cycles are rarer still."""
        rng = random.Random(7)
        steps, walks = 10, 10_000
        observed = Counter(
            found.stayed if (found := grown(walk(rng, steps, alike=alike))) is not None else 0
            for _ in range(walks)
        )
        for stayed in range(1, steps + 1):
            seen = sum(observed[count] for count in range(stayed, steps + 1)) / walks
            expected = chance(stayed, steps)
            error = 4 * math.sqrt(expected / walks)
            assert seen < expected + error
            assert alike or seen > expected - error


def walk(rng: random.Random, steps: int, *, alike: bool) -> list[int]:
    sizes = (
        (rng.choice((-1, 0, 1)) if alike else rng.randint(-(10**9), 10**9)) for _ in range(steps)
    )
    return list(itertools.accumulate(sizes, initial=0))
