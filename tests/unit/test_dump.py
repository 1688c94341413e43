"""Crash dumps: what is read from them, and from broken ones."""

from __future__ import annotations

import io
import os
import struct
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kdriver.errors import DumpError
from pytest_kdriver.kernel.dump import Dump, DumpException, Module, parse_dump, read_dump
from tests.dump_builder import AMD64, COMPLETE, KERNEL, TRIAGE, header, minidump

KERNEL_AT = 0xFFFFF80012000000
BAD_AT = 0xFFFFF80034560000
MODULES = (
    (r"bad.sys", BAD_AT, 0x7000),
    (r"\SystemRoot\system32\ntoskrnl.exe", KERNEL_AT, 0x1046000),
)
RETURN = BAD_AT + 0x1029
CRASH = header(
    parameters=(0, 2, 0, RETURN),
    exception=(0x80000003, KERNEL_AT + 0x3F5A80),
    instruction=KERNEL_AT + 0x3F5A80,
)
STACK = (0x1234, KERNEL_AT + 0x100, RETURN, BAD_AT + 0x7000, 0xFFFFF80034561000)
MINIDUMP = minidump(MODULES, STACK, head=bytes(CRASH))


def parse(data: bytes) -> Dump:
    return parse_dump(io.BytesIO(data), "x.dmp")


def test_a_minidump_tells_its_crash_and_its_modules() -> None:
    dump = parse(MINIDUMP)
    assert dump == Dump(
        kind="minidump",
        code=0xD1,
        parameters=(0, 2, 0, RETURN),
        build=19041,
        machine="x64",
        processors=4,
        time=datetime(2025, 11, 23, 11, 19, 14, 552832, UTC),
        uptime=90.5,
        exception=DumpException(0x80000003, KERNEL_AT + 0x3F5A80),
        instruction=KERNEL_AT + 0x3F5A80,
        modules=(
            Module("ntoskrnl.exe", KERNEL_AT, 0x1046000),
            Module("bad.sys", BAD_AT, 0x7000),
        ),
        stack=(KERNEL_AT + 0x100, RETURN, BAD_AT + 0x1000),
    )
    assert dump.name == "DRIVER_IRQL_NOT_LESS_OR_EQUAL"
    assert dump.words == [
        "read of 0x0 (likely a null pointer) at IRQL 2 (DISPATCH_LEVEL), by bad+0x1029"
    ]


@pytest.mark.parametrize(
    ("address", "where"),
    [
        (BAD_AT, "bad+0x0"),
        (BAD_AT + 0x6FFF, "bad+0x6FFF"),
        (BAD_AT + 0x7000, None),
        (KERNEL_AT - 1, None),
        (0, None),
    ],
)
def test_an_address_is_told_by_the_module_that_has_it(address: int, where: str | None) -> None:
    assert parse(MINIDUMP).where(address) == where


@pytest.mark.parametrize("size", [0x90, 0x98, 0xA8])
def test_the_size_of_an_entry_is_learnt_from_the_list(size: int) -> None:
    names = [module.name for module in parse(minidump(MODULES, entry=size)).modules]
    assert names == ["ntoskrnl.exe", "bad.sys"]


def test_a_kernel_dump_has_its_modules_elsewhere() -> None:
    dump = parse(bytes(header(kind=KERNEL, code=0x50, parameters=(8, 2, 3, 0))))
    assert (dump.kind, dump.code, dump.modules) == ("kernel dump", 0x50, ())
    assert dump.missing == ("modules, which are in its memory",)
    assert dump.words == ["write of 0x8 (likely a null pointer), by 0x3"]


def test_what_windows_did_not_fill_in_is_missing() -> None:
    unset = struct.unpack("<Q", b"PAGEPAGE")[0]
    dump = parse(
        bytes(header(kind=COMPLETE, time=unset, uptime=unset, exception=None, instruction=None))
    )
    assert (dump.time, dump.uptime, dump.exception, dump.instruction) == (None,) * 4
    assert dump.missing[1:] == ("time", "uptime", "exception", "instruction pointer")


def test_a_cut_dump_says_so() -> None:
    (_, told) = parse(bytes(header(kind=COMPLETE, size=1 << 30))).missing
    assert told == "its end: 8192 of 1073741824 bytes are there"


@pytest.mark.parametrize("length", [TRIAGE, TRIAGE + 0x7F, len(MINIDUMP) // 2 + 0x1000])
def test_a_cut_minidump_still_tells_its_crash(length: int) -> None:
    dump = parse(MINIDUMP[:length])
    assert dump.code == 0xD1
    assert dump.missing[0].startswith("x.dmp is cut: it ends before byte ")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "x.dmp is no crash dump"),
        (b"PAGEDUMP" + bytes(9000), "a dump of a 32-bit Windows"),
        (b"MDMP" + bytes(9000), "a minidump of a process"),
        (b"\x7fELF", "ask it for the format win-dmp"),
        (b"PAGEDU64" + bytes(100), "x.dmp is cut: it has 108 bytes, and the header 8192"),
    ],
)
def test_what_is_no_dump_is_told(data: bytes, told: str) -> None:
    with pytest.raises(DumpError, match=told):
        parse(data)


def test_a_pipe_is_no_dump(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DumpError, match="is no file"):
        read_dump(tmp_path / "pipe")


def test_modules_that_can_not_be_are_left_out() -> None:
    strange = (
        ("user.sys", 0x7FFF0000, 0x1000),
        ("odd.sys", BAD_AT + 1, 0x1000),
        ("empty.sys", BAD_AT, 0),
        ("huge.sys", BAD_AT, 0xFFFFFFFF),
        ("", BAD_AT, 0x1000),
        ("x" * 300, BAD_AT, 0x1000),
    )
    assert [module.name for module in parse(minidump([*strange, *MODULES])).modules] == [
        "ntoskrnl.exe",
        "bad.sys",
    ]


def test_counts_that_lie_cost_nothing() -> None:
    data = bytearray(minidump(MODULES, STACK))
    struct.pack_into("<6I", data, TRIAGE + 0x28, 0, 2**32 - 1, 0, 2**32 - 1, 16, 2**32 - 1)
    dump = parse(bytes(data))
    assert (dump.modules, dump.stack) == ((), ())


numbers = st.integers(0, 2**64 - 1)


@given(
    st.lists(st.tuples(st.integers(0, len(MINIDUMP) - 8), numbers), max_size=8),
    st.integers(0, len(MINIDUMP)),
)
def test_whatever_a_file_says_it_is_a_dump_or_an_error(
    changes: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(MINIDUMP)
    for offset, value in changes:
        struct.pack_into("<Q", data, offset, value)
    try:
        dump = parse(bytes(data[:length]))
    except DumpError:
        return
    assert len(dump.modules) <= 4096
    assert len(dump.stack) <= 32
    assert all(isinstance(words, str) for words in dump.words)


def test_the_machine_of_the_builder_is_x64() -> None:
    assert parse(bytes(header(machine=AMD64))).machine == "x64"
    assert parse(bytes(header(machine=0x14C))).machine == "machine 0x14C"
