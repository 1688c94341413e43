"""Bug checks: names, and the kernel's text of one."""

from __future__ import annotations

import pytest

from pytest_kdriver.kernel.bug_checks import name_of, parse_fatal

WINDOWS = (
    "\r\n*** Fatal System Error: 0x000000d1\r\n"
    "                       (0xFFFFB90641184010,0x0000000000000002,"
    "0x0000000000000000,0xFFFFF8016E151730)\r\n\r\n"
)
PARAMETERS = (0xFFFFB90641184010, 2, 0, 0xFFFFF8016E151730)


def test_the_kernels_text_is_a_bug_check() -> None:
    assert parse_fatal(WINDOWS) == (0xD1, PARAMETERS, None)


def test_the_driver_that_the_kernel_blames_is_told() -> None:
    told = parse_fatal(f"{WINDOWS}Driver at fault: myfault.sys.\r\n")
    assert told == (0xD1, PARAMETERS, "myfault.sys")


@pytest.mark.parametrize(
    "text",
    [
        "*** Fatal System Error: 0xDEADBEEF (0x1, 0x2, 0x3, 0x4)",
        "\n*** Fatal System Error: 0xdeadbeef\n                       ( 0x1,0x2,0x3,0x4 )\n\n",
        "a line before\n*** fatal system error: 0XDEADBEEF\n(0X1,0X2,0X3,0X4)",
    ],
)
def test_case_and_blanks_do_not_matter(text: str) -> None:
    assert parse_fatal(text) == (0xDEADBEEF, (1, 2, 3, 4), None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        WINDOWS[: WINDOWS.index(")")],
        "*** Fatal System Error: 0x1 (0x1,0x2,0x3)",
        "*** Fatal System Error: 0x1FFFFFFFF (0x1,0x2,0x3,0x4)",
        "*** Fatal System Error: 0x1 (0x10000000000000000,0x2,0x3,0x4)",
        "*** Fatal System Error: 0x1" + " " * 100_000 + "(0x1,0x2,0x3,0x4)",
    ],
)
def test_what_is_not_whole_is_none(text: str) -> None:
    assert parse_fatal(text) is None


def test_a_driver_named_before_is_not_blamed() -> None:
    told = parse_fatal("Driver at fault: other.sys.\n" + WINDOWS)
    assert told is not None
    assert told.blamed is None


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (0xD1, "DRIVER_IRQL_NOT_LESS_OR_EQUAL"),
        (0xC4, "DRIVER_VERIFIER_DETECTED_VIOLATION"),
        (0xDEADDEAD, "MANUALLY_INITIATED_CRASH1"),
        (0x10F, "RESOURCE_MANAGER_EXCEPTION_NOT_HANDLED"),
        (0xE2E2, ""),
        (0x52555354, ""),
    ],
)
def test_codes_have_the_names_of_microsofts_headers(code: int, name: str) -> None:
    assert name_of(code) == name
