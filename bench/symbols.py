"""Function, file and line of a thousand addresses; and what it costs a driver to tell who allocates."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from symbolic.debuginfo import Archive

from bench.figure import Figure, median
from bench.guest import MANIFEST, driver_image, wine_target
from pytest_kdriver.driver import Driver
from pytest_kdriver.image.pe import read_layout
from pytest_kdriver.image.symbols import load_symbols
from pytest_kdriver.targets.wine import WineTarget
from pytest_kdriver.toolchain import TARGET, find_toolchain

LOOK_UPS = 1000
LOOK_UP_RUNS = 9
BLOCKS = 20_000
BLOCK_RUNS = 5


def measure() -> list[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return [_look_ups(folder), _captures(folder)]


def _look_ups(folder: Path) -> Figure:
    image = driver_image("leaks")
    end = read_layout(image).size
    offsets = range(0x1000, end, (end - 0x1000) // LOOK_UPS)[:LOOK_UPS]
    values, floors = [], []
    for run in range(LOOK_UP_RUNS):
        copy = folder / f"leaks-{run}.sys"  # the symbols of one that was seen before are kept
        shutil.copy(image, copy)
        shutil.copy(image.with_suffix(".pdb"), copy.with_suffix(".pdb"))
        begin = time.perf_counter()
        symbols = load_symbols(copy)
        found = [symbols.locate(offset) for offset in offsets]
        values.append(time.perf_counter() - begin)
        assert any(found), symbols.problem
        begin = time.perf_counter()
        archive = Archive.open(str(copy.with_suffix(".pdb")))
        symcache = next(archive.iter_objects()).make_symcache()
        for offset in offsets:
            symcache.lookup(offset)  # type: ignore[no-untyped-call]
        floors.append(time.perf_counter() - begin)
    return Figure(
        name="symbols",
        value=median(values),
        unit="s",
        floor=median(floors),
        limit=1,
        note=f"{LOOK_UPS:,} look-ups in the PDB of leaks, loading included; median of {LOOK_UP_RUNS}. "
        "Floor: symbolic in the same process, which a broken PDB can bring down",
    )


def _captures(folder: Path) -> Figure:
    silent = _without_captures(folder)
    values, floors = [], []
    with wine_target() as target:
        for run in range(BLOCK_RUNS):
            values.append(_allocation(target, driver_image("leaks"), f"tells-{run}"))
            floors.append(_allocation(target, silent, f"silent-{run}"))
    return Figure(
        name="stack capture",
        value=median(values) * 1e6,
        unit="us",
        floor=median(floors) * 1e6,
        note=f"an allocation of leaks, seen in the pool view, of {BLOCKS:,} in one start; median of "
        f"{BLOCK_RUNS}, by turns. Floor: the same without the feature capture-stacks",
    )


def _allocation(target: WineTarget, image: Path, name: str) -> float:
    driver = Driver(target, image, name=name, parameters={"Blocks": BLOCKS}, leaks="allow")
    begin = time.perf_counter()
    driver.start()
    assert driver.pool.in_use.total_count >= BLOCKS
    seconds = time.perf_counter() - begin
    driver.stop()
    driver.finish()
    return seconds / BLOCKS


def _without_captures(folder: Path) -> Path:
    """The driver ``leaks`` as it is without the feature that the project's own builds switch on."""
    toolchain = find_toolchain()
    command = [toolchain.cargo, "rustc", "--manifest-path", str(MANIFEST), "--package", "leaks"]
    command += ["--lib", "--crate-type", "cdylib", "--target", TARGET, *toolchain.build_arguments]
    target_folder = folder / "target"
    subprocess.run(
        command,
        env={**toolchain.full_environment(), "CARGO_TARGET_DIR": str(target_folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )
    built = target_folder / TARGET / "debug" / "leaks.dll"
    shutil.copy(built.with_suffix(".pdb"), folder / "silent.pdb")
    return Path(shutil.copy(built, folder / "silent.sys"))
