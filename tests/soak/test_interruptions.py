"""Ctrl-C, or kill -9, at any moment of a run: nothing is left after the next run, or ``kdriver gc``."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.soak.cache_watch import ROOT, CacheWatch, interrupt, kill, private_cache

SEED: Final = 20260

CLEANED_UP: Final = 30.0
"""Seconds that an interrupted run may take to end; a hang of the inner tests has its end in it."""

_DRIVERS = """
import pytest
from pytest_kdriver import DriverTimeout

@pytest.mark.kdriver("hello")
def test_starts(kdriver):
    for cycle in kdriver.cycle(3):
        assert cycle.lines == ["Hello, world!", "Bye bye!"]

@pytest.mark.kdriver("panics")
@pytest.mark.xfail(strict=True)
def test_crashes(kdriver):
    kdriver.start()

@pytest.mark.kdriver("stubborn", parameters={"How": "slow-init", "Busy": 1, "Seconds": 60}, timeout=0.5)
def test_hangs(kdriver):
    with pytest.raises(DriverTimeout):
        kdriver.start()

@pytest.mark.kdriver("leaks", leaks="allow")
def test_leaks(kdriver):
    with kdriver.running():
        pass
"""

_NEXT = """
import pytest

@pytest.mark.kdriver("hello")
def test_starts(kdriver):
    with kdriver.running():
        pass
"""


class Inner:
    """A small project of a user's, and how long its tests take when nobody disturbs them."""

    def __init__(self, folder: Path, cache: CacheWatch) -> None:
        self.cache = cache
        self.project = folder / "project"
        self.next = folder / "next"
        for project, tests in ((self.project, _DRIVERS), (self.next, _NEXT)):
            project.mkdir()
            (project / "kdriver.toml").write_text(f'manifest = "{ROOT}/drivers/Cargo.toml"\n')
            (project / "pytest.ini").write_text("[pytest]\n")
            (project / "test_drivers.py").write_text(tests)
        (self.project / "test_more_drivers.py").write_text(_NEXT)

    @functools.cached_property
    def length(self) -> float:
        """The seconds that a run takes when everything is cached."""
        self.run_next()
        return self.undisturbed()

    def undisturbed(self) -> float:
        """Run to the end; the seconds."""
        begin = time.monotonic()
        process = self.cache.start_pytest(self.project)
        code = self.cache.wait(process, 300)
        assert code == 0, self.output()
        assert not self.cache.left_behind()
        return time.monotonic() - begin

    def output(self) -> str:
        return (self.project / "output").read_text(errors="replace")

    def run_next(self) -> None:
        process = self.cache.start_pytest(self.next)
        assert self.cache.wait(process, 120) == 0, (self.next / "output").read_text()


@pytest.fixture(scope="module")
def inner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inner]:
    with private_cache() as cache:
        yield Inner(tmp_path_factory.mktemp("inner"), cache)


Tell = Callable[[str], None]


@pytest.mark.parametrize("count", [3, pytest.param(50, marks=pytest.mark.soak)])
def test_nothing_is_left_after_ctrl_c(inner: Inner, tell: Tell, count: int) -> None:
    moments = random.Random(SEED)
    clean, slowest = 0, 0.0
    for number in range(count):
        moment = moments.uniform(0, inner.length)
        process = inner.cache.start_pytest(inner.project)
        if inner.cache.wait(process, moment) is None:
            interrupt(process)
        interrupted = time.monotonic()
        code = inner.cache.wait(process, CLEANED_UP)
        told = f"interrupt {number} after {moment:.3f} s"
        if code is None:
            kill(process)
            process.wait()
            pytest.fail(f"{told}: still there {CLEANED_UP} s later:\n{inner.output()}")
        slowest = max(slowest, time.monotonic() - interrupted)
        clean += not inner.cache.left_behind()
        _next_run_or_gc(inner, number, told)
    tell(
        f"{count} x SIGINT within {inner.length:.1f} s: nothing left; {clean} left nothing by themselves; "
        f"the slowest was gone after {slowest:.1f} s"
    )


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.soak)])
def test_nothing_is_left_after_kill_9(inner: Inner, tell: Tell, count: int) -> None:
    moments = random.Random(SEED + 1)
    for number in range(count):
        moment = moments.uniform(0, inner.length)
        process = inner.cache.start_pytest(inner.project)
        inner.cache.wait(process, moment)
        kill(process)
        process.wait()
        _next_run_or_gc(inner, number, f"kill {number} after {moment:.3f} s")
    tell(f"{count} x SIGKILL within {inner.length:.1f} s: nothing left")


def _next_run_or_gc(inner: Inner, number: int, told: str) -> None:
    said = ""
    if number % 2:
        inner.run_next()
    else:
        said = inner.cache.collect_garbage()
    left = inner.cache.left_behind()
    assert not left, f"{told}: {left}\n{said}\n{inner.output()}"


@pytest.mark.soak
@pytest.mark.parametrize("strike", [interrupt, kill], ids=["SIGINT", "SIGKILL"])
def test_nothing_is_left_of_a_template_half_made(
    tmp_path: Path, tell: Tell, strike: Callable[..., None]
) -> None:
    count = 6
    moments = random.Random(SEED + 2)
    with private_cache(shared=("programs",)) as cache:
        inner = Inner(tmp_path, cache)
        for _ in range(count):
            moment = moments.uniform(0.3, 6)
            process = cache.start_pytest(inner.project)
            if cache.wait(process, moment) is None:
                strike(process)
            assert cache.wait(process, CLEANED_UP) is not None, moment
            said = cache.collect_garbage()
            left = cache.left_behind()
            assert not left, f"after {moment:.3f} s: {left}\n{said}\n{inner.output()}"
        inner.undisturbed()
    tell(f"{count} x while the template is made: nothing left, and the next run makes it")
