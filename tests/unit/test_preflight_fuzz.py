"""Files that nobody vouches for: whatever is in them, there is a report or an ImageError, and soon."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_kdriver.errors import ImageError
from pytest_kdriver.image import pe
from pytest_kdriver.image.exports import KernelExports
from pytest_kdriver.image.preflight import Guest, Report, preflight
from tests.pe_builder import (
    DATA,
    DIRECTORIES,
    FILE_HEADER,
    PAGE,
    SECTIONS,
    Section,
    build,
    build_module,
    patched,
)
from tests.signature_builder import CERTIFICATE, FIELD, pkcs7, with_signature

LIMIT = 2.0
"""Seconds of the processor's for one file; a good one takes a thousandth of that."""

IMAGE = patched(
    build(
        imports={"ntoskrnl.exe": ["DbgPrint", "Stub", "Elsewhere", 3], "odd.sys": ["Odd"]},
        sections=[
            Section(
                b".didat", struct.pack("<II", 1, 3 * PAGE + 64) + bytes(56) + b"later.sys", DATA
            )
        ],
        pointers=3,
    ),
    DIRECTORIES + 13 * 8,
    "<II",
    3 * PAGE,
    64,
)
SIGNED = with_signature(IMAGE)
SIGNATURE = len(IMAGE)
"""Where it begins in the file."""
MODULE = build_module("odd.sys", {"Odd": "", "Stub": None, "Elsewhere": "ntoskrnl.DbgPrint"})

Hostile = Callable[[bytes], Report | None]

mutations = st.lists(
    st.tuples(
        st.integers(0, 1 << 16),
        st.sampled_from(["<B", "<H", "<I", "<Q"]),
        st.one_of(
            st.integers(0, (1 << 64) - 1),
            st.sampled_from([0, 1, 0x7F, 0xFF, 0xFFFF, PAGE, 2 * PAGE, 1 << 31, (1 << 64) - 1]),
        ),
    ),
    min_size=1,
    max_size=8,
)

# Headers and tables are where damage tells: most offsets are drawn from there.
examples = settings(
    max_examples=800,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def kernel(tmp_path: Path) -> KernelExports:
    folder = tmp_path / "system32"
    folder.mkdir()
    exports = {"DbgPrint": "", "Stub": None, "Elsewhere": "odd.Odd"}
    (folder / "ntoskrnl.exe").write_bytes(build_module("ntoskrnl.exe", exports))
    (folder / "odd.sys").write_bytes(MODULE)
    return KernelExports(tmp_path, "Wine")


@pytest.fixture
def hostile(tmp_path: Path, kernel: KernelExports) -> Hostile:
    """Check a file on both guests; its report for Wine, None for what is no image."""
    path = tmp_path / "x.sys"

    def one(guest: Guest) -> Report | None:
        report = None
        begin = time.process_time()
        with suppress(ImageError):
            report = preflight(path, kernel, guest=guest)
        assert time.process_time() - begin < LIMIT
        assert str(report).replace("\n", "").isprintable()
        return report

    def hostile(data: bytes) -> Report | None:
        path.write_bytes(data)
        one("windows")
        return one("wine")

    return hostile


def mutated(image: bytes, changes: list[tuple[int, str, int]]) -> bytes:
    data = bytearray(image)
    for offset, layout, value in changes:
        size = struct.calcsize(layout)
        at = offset % (len(data) - size)
        struct.pack_into(layout, data, at, value & ((1 << 8 * size) - 1))
    return bytes(data)


class TestImage:
    @examples
    @given(changes=mutations)
    def test_with_other_bytes(self, hostile: Hostile, changes: list[tuple[int, str, int]]) -> None:
        hostile(mutated(IMAGE, changes))

    @examples
    @given(changes=mutations)
    def test_with_other_headers(
        self, hostile: Hostile, changes: list[tuple[int, str, int]]
    ) -> None:
        hostile(mutated(IMAGE[: SECTIONS + 160], changes) + IMAGE[SECTIONS + 160 :])

    @settings(examples, max_examples=300)
    @given(data=st.binary(max_size=2048))
    def test_of_any_bytes(self, hostile: Hostile, data: bytes) -> None:
        hostile(data)
        hostile(b"MZ" + data)

    def test_cut_anywhere(self, hostile: Hostile) -> None:
        for size in (*range(SECTIONS + 160), *range(SECTIONS + 160, len(IMAGE), 16)):
            report = hostile(IMAGE[:size])
            assert report is None or report.errors

    @pytest.mark.parametrize("field", range(0, FILE_HEADER - 0x80 + 260, 2))
    def test_with_a_header_s_field_at_its_limits(self, hostile: Hostile, field: int) -> None:
        for value in (0, 1, 0x7FFF, 0x8000, 0xFFFF):
            hostile(patched(IMAGE, 0x80 + field, "<H", value))


class TestSignature:
    @examples
    @given(changes=mutations)
    def test_with_other_bytes(self, hostile: Hostile, changes: list[tuple[int, str, int]]) -> None:
        hostile(SIGNED[:SIGNATURE] + mutated(SIGNED[SIGNATURE:], changes))

    @settings(examples, max_examples=300)
    @given(data=st.binary(max_size=512))
    def test_of_any_bytes(self, hostile: Hostile, data: bytes) -> None:
        hostile(with_signature(IMAGE, data))
        hostile(patched(IMAGE, FIELD, "<II", SIGNATURE, len(data)) + data)

    def test_cut_anywhere(self, hostile: Hostile) -> None:
        for size in range(SIGNATURE, len(SIGNED)):
            hostile(SIGNED[:size])
            hostile(patched(SIGNED[:size], FIELD, "<II", SIGNATURE, size - SIGNATURE))

    @pytest.mark.parametrize("which", range(2))
    def test_in_a_place_at_its_limits(self, hostile: Hostile, which: int) -> None:
        ends = (SIGNATURE, len(SIGNED), 1 << 31, 1 << 32)
        for value in (0, 1, 7, 8, FIELD, *(end + d for end in ends for d in (-8, -1, 0, 1))):
            hostile(patched(SIGNED, FIELD + 4 * which, "<I", value & 0xFFFFFFFF))

    def test_that_is_the_whole_image(self, hostile: Hostile) -> None:
        hostile(patched(IMAGE, FIELD, "<II", 0, len(IMAGE)))

    @pytest.mark.parametrize(
        "signature",
        [
            pytest.param(b"\x30\x00" * (2 << 20), id="many elements"),
            pytest.param(b"\x30\x83\x40\x00\x00" * (1 << 20), id="many elements in one another"),
            pytest.param(
                pkcs7(bytes(32), CERTIFICATE * 100_000),
                id="certificates that are too many",
            ),
        ],
    )
    def test_that_is_large(self, hostile: Hostile, signature: bytes) -> None:
        hostile(with_signature(IMAGE, signature))

    def test_in_a_table_of_many_entries(self, hostile: Hostile) -> None:
        table = struct.pack("<IHH", 8, 0x0200, 1) * (1 << 20)
        hostile(patched(IMAGE, FIELD, "<II", SIGNATURE, len(table)) + table)


class TestPathological:
    def test_as_many_imports_as_can_be_with_the_longest_names(self, hostile: Hostile) -> None:
        name = b"A" * (pe.MAX_NAME - 1) + b"\0"
        slots = struct.pack("<Q", 3 * PAGE) * (pe.MAX_IMPORTS - 2) + bytes(8)
        sections = [Section(b".name", b"\0\0" + name, DATA), Section(b".slots", slots, DATA)]
        image = build(imports={"ntoskrnl.exe": ["DbgPrint"]}, sections=sections)
        report = hostile(
            patched(image, pe.parse_image(image, Path()).sections[1].offset, "<I", 4 * PAGE)
        )
        assert report is not None
        assert [finding.code for finding in report.findings] == ["missing-import"]

    def test_as_many_modules_as_can_be(self, hostile: Hostile) -> None:
        empty = 3 * PAGE
        descriptors = struct.pack("<5I", empty, 0, 0, 4 * PAGE, empty) * (pe.MAX_MODULES - 1)
        sections = [
            Section(b".empty", b"", DATA),
            Section(b".names", b"ntoskrnl.exe\0", DATA),
            Section(b".idata", descriptors + bytes(20), DATA),
        ]
        image = patched(build(sections=sections), DIRECTORIES + 8, "<I", 5 * PAGE)
        report = hostile(image)
        assert report is not None
        assert report.findings == ()

    def test_tables_that_are_one_another(self, hostile: Hostile) -> None:
        at = 3 * PAGE
        circle = struct.pack("<I", at) * 3000
        image = build(sections=[Section(b".circle", circle, DATA)])
        report = hostile(patched(image, DIRECTORIES + 8, "<II", at, 20))
        assert report is not None
        assert [finding.code for finding in report.errors] == ["imports"]

    @pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0xFFFFF000])
    def test_sections_as_large_as_can_be(self, hostile: Hostile, size: int) -> None:
        report = hostile(patched(IMAGE, SECTIONS + 40 + 8, "<I", size))
        assert report is not None
        assert report.errors

    def test_a_large_file_of_nothing(self, hostile: Hostile) -> None:
        assert hostile(b"MZ" + bytes(8 << 20)) is None


class TestModuleOfTheKernel:
    @settings(examples, max_examples=500)
    @given(changes=mutations)
    def test_with_other_bytes(
        self, hostile: Hostile, kernel: KernelExports, changes: list[tuple[int, str, int]]
    ) -> None:
        path = kernel.windows / "system32" / "odd.sys"
        another = bytes(path.stat().st_size % 4096 + 1)  # a file of another size is read anew
        path.write_bytes(mutated(MODULE, changes) + another)
        assert hostile(IMAGE) is not None
