"""Bug checks: names, and the kernel's text of one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kdriver.kernel.bug_check_words import KINDS, RULES, WORDS
from pytest_kdriver.kernel.bug_checks import describe_bug_check, name_of, parse_fatal

WINDOWS = (
    "\r\n*** Fatal System Error: 0x000000d1\r\n"
    "                       (0xFFFFB90641184010,0x0000000000000002,"
    "0x0000000000000000,0xFFFFF8016E151730)\r\n\r\n"
)
PARAMETERS = (0xFFFFB90641184010, 2, 0, 0xFFFFF8016E151730)


def test_the_kernels_text_is_a_bug_check() -> None:
    assert parse_fatal(WINDOWS) == (0xD1, PARAMETERS, None)


@pytest.mark.parametrize(
    "words",
    [
        "myfault.sys.\r\n",
        "\r\n***  myfault.sys - Address FFFFF8001D3A1234 base at FFFFF8001D3A0000, DateStamp 5e3d\r\n",
    ],
)
def test_the_driver_that_the_kernel_blames_is_told(words: str) -> None:
    told = parse_fatal(f"{WINDOWS}Driver at fault: {words}")
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


def where(address: int) -> str | None:
    return f"bad+0x{address - 0xF000:X}" if 0xF000 <= address < 0x10000 else None


@pytest.mark.parametrize(
    ("code", "parameters", "words"),
    [
        (0xC4, (0x62, 0xFFFF0010, 0, 3), "3 allocations not freed at unload of bad.sys"),
        (
            0xD1,
            (0, 2, 0, 0xF123),
            "read of 0x0 (likely a null pointer) at IRQL 2 (DISPATCH_LEVEL), by bad+0x123",
        ),
        (0xA, (0x1000, 0xFF, 8, 5), "execution of 0x1000 at IRQL 0xFF, by 0x5"),
        (0x50, (0xFFFF8000, 2, 0xF001, 0), "write of 0xFFFF8000, by bad+0x1"),
        (
            0x50,
            (0xFFFF8000, 0x10, 0xF001, 4),
            "execution of 0xFFFF8000, which is no canonical address, by bad+0x1",
        ),
        (0x50, (0xFFFF8000, 8, 0xF001, 0), "access 0x8 of 0xFFFF8000, by bad+0x1"),
        (
            0x7E,
            (0xFFFFFFFFC0000005, 0xF100, 1, 2),
            "STATUS_ACCESS_VIOLATION (0xC0000005) at bad+0x100, which nobody handled, in "
            "a system thread",
        ),
        (
            0x1000007E,
            (0xC0000094, 0xF100, 1, 2),
            "STATUS_INTEGER_DIVIDE_BY_ZERO (0xC0000094) at bad+0x100, which nobody "
            "handled, in a system thread",
        ),
        (
            0x1E,
            (0xFFFFFFFFC0000005, 0xF100, 0, 0x30),
            "STATUS_ACCESS_VIOLATION (0xC0000005) at bad+0x100, which nobody handled, "
            "access of 0x30 (likely a null pointer)",
        ),
        (0x139, (3, 1, 2, 0), "a LIST_ENTRY is corrupt, by a second removal for one"),
        (
            0xC2,
            (0xA, 0x1234, 0x74737572, 0xE46E6F4E),
            "free of 0x1234 with the tag 'Nond'; it was allocated with 'rust'",
        ),
        (0xC4, (0x20004, 1, 0, 0), "the DDI compliance rule IrqlExAllocatePool was violated"),
        (0xC4, (0x7777, 1, 0, 0), "Driver Verifier found a violation, kind 0x7777"),
        (
            0x133,
            (0, 501, 500, 0),
            "one DPC or interrupt routine ran for 501 ticks, and 500 are allowed",
        ),
    ],
)
def test_common_ones_are_told_in_words(code: int, parameters: tuple[int, ...], words: str) -> None:
    assert describe_bug_check(code, parameters, where, blamed="bad.sys") == [words]


def test_without_a_blamed_driver_it_is_the_driver() -> None:
    told = describe_bug_check(0xC4, (0x62, 1, 0, 1), where)
    assert told == ["1 allocations not freed at unload of the driver"]


@pytest.mark.parametrize(
    ("code", "parameters"), [(0xE2E2, (1, 2, 3, 4)), (0x9F, (9, 0, 0, 0)), (0xD1, (1, 2))]
)
def test_what_is_not_known_is_not_told(code: int, parameters: tuple[int, ...]) -> None:
    assert describe_bug_check(code, parameters, where) == []


def test_all_that_has_words_has_a_name() -> None:
    assert [hex(code) for code in [*WORDS, *KINDS] if not name_of(code)] == []


values = st.integers(0, 2**64 - 1)
kinds = st.sampled_from(
    sorted({value for of in KINDS.values() for value in of.templates} | {*RULES})
)


@given(st.sampled_from(sorted({*WORDS, *KINDS})), st.tuples(*[values | kinds] * 4))
def test_no_parameter_is_too_strange_for_words(code: int, parameters: tuple[int, ...]) -> None:
    for line in describe_bug_check(code, parameters, where):
        assert line.isprintable()
        assert "{" not in line


def test_every_template_is_one() -> None:
    for code, of in KINDS.items():
        for kind in of.templates:
            parameters = [7, 7, 7, 7]
            parameters[of.index] = kind
            (line,) = describe_bug_check(code, parameters, where)
            assert len(line) < 140
