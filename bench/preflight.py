"""Pre-flight of a large image that imports much, against reading and hashing its file."""

from __future__ import annotations

import hashlib
import struct
import tempfile
import time
from pathlib import Path

from bench.figure import Figure, median
from bench.guest import bare_prefix
from pytest_kdriver.image.exports import KernelExports
from pytest_kdriver.image.pe import read_image
from pytest_kdriver.image.preflight import checksum, preflight
from tests.pe_builder import DATA, TEXT, Section, build

SIZE = 10_000_000
RUNS = 15
KERNEL = "ntoskrnl.exe"


def measure() -> list[Figure]:
    """Each time for a prefix that is new, so that its kernel's exports have to be read as well."""
    values, floors = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "large.sys")
        with bare_prefix() as bare:
            names = _exports(_windows(bare.path))
        _make_large(path, names)
        for _ in range(RUNS):
            with bare_prefix() as bare:
                kernel = KernelExports(_windows(bare.path), "Wine")
                begin = time.perf_counter()
                report = preflight(path, kernel)
                values.append(time.perf_counter() - begin)
            assert [str(finding.code) for finding in report.findings] == ["stub-import"]
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
            note=f"of an image with {SIZE // 1_000_000} MB of sections, a checksum and all {len(names):,} "
            f"exports of {KERNEL} as imports, by a kernel that was not looked at before; median of {RUNS}. "
            "Floor: reading the file and its SHA-256",
        )
    ]


def _windows(prefix: Path) -> Path:
    return prefix / "drive_c" / "windows"


def _exports(windows: Path) -> list[str]:
    kernel = KernelExports(windows, "Wine").module(KERNEL)
    assert kernel is not None
    return sorted(kernel.exports.ordinals)


def _make_large(path: Path, names: list[str]) -> None:
    """A driver that has code and data of the size, with a checksum that is right."""
    large = [
        Section(b"PAGE", b"\xcc" * (SIZE // 2), TEXT),
        Section(b".big", b"\xa5" * (SIZE // 2), DATA),
    ]
    path.write_bytes(build(imports={KERNEL: names}, sections=large, pointers=400))
    image = read_image(path)
    data, at = bytearray(image.data), image.checksum_offset
    struct.pack_into("<I", data, at, checksum(image.data, at))
    path.write_bytes(data)
