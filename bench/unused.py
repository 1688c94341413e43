"""What the plugin costs a project that has it installed and does not use it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.figure import Figure, Limited, median
from bench.guest import plain_environment

RUNS = 41
_OTHERS = ("-p", "no:hypothesispytest", "-p", "no:xdist")  # slow to import, in both


def measure() -> list[Figure]:
    """``pytest --collect-only`` of one trivial test with and without the plugin, by turns."""
    values, floors = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test_trivial.py").write_text("def test_nothing():\n    pass\n")
        (folder / "pytest.ini").write_text("[pytest]\n")
        _collect(folder)
        for _ in range(RUNS):
            floors.append(_collect(folder, "-p", "no:kdriver"))
            values.append(_collect(folder))
    return [
        Figure(
            name="unused plugin",
            value=median(values) * 1000,
            unit="ms",
            floor=median(floors) * 1000,
            limit=20,
            limited=Limited.EXCESS,
            note=f"pytest --collect-only of a trivial test; median of {RUNS}. Floor: -p no:kdriver",
        )
    ]


def _collect(folder: Path, *options: str) -> float:
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *_OTHERS, *options],
        cwd=folder,
        env=plain_environment(),
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - begin
