"""Which pool tags an image is seen to use: code by hand, gcc's, and that of the sample drivers."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kdriver.image import pool_tags
from pytest_kdriver.image.cargo import Cargo
from pytest_kdriver.image.pe import Image, parse_image
from pytest_kdriver.image.pool_tags import UsedTags, default_tags, used_tags
from tests.pe_builder import PAGE, build
from tests.wine.c_drivers.build import SOURCE as PROBE
from tests.wine.c_drivers.build import Linker, build_driver

MANIFEST = Path(__file__).parents[2] / "drivers" / "Cargo.toml"

LOAD = b"\x41\xb8"
"""``mov r8d, imm32``"""

FILLER = b"\x90" * 60
CALL, JUMP, TAIL_JUMP, TAKE = b"\xff\x15", b"\xff\x25", b"\x48\xff\x25", b"\x48\x8b\x05"


def slot(image: Image, routine: str) -> int:
    """Where an image has the address of what it imports."""
    (imported,) = image.imports()
    return imported.slots + 8 * imported.symbols.index(routine)


def through(instruction: bytes, at: int, target: int) -> bytes:
    """An instruction at ``at`` that names ``target`` by its distance."""
    return instruction + struct.pack("<i", target - at - len(instruction) - 4)


def image_of(
    *parts: bytes | tuple[bytes, str], imports: tuple[str, ...] = ("ExAllocatePool2",)
) -> bytes:
    """An image whose code is ``parts``: bytes, or instructions that refer to a routine's slot."""
    size = sum(len(part) if isinstance(part, bytes) else len(part[0]) + 4 for part in parts)
    kernel = {"ntoskrnl.exe": ["DbgPrint", *imports]}
    empty = parse_image(build(code=bytes(size), imports=kernel, pointers=1), Path("made.sys"))
    code = b""
    for part in parts:
        if isinstance(part, bytes):
            code += part
        else:
            code += through(part[0], PAGE + len(code), slot(empty, part[1]))
    return build(code=code, imports=kernel, pointers=1)


def tags_of(
    tmp_path: Path,
    *parts: bytes | tuple[bytes, str],
    imports: tuple[str, ...] = ("ExAllocatePool2",),
) -> UsedTags:
    path = tmp_path / "made.sys"
    path.write_bytes(image_of(*parts, imports=imports))
    return used_tags(path)


def found(*tags: str, all_seen: bool = True) -> UsedTags:
    return UsedTags(frozenset(tags), all_seen)


class TestCode:
    @pytest.mark.parametrize(
        "routine",
        [
            "ExAllocatePool2",
            "ExAllocatePool3",
            "ExAllocatePoolWithTag",
            "ExAllocatePoolWithTagPriority",
            "ExAllocatePoolWithQuotaTag",
        ],
    )
    def test_that_calls_an_allocator_names_its_tag(self, tmp_path: Path, routine: str) -> None:
        code = (LOAD + b"mine", (CALL, routine))
        assert tags_of(tmp_path, *code, imports=(routine,)) == found("mine")

    def test_may_load_the_tag_some_instructions_before(self, tmp_path: Path) -> None:
        assert tags_of(tmp_path, LOAD + b"mine", b"\x90" * 30, (CALL, "ExAllocatePool2")) == found(
            "mine"
        )

    def test_that_loads_it_far_away_is_not_seen(self, tmp_path: Path) -> None:
        code = (LOAD + b"mine", FILLER, (CALL, "ExAllocatePool2"))
        assert tags_of(tmp_path, *code) == found(all_seen=False)

    def test_means_the_last_tag_before_the_call(self, tmp_path: Path) -> None:
        code = (LOAD + b"none", LOAD + b"mine", (CALL, "ExAllocatePool2"))
        assert tags_of(tmp_path, *code) == found("mine")

    def test_may_end_with_a_jump(self, tmp_path: Path) -> None:
        assert tags_of(tmp_path, LOAD + b"mine", (TAIL_JUMP, "ExAllocatePool2")) == found("mine")

    def test_may_call_by_a_jump_of_the_linker_s(self, tmp_path: Path) -> None:
        to_the_end = through(b"\xe8", 6, 11)
        code = (LOAD + b"mine", to_the_end, (JUMP, "ExAllocatePool2"))
        assert tags_of(tmp_path, *code) == found("mine")

    def test_may_call_by_a_register(self, tmp_path: Path) -> None:
        code = (LOAD + b"mine", (TAKE, "ExAllocatePool2"), b"\xff\xd0")
        assert tags_of(tmp_path, *code) == found("mine", all_seen=False)

    def test_that_calls_something_else_has_none(self, tmp_path: Path) -> None:
        assert tags_of(tmp_path, LOAD + b"mine", (CALL, "DbgPrint")) == found(all_seen=False)

    def test_whose_third_argument_is_no_text_has_none(self, tmp_path: Path) -> None:
        code = (LOAD + b"\1\0\0\0", (CALL, "ExAllocatePool2"))
        assert tags_of(tmp_path, *code) == found(all_seen=False)

    def test_has_the_tags_of_all_its_calls(self, tmp_path: Path) -> None:
        code = [
            part
            for tag in (b"one ", b"two ")
            for part in (LOAD + tag, (CALL, "ExAllocatePool2"), FILLER)
        ]
        assert tags_of(tmp_path, *code) == found("one ", "two ")
        assert tags_of(tmp_path, *code, (CALL, "ExAllocatePool2")) == found(
            "one ", "two ", all_seen=False
        )

    def test_beyond_a_driver_s_size_is_not_looked_at(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pool_tags, "MAX_CODE", 20)
        code = (LOAD + b"mine", (CALL, "ExAllocatePool2"))
        assert tags_of(tmp_path, *code, *code) == found("mine", all_seen=False)

    def test_that_is_damaged_has_none(self, tmp_path: Path) -> None:
        path = tmp_path / "a.sys"
        assert used_tags(path) == found(all_seen=False)
        path.write_bytes(b"MZ")
        assert used_tags(path) == found(all_seen=False)

    @given(code=st.binary(max_size=64), at=st.integers(0, 2**31 - 1))
    def test_whatever_it_is_is_looked_through(
        self, code: bytes, at: int, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        path = tmp_path_factory.getbasetemp() / "any.sys"
        path.write_bytes(build(code=code, imports={"ntoskrnl.exe": ["ExAllocatePool2"]}, entry=at))
        assert used_tags(path).tags <= {code[n : n + 4].decode("latin-1") for n in range(64)}


C_DRIVER = r"""
#include <ntddk.h>

DRIVER_INITIALIZE DriverEntry;
PVOID volatile Blocks[4];

__attribute__((noinline)) static PVOID Allocate(SIZE_T size)
{
    return ExAllocatePoolWithTag(PagedPool, size, 0x20656e6f); /* "one " */
}

NTSTATUS NTAPI DriverEntry(PDRIVER_OBJECT driver, PUNICODE_STRING path)
{
    UNREFERENCED_PARAMETER(driver);
    Blocks[0] = Allocate(path->Length);
    for (int i = 1; i < 3; i++)
        Blocks[i] = ExAllocatePoolWithTag(NonPagedPool, 64 + i, 0x206f7774); /* "two " */
    Blocks[3] = ExAllocatePoolWithQuotaTag(NonPagedPool, 64, 0x65726874); /* "thre" */
    return STATUS_SUCCESS;
}
"""


@pytest.mark.parametrize("linker", list(Linker))
@pytest.mark.parametrize("optimized", ["-O0", "-O2"])
def test_gcc_s_code_shows_its_tags(tmp_path: Path, optimized: str, linker: Linker) -> None:
    source = tmp_path / "three.c"
    source.write_text(C_DRIVER)
    image = build_driver(source, optimized=optimized, linker=linker)
    assert used_tags(image).tags == {"one ", "two ", "thre"}


def test_a_tag_that_comes_in_by_a_request_is_not_seen(tmp_path: Path) -> None:
    source = tmp_path / "probe.c"
    source.write_bytes(PROBE.read_bytes())
    found = used_tags(build_driver(source, optimized="-O1"))
    assert found.tags == {"prob"}
    assert not found.all_seen


@pytest.mark.parametrize("name", ["hello", "leaks"])
def test_a_sample_driver_s_tag_may_come_from_the_framework(name: str) -> None:
    found = used_tags(Cargo(MANIFEST).build(name))
    assert not found.all_seen
    assert found.tags <= default_tags(name)


def test_a_package_s_tag_is_its_first_letters_and_spaces() -> None:
    assert default_tags("hello") == {"hell"}
    assert default_tags("ab") == {"ab  "}
    assert default_tags("my_driver") == {"my_d", "my-d"}
