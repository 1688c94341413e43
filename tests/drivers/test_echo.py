"""The driver with a device."""

import threading

import pytest

from pytest_kdriver import NTSTATUS, DeviceError, Driver, DriverCrashed, DriverTimeout, ctl_code

ECHO = ctl_code(0x800)
COUNT = ctl_code(0x801)
RESET = ctl_code(0x802)
FAIL = ctl_code(0x803)
PRINT = ctl_code(0x804)
HANG = ctl_code(0x805)
LEAK = ctl_code(0x806)
CRASH = ctl_code(0x807)

PANIC, PAGE_FAULT, BUG_CHECK = range(3)


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


@pytest.mark.kdriver("echo", parameters={"Capacity": 1 << 20})
def test_half_a_megabyte_goes_there_and_back(kdriver: Driver) -> None:
    data = bytes(range(256)) * 2048
    with kdriver.running(), kdriver.device(r"\\.\Echo") as echo:
        assert echo.write(data) == len(data)
        assert echo.read(len(data)) == data
        assert echo.ioctl(ECHO, data, output_size=len(data)) == data


@pytest.mark.kdriver("echo")
def test_an_ioctl_gives_its_input_back(kdriver: Driver) -> None:
    with kdriver.running(), kdriver.device(r"\\.\Echo") as echo:
        assert echo.ioctl(ECHO, b"hello", output_size=100) == b"hello"
        assert echo.ioctl(ECHO, b"hello", output_size=2) == b"he"
        assert echo.ioctl(ECHO, b"hello") == b""
        assert echo.ioctl(ECHO, output_size=100) == b""


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


@pytest.mark.kdriver("echo", leaks="allow")
def test_a_leak_in_an_ioctl_is_counted(kdriver: Driver) -> None:
    with kdriver.running(), kdriver.device(r"\\.\Echo") as echo:
        echo.ioctl(LEAK, number(100))
        echo.ioctl(LEAK, number(100))
    (leak,) = kdriver.pool.leaked
    assert (leak.tag, leak.count, leak.size) == ("echo", 2, 200)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (PANIC, "bug check 0x52555354"),
        (PAGE_FAULT, "page fault: write access to 0x10"),
        (BUG_CHECK, "bug check 0xE2E2"),
    ],
)
@pytest.mark.kdriver("echo")
def test_a_crash_in_an_ioctl_is_told_by_it(kdriver: Driver, how: int, message: str) -> None:
    kdriver.start()
    with kdriver.device(r"\\.\Echo") as echo, pytest.raises(DriverCrashed, match=message):
        echo.ioctl(CRASH, number(how))


@pytest.mark.kdriver("echo")
def test_an_ioctl_that_takes_its_time_is_waited_for(kdriver: Driver) -> None:
    with kdriver.running(), kdriver.device(r"\\.\Echo") as echo:
        echo.ioctl(HANG, number(20))
    assert kdriver.dbgprint.lines == ["hanging", "done"]


@pytest.mark.kdriver("echo")
def test_an_ioctl_that_hangs_is_cut_short(kdriver: Driver) -> None:
    kdriver.start()
    with kdriver.device(r"\\.\Echo") as echo:
        with pytest.raises(DriverTimeout):
            echo.ioctl(HANG, number(0xFFFFFFFF), timeout=0.3)
        assert kdriver.dbgprint.lines == ["hanging"]


@pytest.mark.kdriver("echo")
def test_many_threads_at_once_get_their_own_answers(kdriver: Driver) -> None:
    wrong: list[bytes] = []

    def talk(name: int) -> None:
        for turn in range(50):
            data = b"%d says %d" % (name, turn)
            if echo.ioctl(ECHO, data, output_size=100) != data:
                wrong.append(data)

    with kdriver.running(), kdriver.device(r"\\.\Echo") as echo:
        threads = [threading.Thread(target=talk, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert echo.ioctl(COUNT, output_size=4) == number(1)
    assert wrong == []


@pytest.mark.kdriver("echo")
def test_an_open_handle_does_not_keep_it_from_stopping(kdriver: Driver) -> None:
    kdriver.start()
    with kdriver.device(r"\\.\Echo") as echo:
        kdriver.stop()
        with pytest.raises(DeviceError):
            echo.read(1)
    with pytest.raises(DeviceError), kdriver.device(r"\\.\Echo"):
        pass
