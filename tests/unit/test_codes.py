"""NTSTATUS and Win32 codes."""

from __future__ import annotations

import pickle

import pytest

from pytest_kdriver import NTSTATUS, Win32Error


@pytest.mark.parametrize("value", [0xC00000A1, 0xC00000A1 - (1 << 32)])
def test_signed_and_unsigned_are_the_same_status(value: int) -> None:
    status = NTSTATUS(value)
    assert status is NTSTATUS.STATUS_WORKING_SET_QUOTA
    assert int(status) == 0xC00000A1
    assert str(status) == "STATUS_WORKING_SET_QUOTA (0xC00000A1)"


def test_an_unknown_status_is_as_good_as_a_known_one() -> None:
    status = NTSTATUS(0xC0DE1234)
    assert (str(status), repr(status)) == ("0xC0DE1234", "<NTSTATUS.0xC0DE1234>")
    assert status == NTSTATUS(0xC0DE1234 - (1 << 32)) == 0xC0DE1234
    assert pickle.loads(pickle.dumps(status)) == status


@pytest.mark.parametrize(
    ("value", "severity", "success"),
    [
        (0, 0, True),
        (0x103, 0, True),
        (0x40000000, 1, True),
        (0x80000005, 2, False),
        (0xC0000001, 3, False),
    ],
)
def test_success_is_what_nt_success_says(value: int, severity: int, success: bool) -> None:
    assert (NTSTATUS(value).severity, NTSTATUS(value).is_success) == (severity, success)


@pytest.mark.parametrize("value", [1 << 32, -(1 << 31) - 1])
def test_more_than_32_bits_is_no_status(value: int) -> None:
    with pytest.raises(ValueError, match="is not a valid NTSTATUS"):
        NTSTATUS(value)


def test_the_first_of_equal_names_is_shown() -> None:
    assert NTSTATUS(0).name == "STATUS_SUCCESS"
    assert Win32Error(0).name == "ERROR_SUCCESS"


def test_win32_codes_have_names_and_need_none() -> None:
    assert str(Win32Error(1053)) == "ERROR_SERVICE_REQUEST_TIMEOUT (1053)"
    assert str(Win32Error(99999)) == "99999"
    assert Win32Error(99999) == 99999
    assert pickle.loads(pickle.dumps(Win32Error(99999))) == 99999
