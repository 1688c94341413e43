"""Pre-flight of a large image, against reading and hashing its file."""

from __future__ import annotations

import hashlib
import struct
import tempfile
import time
from pathlib import Path

from bench.figure import Figure, median
from bench.guest import bare_prefix, driver_image
from pytest_kdriver.image.exports import KernelExports
from pytest_kdriver.image.pe import read_image
from pytest_kdriver.image.preflight import checksum, preflight

SIZE = 10_000_000
RUNS = 15


def measure() -> list[Figure]:
    """Each time for a prefix that is new, so that its kernel's exports have to be read as well."""
    values, floors = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "large.sys")
        _make_large(path)
        for _ in range(RUNS):
            with bare_prefix() as bare:
                kernel = KernelExports(bare.path / "drive_c" / "windows", "Wine")
                begin = time.perf_counter()
                report = preflight(path, kernel)
                values.append(time.perf_counter() - begin)
            assert not report.findings
            begin = time.perf_counter()
            hashlib.sha256(path.read_bytes()).digest()
            floors.append(time.perf_counter() - begin)
    return [
        Figure(
            name="pre-flight",
            value=median(values) * 1000,
            unit="ms",
            floor=median(floors) * 1000,
            limit=100,
            note=f"of an image of {SIZE // 1_000_000} MB with a checksum, by the exports of a kernel that "
            f"was not looked at before; median of {RUNS}. Floor: reading the file and its SHA-256",
        )
    ]


def _make_large(path: Path) -> None:
    """A driver that is large by what is behind its sections, with a checksum that is right."""
    driver = read_image(driver_image("hello"))
    data = bytearray(driver.data.ljust(SIZE, b"\xa5"))
    at = driver.checksum_offset
    struct.pack_into("<I", data, at, checksum(bytes(data), at))
    path.write_bytes(data)
