"""``kdriver dump``, as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_kdriver.cli import main
from tests.dump_builder import KERNEL, header, minidump

KERNEL_AT = 0xFFFFF80012000000
BAD_AT = 0xFFFFF80034560000
RETURN = BAD_AT + 0x1029
MINIDUMP = minidump(
    [("bad.sys", BAD_AT, 0x7000), ("ntoskrnl.exe", KERNEL_AT, 0x1046000)],
    [KERNEL_AT + 0x100, RETURN, BAD_AT + 0x1000],
    head=bytes(
        header(
            parameters=(0, 2, 0, RETURN),
            exception=(0x80000003, KERNEL_AT + 0x3F5A80),
            instruction=KERNEL_AT + 0x3F5A80,
        )
    ),
)


def test_the_command_tells_it_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "112325-1.dmp"
    file.write_bytes(MINIDUMP)
    assert main(["dump", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{file}:",
        "  minidump of Windows build 19041, x64, 4 processors, 2025-11-23 11:19:14 UTC, up 0:01:30",
        "  bug check 0xD1 DRIVER_IRQL_NOT_LESS_OR_EQUAL (0x0, 0x2, 0x0, 0xFFFFF80034561029)",
        "    read of 0x0 (likely a null pointer) at IRQL 2 (DISPATCH_LEVEL), by bad+0x1029",
        "  exception STATUS_BREAKPOINT (0x80000003) at ntoskrnl+0x3F5A80",
        "  the processor was at ntoskrnl+0x3F5A80",
        "  on the stack:",
        "    ntoskrnl+0x100",
        "    bad+0x1029",
        "    bad+0x1000",
        "  2 modules",
    ]


def test_the_command_tells_it_to_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "MEMORY.DMP"
    file.write_bytes(header(kind=KERNEL, code=0xE2E2, machine=0xAA64))
    assert main(["dump", "--json", str(file), str(file)]) == 0
    told, same = json.loads(capsys.readouterr().out)
    assert told == same
    assert told["code"] == "0xE2E2"
    assert (told["name"], told["words"], told["machine"]) == (None, [], "ARM64")
    assert told["exception"]["name"] == "STATUS_BREAKPOINT (0x80000003)"
    assert told["instruction"] is None
    assert told["missing"] == ["modules, which are in its memory", "instruction pointer"]


@pytest.mark.parametrize("content", [b"nonsense", None])
def test_the_command_fails_for_what_is_no_dump(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.dmp"
    if content is not None:
        file.write_bytes(content)
    assert main(["dump", str(file)]) == 1
    assert "x.dmp" in capsys.readouterr().err


def test_a_module_s_name_can_not_write_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.dmp"
    file.write_bytes(minidump([("\x1b[2J.sys", BAD_AT, 0x7000)], [RETURN]))
    assert main(["dump", str(file)]) == 0
    assert "\x1b" not in capsys.readouterr().out
