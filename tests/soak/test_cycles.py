"""A thousand starts and stops leave nothing behind, and five hundred tell no line late."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.handle import TargetHandle
from pytest_kdriver.image.finder import ImageFinder
from pytest_kdriver.targets import prefix
from pytest_kdriver.targets.wine import WineTarget
from tests.soak.cache_watch import CacheWatch, private_cache

MANIFEST = Path(__file__).parents[2] / "drivers" / "Cargo.toml"
HELLO, BYE = "Hello, world!", "Bye bye!"
LINGERS = 10.0
"""Seconds that a stopped driver's process may take to go; one or two, as Wine does it, on an idle host."""


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[CacheWatch]:
    with private_cache() as watch:
        monkeypatch.setenv("KDRIVER_CACHE", str(watch.path))
        yield watch
        assert not watch.left_behind()


@pytest.fixture
def target(cache: CacheWatch) -> Iterator[WineTarget]:
    target = WineTarget(TargetConfig(name="wine", kind="wine"))
    target.start()
    yield target
    target.close()


@pytest.fixture
def handle(target: WineTarget) -> TargetHandle:
    return TargetHandle(target, ImageFinder(MANIFEST.parent, MANIFEST))


Tell = Callable[[str], None]


class Holdings:
    """What this process, and the target's prefix, hold at a moment."""

    def __init__(self, target: WineTarget) -> None:
        gc.collect()
        self.memory = _resident_bytes()
        self.descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
        self.threads = threading.active_count()
        self.processes = len(prefix.processes(target.prefix))
        self.files = sum(len(names) for _, _, names in os.walk(target.prefix))

    def counts(self) -> tuple[int, int, int]:
        return self.descriptors, self.threads, self.files


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _settled(target: WineTarget, processes: int) -> Holdings:
    deadline = time.monotonic() + LINGERS
    while len(prefix.processes(target.prefix)) > processes and time.monotonic() < deadline:
        time.sleep(0.1)
    return Holdings(target)


@pytest.mark.parametrize(
    ("warm_up", "count"), [(10, 40), pytest.param(100, 1000, marks=pytest.mark.soak)]
)
def test_cycles_leave_nothing(
    target: WineTarget,
    handle: TargetHandle,
    warm_up: int,
    count: int,
    tell: Tell,
) -> None:
    idle = len(prefix.processes(target.prefix))
    with handle.driver("hello") as driver:
        driver.cycle(warm_up)
        before = _settled(target, idle)
        begin = time.monotonic()
        for _ in range(count):
            (result,) = driver.cycle(1)
            assert result.lines == [HELLO, BYE]
        seconds = time.monotonic() - begin
        after = _settled(target, idle)
    grown = (after.memory - before.memory) / 1e6
    tell(
        f"{count} cycles in {seconds:.1f} s: memory {grown:+.2f} MB; descriptors, threads, files "
        f"{before.counts()} -> {after.counts()}; processes {before.processes} -> {after.processes}"
    )
    assert grown < 10
    assert after.counts() == before.counts()
    # An idle prefix has one more or less of Wine's own, whose coming and going is not ours.
    assert after.processes <= max(idle, before.processes)


@pytest.mark.parametrize("count", [10, pytest.param(500, marks=pytest.mark.soak)])
def test_what_was_printed_is_there_at_once(handle: TargetHandle, tell: Tell, count: int) -> None:
    for _ in range(count):
        with handle.driver("hello") as driver:
            with driver.running():
                assert driver.dbgprint.lines == [HELLO]
            assert driver.dbgprint.lines == [HELLO, BYE]
    tell(f"{count} times lines == [...] right after running(): no flake")
