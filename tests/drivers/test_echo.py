"""The driver with a device."""

import pytest

from pytest_kdriver import NTSTATUS, DeviceError, Driver, ctl_code

ECHO = ctl_code(0x800)
COUNT = ctl_code(0x801)
RESET = ctl_code(0x802)
FAIL = ctl_code(0x803)
PRINT = ctl_code(0x804)


def number(value: int) -> bytes:
    return value.to_bytes(4, "little")


@pytest.mark.kdriver("echo")
def test_what_was_written_is_read_back(kdriver: Driver) -> None:
    with kdriver.running(), kdriver.device(r"\\.\Echo") as echo:
        assert echo.read(100) == b""
        assert echo.write(b"hello, \x00\xff") == 9
        assert echo.read(100) == b"hello, \x00\xff"
        assert echo.read(5) == b"hello"
        assert echo.write(b"bye") == 3
        assert echo.read(100) == b"bye"
        echo.ioctl(RESET)
        assert echo.read(100) == b""


@pytest.mark.kdriver("echo", parameters={"Capacity": 3})
def test_it_takes_what_fits(kdriver: Driver) -> None:
    with kdriver.running(), kdriver.device(r"\\.\Echo") as echo:
        assert echo.write(b"hello") == 3
        assert echo.read(100) == b"hel"


@pytest.mark.kdriver("echo", parameters={"Capacity": 1 << 16})
def test_much_goes_there_and_back(kdriver: Driver) -> None:
    data = bytes(range(256)) * 2048
    most = 1 << 16
    with kdriver.running(), kdriver.device(r"\\.\Echo") as echo:
        assert echo.write(data) == most
        assert echo.read(len(data)) == data[:most]
        assert echo.ioctl(ECHO, data, output_size=len(data)) == data


@pytest.mark.kdriver("echo", parameters={"Capacity": (1 << 16) + 1})
def test_it_keeps_no_more_than_may_be_copied_at_a_time(kdriver: Driver) -> None:
    assert kdriver.start(check=False) == NTSTATUS.STATUS_INVALID_PARAMETER


@pytest.mark.kdriver("echo")
def test_an_ioctl_gives_its_input_back(kdriver: Driver) -> None:
    with kdriver.running(), kdriver.device(r"\\.\Echo") as echo:
        assert echo.ioctl(ECHO, b"hello", output_size=100) == b"hello"


@pytest.mark.kdriver("echo")
def test_it_may_be_opened_twice_and_counts(kdriver: Driver) -> None:
    with kdriver.running(), kdriver.device(r"\\.\Echo") as first:
        with kdriver.device(r"\Device\Echo") as second:
            second.write(b"from the second")
            assert first.read(100) == b"from the second"
            assert first.ioctl(COUNT, output_size=4) == number(2)
        assert first.ioctl(COUNT, output_size=4) == number(1)


@pytest.mark.kdriver("echo")
def test_what_it_is_told_to_print_is_seen(kdriver: Driver) -> None:
    with kdriver.running(), kdriver.device(r"\\.\Echo") as echo:
        echo.ioctl(PRINT, "Grüße".encode())
    assert kdriver.dbgprint.lines == ["Grüße"]


@pytest.mark.parametrize(
    ("code", "data", "status"),
    [
        (FAIL, number(0xC00000A1), NTSTATUS.STATUS_WORKING_SET_QUOTA),
        (FAIL, number(0), NTSTATUS.STATUS_UNSUCCESSFUL),  # a failure is none that says success
        (FAIL, number(0x103), NTSTATUS.STATUS_UNSUCCESSFUL),  # STATUS_PENDING
        (FAIL, b"", NTSTATUS.STATUS_INVALID_PARAMETER),
        (PRINT, b"\xff", NTSTATUS.STATUS_INVALID_PARAMETER),
        (COUNT, b"", NTSTATUS.STATUS_BUFFER_TOO_SMALL),
        (ctl_code(0x8FF), b"", NTSTATUS.STATUS_INVALID_DEVICE_REQUEST),
    ],
)
@pytest.mark.kdriver("echo")
def test_an_error_is_the_driver_s_own(
    kdriver: Driver, code: int, data: bytes, status: NTSTATUS
) -> None:
    with kdriver.running(), kdriver.device(r"\\.\Echo") as echo:
        with pytest.raises(DeviceError) as error:
            echo.ioctl(code, data)
        assert error.value.status == status
        assert echo.ioctl(ECHO, b"it lives on", output_size=100) == b"it lives on"
