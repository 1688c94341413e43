"""From ``pytest`` to the first DriverEntry, everything cached."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.figure import Figure, median
from bench.floor_program import floor_executable
from bench.guest import MANIFEST, bare_prefix, plain_environment

RUNS = 7

_TEST = """
import os
from pathlib import Path
import pytest
from pytest_kdriver.kernel.events import DriverInitCalled

@pytest.mark.kdriver("hello")
def test_starts(kdriver):
    with kdriver.running():
        called = next(kdriver.window.of(DriverInitCalled))
    Path(os.environ["BENCH_ANSWER"]).write_text(repr(called.time))
"""


def measure() -> list[Figure]:
    """Events are stamped by the clock that all processes share."""
    values, floors = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test_inner.py").write_text(_TEST)
        (folder / "kdriver.toml").write_text(f'vm = "wine"\nmanifest = "{MANIFEST}"\n')
        (folder / "pytest.ini").write_text("[pytest]\n")
        _first_driver(folder)  # whatever is not cached yet
        for _ in range(RUNS):
            values.append(_first_driver(folder))
            floors.append(_bare_python() + _first_program())
    return [
        Figure(
            name="first driver",
            value=median(values),
            unit="s",
            floor=median(floors),
            limit=2.5,
            note=f"from the start of pytest to the first DriverEntry; median of {RUNS}. Floor: pytest "
            "--version, then the first program of a cold clone",
        )
    ]


def _first_driver(folder: Path) -> float:
    answer = folder / "answer"
    answer.unlink(missing_ok=True)
    begin = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--kdriver-vm", "wine"],
        cwd=folder,
        env=plain_environment() | {"BENCH_ANSWER": str(answer)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return float(answer.read_text()) - begin


def _bare_python() -> float:
    begin = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "pytest", "--version"],
        env=plain_environment(),
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.monotonic() - begin


def _first_program() -> float:
    program = floor_executable()
    with bare_prefix() as prefix:
        begin = time.monotonic()
        prefix.run(program)
        return time.monotonic() - begin
