"""The memory of a complete dump, by kdmp-parser, and ``kdriver dump --deep``."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest

from pytest_kdriver.cli import main
from pytest_kdriver.errors import DumpError
from pytest_kdriver.kernel.dump import Dump, Module, read_dump
from pytest_kdriver.kernel.dump_memory import with_memory
from tests.dump_builder import HEADER, complete, minidump

KERNEL_AT = 0xFFFFF80012000000
BAD_AT = 0xFFFFF80034560000
MODULES = [("ntoskrnl.exe", KERNEL_AT, 0x1046000), ("bad.sys", BAD_AT, 0x7000)]
STACK = [1, KERNEL_AT + 0x100, BAD_AT + 0x1029, BAD_AT + 0x7000]
COMPLETE = complete(MODULES, STACK)


def deep(folder: Path, data: bytes) -> Dump:
    file = folder / "MEMORY.DMP"
    file.write_bytes(data)
    return with_memory(file, read_dump(file))


def test_the_modules_and_the_stack_are_found_in_the_memory(tmp_path: Path) -> None:
    dump = deep(tmp_path, COMPLETE)
    assert dump.modules == (
        Module("ntoskrnl.exe", KERNEL_AT, 0x1046000),
        Module("bad.sys", BAD_AT, 0x7000),
    )
    assert dump.stack == (KERNEL_AT + 0x100, BAD_AT + 0x1029)
    assert dump.missing == ()


def test_a_list_without_an_end_ends(tmp_path: Path) -> None:
    assert len(deep(tmp_path, complete(MODULES, STACK, looped=True)).modules) == 2


def test_a_list_that_is_not_there_is_missing(tmp_path: Path) -> None:
    data = bytearray(COMPLETE)
    struct.pack_into("<Q", data, 0x20, 0xFFFFF80099990000)
    dump = deep(tmp_path, bytes(data))
    assert (dump.modules, dump.stack, dump.missing) == ((), (), ("modules",))


@pytest.mark.parametrize("length", [HEADER, HEADER + 0x1800, len(COMPLETE) - 0x1000])
def test_memory_that_is_cut_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], length: int
) -> None:
    file = tmp_path / "MEMORY.DMP"
    file.write_bytes(COMPLETE[:length])
    code = main(["dump", "--deep", str(file)])
    told = capsys.readouterr()
    assert ("its memory can't be read" in told.err) if code else ("not in it: " in told.out)


def test_a_minidump_has_no_memory(tmp_path: Path) -> None:
    with pytest.raises(DumpError, match="is a minidump, which has no memory"):
        deep(tmp_path, minidump())


def test_the_command_tells_the_stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "MEMORY.DMP"
    file.write_bytes(COMPLETE)
    assert main(["dump", "--deep", str(file)]) == 0
    told = capsys.readouterr().out
    assert "    bad+0x1029\n" in told
    assert "2 modules" in told


def test_the_command_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "MEMORY.DMP"
    file.write_bytes(COMPLETE)
    monkeypatch.setattr(sys, "path", [str(Path(os.__file__).parent)])
    monkeypatch.delitem(sys.modules, "kdmp_parser", raising=False)
    assert main(["dump", "--deep", str(file)]) == 2
    assert "pip install 'pytest-kdriver[dumps]'" in capsys.readouterr().err
