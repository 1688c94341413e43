"""What an image says of itself, and what is said of a file that is none."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pefile
import pytest

from pytest_kdriver.errors import ImageError
from pytest_kdriver.image import pe
from pytest_kdriver.image.pe import (
    Directory,
    FileFlag,
    Image,
    Import,
    Subsystem,
    parse_image,
    read_image,
    read_layout,
)
from tests.pe_builder import (
    DATA,
    DIRECTORIES,
    FILE_HEADER,
    OPTIONAL_HEADER,
    PAGE,
    SECTIONS,
    Imports,
    Section,
    build,
    build_module,
    patched,
)

IMPORTS: Imports = {
    "ntoskrnl.exe": ["DbgPrint", 7, "ExFreePool"],
    "HAL.dll": ["KeStallExecutionProcessor"],
}
PATH = Path("x.sys")


def parse(data: bytes) -> Image:
    return parse_image(data, PATH)


class TestImage:
    def test_has_what_its_headers_say(self, tmp_path: Path) -> None:
        path = tmp_path / "x.sys"
        path.write_bytes(build(imports=IMPORTS, characteristics=0x2022, pointers=1))
        image = read_image(path)
        assert (image.entry, image.size) == (PAGE, 4 * PAGE)
        assert (read_layout(path).entry, read_layout(path).size) == (PAGE, 4 * PAGE)
        assert image.subsystem == Subsystem.NATIVE
        assert FileFlag.DLL in image.flags
        assert [section.name for section in image.sections] == [".text", ".rdata", ".reloc"]
        assert image.directory(Directory.RELOCATION) == (3 * PAGE, 12)
        assert image.directory(Directory.SECURITY) == (0, 0)

    def test_agrees_with_pefile(self) -> None:
        data = build(imports=IMPORTS, sections=[Section(b".more", b"x" * 700, DATA)], pointers=3)
        ours, theirs = parse(data), pefile.PE(data=data)
        assert [(found.module, symbol) for found in ours.imports() for symbol in found.symbols] == [
            (entry.dll.decode(), symbol.name.decode() if symbol.name else symbol.ordinal)
            for entry in theirs.DIRECTORY_ENTRY_IMPORT
            for symbol in entry.imports
        ]
        assert [(section.address, section.size, section.offset) for section in ours.sections] == [
            (section.VirtualAddress, section.Misc_VirtualSize, section.PointerToRawData)
            for section in theirs.sections
        ]

    def test_imports_by_its_slots_where_a_linker_wrote_nothing_else(self) -> None:
        image = build(imports={"ntoskrnl.exe": ["DbgPrint"]})
        lookup = parse(image).sections[1].offset
        (found,) = parse(patched(image, lookup, "<I", 0)).imports()
        assert found == Import("ntoskrnl.exe", ("DbgPrint",))

    def test_without_imports_or_exports_has_none(self) -> None:
        image = parse(build())
        assert list(image.imports()) == []
        assert list(image.delayed()) == []
        assert not image.exports().ordinals

    def test_has_zeros_where_memory_goes_on_behind_the_file(self) -> None:
        image = parse(build(sections=[Section(b".bss", b"abc", DATA, size=2 * PAGE)]))
        assert image.read(3 * PAGE, PAGE + 4) == b"abc".ljust(PAGE + 4, b"\0")
        with pytest.raises(ImageError, match="not in one section"):
            image.read(5 * PAGE - 1, 2)

    def test_escapes_what_a_terminal_would_obey(self) -> None:
        (found,) = parse(build(imports={"\x1b[2Jnt\n.exe": ["A\x07"]})).imports()
        assert found == Import("\\x1b[2Jnt\\n.exe", ("A\\x07",))

    def test_exports_functions_and_other_modules(self) -> None:
        image = parse(
            build_module("ntoskrnl.exe", {"Here": "", "There": "hal.Foo", "Nth": "hal.#9"})
        )
        exports = image.exports()
        assert exports.address("Here") == exports.address(1) == PAGE
        assert exports.address("Gone") is exports.address(17) is None
        there, nth = exports.address("There"), exports.address("Nth")
        assert there in exports.directory
        assert there is not None
        assert nth is not None
        assert image.forwarder(there) == pe.Forwarder("hal", "Foo")
        assert image.forwarder(nth) == pe.Forwarder("hal", 9)


class TestNoImage:
    @pytest.mark.parametrize(
        ("data", "told"),
        [
            (b"", "it is empty"),
            (b"#!/bin/sh\nexit 0\n", "it is a script"),
            ("Träume".encode(), "it does not begin with MZ"),
            (b"[Version]\r\nSignature=...", "it is text"),
            (b"\x7fELF\x02\x01\x01" + bytes(100), "it is an ELF file, made for Linux"),
            (b"!<arch>\nntoskrnl.a", "it is a library of objects: link it"),
            (b"\x64\x86\x03\x00" + bytes(100), "it is an object file: link it"),
            (b"Microsoft C/C++ MSF 7.00\r\n", "it is a PDB"),
            (bytes(4096), "it does not begin with MZ"),
            (b"MZ", "it is truncated, its headers are not complete"),
            (b"MZ" + bytes(0x200), "it is a DOS program, or damaged"),
            (build()[:0x120], "it is truncated, its headers are not complete"),
            (patched(build(), OPTIONAL_HEADER, "<H", 0x10B), "its optional header is damaged"),
            (patched(build(), FILE_HEADER + 16, "<H", 64), "its optional header is damaged"),
            (patched(build(), FILE_HEADER + 2, "<H", 0xFFFF), "it claims 65535 sections"),
        ],
    )
    def test_is_told_as_what_it_is(self, data: bytes, told: str) -> None:
        with pytest.raises(ImageError) as raised:
            parse(data)
        assert str(raised.value).startswith(f"x.sys is no Windows image: {told}")

    @pytest.mark.parametrize(
        ("machine", "name"), [(0x14C, "32-bit x86"), (0xAA64, "ARM64"), (0x5032, "machine 0x5032")]
    )
    def test_is_one_for_another_processor(self, machine: int, name: str) -> None:
        with pytest.raises(
            ImageError, match=rf"image for {name}, .*: build it for x86_64-pc-windows"
        ):
            parse(build(machine=machine))

    def test_is_not_there_or_no_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.sys")
        for path, told in (
            (tmp_path / "none.sys", "there is no "),
            (tmp_path, "is no file"),
            (tmp_path / "pipe.sys", "is no file"),
            (tmp_path / "x\0y.sys", "can't be read"),
            (tmp_path / ("x" * 300), "can't be read"),
        ):
            with pytest.raises(ImageError, match=told):
                read_image(path)

    def test_is_larger_than_any(self, tmp_path: Path) -> None:
        path = tmp_path / "x.sys"
        path.write_bytes(b"MZ")
        os.truncate(path, pe.MAX_FILE + 1)
        with pytest.raises(ImageError, match="it is larger than 256 MiB"):
            read_image(path)


class TestDamagedTables:
    def test_of_a_name_without_an_end(self) -> None:
        endless = Section(b".names", b"A" * 2 * pe.MAX_NAME, DATA)
        with pytest.raises(ImageError, match="the name at 0x3000 has no end"):
            parse(build(sections=[endless])).text(3 * PAGE)

    def test_of_a_directory_outside_of_the_image(self) -> None:
        image = parse(patched(build(imports=IMPORTS), DIRECTORIES + 8, "<I", 0x900000))
        with pytest.raises(ImageError, match=r"x.sys: it refers to 0x900000, where nothing is"):
            list(image.imports())

    def test_of_descriptors_without_an_end(self) -> None:
        empty = 8 * PAGE
        descriptors = struct.pack("<IIIII", empty, 0, 0, empty, empty) * 1000
        sections = [Section(b".idata", descriptors, DATA), Section(b".empty", b"", DATA)]
        image = patched(build(sections=sections), DIRECTORIES + 8, "<I", 3 * PAGE)
        with pytest.raises(ImageError, match="more than 256 modules"):
            list(parse(image).imports())

    def test_of_symbols_without_an_end(self) -> None:
        slots = struct.pack("<Q", 1 << 63 | 1) * (pe.MAX_IMPORTS + 1)
        descriptor = struct.pack("<IIIII", 3 * PAGE, 0, 0, 2 * PAGE + 40, 3 * PAGE)
        image = build(imports=IMPORTS, sections=[Section(b".slots", slots, DATA)])
        image = patched(image, parse(image).sections[1].offset, "<20s", descriptor)
        with pytest.raises(ImageError, match="more than 16384 symbols"):
            list(parse(image).imports())

    def test_of_more_exports_than_there_are_ordinals(self) -> None:
        image = build_module("ntoskrnl.exe", {"Here": ""})
        at = parse(image).sections[2].offset
        with pytest.raises(ImageError, match="it claims 4294967295 exports"):
            parse(patched(image, at + 24, "<I", 0xFFFFFFFF)).exports()

    def test_of_sections_that_the_file_does_not_have(self) -> None:
        image = parse(patched(build(imports=IMPORTS), SECTIONS + 40 + 20, "<I", 0x100000))
        with pytest.raises(ImageError, match="it is truncated"):
            list(image.imports())
