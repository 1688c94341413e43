"""A prefix cloned, and a guest restored after a crash."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

from bench.figure import Figure, median
from bench.floor_program import floor_executable
from bench.guest import bare_prefix, driver_image, wine_target
from pytest_kdriver.driver import Driver
from pytest_kdriver.errors import DriverCrashed
from pytest_kdriver.paths import cache_directory
from pytest_kdriver.targets import prefix
from pytest_kdriver.targets.runs import Run

RUNS = 7
_MEGABYTE = 1_000_000


def measure() -> list[Figure]:
    """Time and space of a clone; and how long after a crash the next driver can be started."""
    clones, copies, sizes = _clones()
    restored, first_programs = _restores()
    return [
        Figure(
            name="clone",
            value=median(clones),
            unit="s",
            floor=median(copies),
            limit=0.5,
            note=f"of the template prefix; median of {RUNS}. Floor: cp -al",
        ),
        Figure(
            name="clone, space",
            value=max(sizes) / _MEGABYTE,
            unit="MB",
            limit=20,
            note="what it takes on the disk beside the template",
        ),
        Figure(
            name="restore",
            value=median(restored),
            unit="s",
            floor=median(first_programs),
            limit=2.5,
            note=f"after a crash, until a driver can be started again; median of {RUNS}. Floor: the first "
            "program of a cold clone",
        ),
    ]


def _clones() -> tuple[list[float], list[float], list[int]]:
    clones, copies, sizes = [], [], []
    run = Run()
    try:
        template = prefix.template(prefix.find_wine(), run)
        with tempfile.TemporaryDirectory(dir=cache_directory(), prefix="bench-") as folder:
            for number in range(RUNS):
                path = Path(folder, f"clone-{number}")
                begin = time.perf_counter()
                prefix.clone(template, path)
                clones.append(time.perf_counter() - begin)
                sizes.append(_own_size(path))
                begin = time.perf_counter()
                subprocess.run(["cp", "-al", template, f"{path}-linked"], check=True)
                copies.append(time.perf_counter() - begin)
    finally:
        run.close()
    return clones, copies, sizes


def _own_size(folder: Path) -> int:
    """The bytes on the disk that are ``folder``'s alone."""
    total = 0
    for path, _, names in os.walk(folder):
        for entry in (path, *(os.path.join(path, name) for name in names)):  # noqa: PTH118
            status = Path(entry).lstat()
            if entry == path or status.st_nlink == 1:
                total += status.st_blocks * 512
    return total


def _restores() -> tuple[list[float], list[float]]:
    restored, first_programs = [], []
    program = floor_executable()
    with wine_target() as target:
        for _ in range(RUNS):
            driver = Driver(target, driver_image("panics"), name="panics")
            try:
                driver.start()
            except DriverCrashed:
                begin = time.perf_counter()
                target.repair()
                restored.append(time.perf_counter() - begin)
            with bare_prefix() as bare:
                begin = time.perf_counter()
                bare.run(program)
                first_programs.append(time.perf_counter() - begin)
    return restored, first_programs
