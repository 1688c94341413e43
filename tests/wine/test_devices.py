"""Devices of a driver, as a test opens them: the sample ``echo``."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pytest_kdriver import (
    NTSTATUS,
    ConfigError,
    Device,
    DeviceError,
    Driver,
    DriverCrashed,
    DriverTimeout,
    TargetHandle,
    ctl_code,
)
from pytest_kdriver.device import MAX_INPUT, MAX_OUTPUT

pytestmark = pytest.mark.kdriver("echo", timeout=10)

PATH = r"\\.\Echo"
ECHO, COUNT, RESET, FAIL, PRINT, HANG, LEAK, CRASH = (ctl_code(0x800 + n) for n in range(8))


FOR_EVER = b"\xff" * 4


def number(value: int) -> bytes:
    return value.to_bytes(4, "little")


class TestIo:
    def test_reads_what_was_written(self, kdriver: Driver) -> None:
        with kdriver.running(), kdriver.device(PATH) as device:
            assert device.write(b"hello, device") == 13
            assert device.read(100) == b"hello, device"
            assert device.read(5) == b"hello"
            assert device.read(0) == b""

    def test_ioctl_gives_the_output_that_there_is_room_for(self, kdriver: Driver) -> None:
        every_byte = bytes(range(256)) * 8
        with kdriver.running(), kdriver.device(PATH) as device:
            assert device.ioctl(ECHO, every_byte, output_size=4096) == every_byte
            assert device.ioctl(ECHO, every_byte, output_size=10) == every_byte[:10]
            assert device.ioctl(ECHO, every_byte) == b""
            assert device.ioctl(ECHO, output_size=16) == b""

    def test_a_device_has_its_kernel_s_name_too(self, kdriver: Driver) -> None:
        with (
            kdriver.running(),
            kdriver.device(r"\Device\Echo") as first,
            kdriver.device(r"\??\Echo") as second,
        ):
            assert first.ioctl(COUNT, output_size=4) == number(2)
            first.write(b"for both")
            assert second.read(8) == b"for both"

    def test_what_an_ioctl_printed_is_there_when_it_returns(self, kdriver: Driver) -> None:
        with kdriver.running(), kdriver.device(PATH) as device:
            for count in range(500):
                device.ioctl(PRINT, b"line %d" % count)
                assert kdriver.dbgprint.lines[-1] == f"line {count}"

    def test_a_device_is_closed_at_the_end_of_its_with(self, kdriver: Driver) -> None:
        with kdriver.running(), kdriver.device(PATH) as device:
            with kdriver.device(PATH) as other:
                assert device.ioctl(COUNT, output_size=4) == number(2)
            assert device.ioctl(COUNT, output_size=4) == number(1)
            assert other.closed
            with pytest.raises(DeviceError, match="read of 1 bytes .* its handle is closed"):
                other.read(1)


class TestErrors:
    def test_an_ioctl_s_status_is_the_driver_s(self, kdriver: Driver) -> None:
        with kdriver.running(), kdriver.device(PATH) as device:
            with pytest.raises(DeviceError, match="ioctl 0x22200C of .* STATUS_QUOTA") as failed:
                device.ioctl(FAIL, number(NTSTATUS.STATUS_QUOTA_EXCEEDED))
            assert failed.value.status == NTSTATUS.STATUS_QUOTA_EXCEEDED
            with pytest.raises(DeviceError) as unknown:
                device.ioctl(ctl_code(0x900))
            assert unknown.value.status == NTSTATUS.STATUS_INVALID_DEVICE_REQUEST
            assert device.ioctl(ECHO, b"still there", output_size=20) == b"still there"

    def test_what_is_not_there_can_t_be_opened(self, kdriver: Driver) -> None:
        with pytest.raises(DeviceError, match="the driver is not loaded") as early:
            kdriver.device(PATH).__enter__()
        assert early.value.status == NTSTATUS.STATUS_OBJECT_NAME_NOT_FOUND
        with (
            kdriver.running(),
            pytest.raises(DeviceError, match="OBJECT_NAME_NOT_FOUND"),
            kdriver.device(r"\\.\Ekko"),
        ):
            pass

    @pytest.mark.parametrize("path", ["Echo", r"C:\Echo", r"\\server\share", "", "\\\\.\\"])
    def test_what_is_no_device_s_path_says_what_to_write(self, kdriver: Driver, path: str) -> None:
        with pytest.raises(ConfigError, match="is no device's path: write"):
            kdriver.device(path).__enter__()

    def test_what_no_guest_takes_is_a_value_error(self, kdriver: Driver) -> None:
        with kdriver.running(), kdriver.device(PATH) as device:
            with pytest.raises(ValueError, match="it has 32 bits"):
                device.ioctl(1 << 32)
            with pytest.raises(ValueError, match="length is -1; it is 0 to 16777216"):
                device.read(-1)
            with pytest.raises(ValueError, match="output_size is -1"):
                device.ioctl(ECHO, output_size=-1)
            with pytest.raises(ValueError, match="the size of data is 1048576; it is 0 to"):
                device.write(bytes(1 << 20))
            most = bytes(MAX_INPUT)
            assert device.ioctl(ECHO, most, output_size=MAX_OUTPUT) == most
            assert device.write(most) == 4096  # what echo keeps
            assert len(device.read(MAX_OUTPUT)) == 4096

    def test_codes_are_the_wdk_s(self, kdriver: Driver) -> None:
        assert ctl_code(0x800) == 0x222000
        assert ctl_code(0xFFF, device_type=0xFFFF, method=3, access=3) == 0xFFFFFFFF
        with pytest.raises(ValueError, match="function is 0x1000; it is below 0x1000"):
            ctl_code(0x1000)

    def test_a_status_that_a_dead_driver_s_device_has_is_no_death(self, kdriver: Driver) -> None:
        with kdriver.running(), kdriver.device(PATH) as device:
            begin = time.monotonic()
            with pytest.raises(DeviceError, match="STATUS_FILE_DELETED"):
                device.ioctl(FAIL, number(NTSTATUS.STATUS_FILE_DELETED))
            assert time.monotonic() - begin < 1, "it waits for no death"
            assert device.ioctl(ECHO, b"alive", output_size=5) == b"alive"

    def test_data_is_bytes_whatever_its_items_are(self, kdriver: Driver) -> None:
        words = memoryview(bytes(range(16))).cast("I")
        with kdriver.running(), kdriver.device(PATH) as device:
            assert device.ioctl(ECHO, words, output_size=16) == bytes(range(16))
            assert device.write(bytearray(b"array")) == 5
            with pytest.raises(TypeError):
                device.write("text")  # type: ignore[arg-type]


class TestEnd:
    def test_a_stop_waits_as_long_as_it_is_told_for_what_is_going_on(
        self, kdriver_target: TargetHandle
    ) -> None:
        with kdriver_target.driver("echo", timeout=1) as echo, ThreadPoolExecutor() as others:
            echo.start()
            with echo.device(PATH) as device:
                others.submit(device.ioctl, HANG, number(1500), timeout=10)
                echo.dbgprint.wait_for("hanging")
                echo.stop(timeout=10)
            assert echo.dbgprint.lines == ["hanging", "done"]

    def test_handles_that_are_open_are_closed_before_a_stop(self, kdriver: Driver) -> None:
        kdriver.start()
        with kdriver.device(PATH) as device, kdriver.device(PATH):
            kdriver.stop(timeout=5)
            assert device.closed
            with pytest.raises(DeviceError, match="its handle is closed") as late:
                device.read(1)
            assert late.value.status == NTSTATUS.STATUS_INVALID_HANDLE
        with kdriver.running(), kdriver.device(PATH) as device:
            assert device.ioctl(COUNT, output_size=4) == number(1)

    def test_a_handle_that_is_never_closed_does_not_hold_up_the_verdict(
        self, kdriver: Driver, request: pytest.FixtureRequest
    ) -> None:
        kdriver.start()
        opened = kdriver.device(PATH)
        request.addfinalizer(lambda: opened.__exit__(None, None, None))
        opened.__enter__().write(b"kept until the driver is stopped")

    def test_a_leak_in_an_ioctl_is_one_and_has_its_line(self, kdriver_target: TargetHandle) -> None:
        with kdriver_target.driver("echo", leaks="allow") as echo:
            with echo.running(), echo.device(PATH) as device:
                device.ioctl(LEAK, number(100))
                device.ioctl(LEAK, number(200))
            leaked = echo.pool.leaked
            assert [(use.size, use.count) for use in leaked] == [(300, 2)]
            assert "echo/src/lib.rs:" in str(leaked)
            assert "echo::leak" in str(leaked)

    def test_a_request_that_a_stop_cuts_off_says_so(self, kdriver: Driver) -> None:
        failures: list[Exception] = []
        kdriver.start()
        with kdriver.device(PATH) as device:

            def hang() -> None:
                try:
                    device.ioctl(HANG, number(1000))
                except DeviceError as error:
                    failures.append(error)

            thread = threading.Thread(target=hang)
            thread.start()
            kdriver.dbgprint.wait_for("hanging")
            kdriver.stop()
            thread.join()
        assert [str(error).partition("\n")[0] for error in failures] == [
            r"echo on wine: ioctl 0x222014 of \??\Echo: its handle was closed meanwhile, "
            "which cancelled it"
        ]


class TestHang:
    def test_what_hangs_is_cut_short_and_the_next_start_works(self, kdriver: Driver) -> None:
        with kdriver.running():
            with kdriver.device(PATH) as device:
                with pytest.raises(DriverTimeout, match="ioctl 0x222014 .* within 0.3 s") as late:
                    device.ioctl(HANG, FOR_EVER, timeout=0.3)
                assert (late.value.phase, late.value.timeout) == ("ioctl", 0.3)
                assert "echo: hanging" in late.value.lines[-1]
            assert kdriver.lost
        with kdriver.running(), kdriver.device(PATH) as device:
            device.write(b"again")
            assert device.read(5) == b"again"

    def test_what_is_slow_is_waited_for(self, kdriver: Driver) -> None:
        with kdriver.running(), kdriver.device(PATH) as device:
            device.ioctl(HANG, number(300))
            assert kdriver.dbgprint.lines == ["hanging", "done"]

    def test_threads_may_use_devices_at_once(self, kdriver: Driver) -> None:
        failures: list[BaseException] = []

        def use(device: Device, own: bytes) -> None:
            try:
                for _ in range(50):
                    assert device.ioctl(ECHO, own, output_size=64) == own
            except BaseException as error:
                failures.append(error)

        with kdriver.running(), kdriver.device(PATH) as shared, kdriver.device(PATH) as other:
            threads = [
                threading.Thread(target=use, args=(device, bytes([n]) * 40))
                for n, device in enumerate((shared, shared, shared, other))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert failures == []


class TestThreads:
    """What becomes of a driver in another thread than the test's own."""

    def test_a_crash_there_is_told_to_the_test_as_well(self, kdriver: Driver) -> None:
        with kdriver.running(), kdriver.device(PATH) as device, ThreadPoolExecutor() as others:
            assert isinstance(
                others.submit(device.ioctl, CRASH, number(1)).exception(), DriverCrashed
            )
            with pytest.raises(DriverCrashed, match="page fault"):
                kdriver.stop()

    def test_a_hang_there_is_told_to_the_test_as_well(self, kdriver: Driver) -> None:
        with kdriver.running(), kdriver.device(PATH) as device, ThreadPoolExecutor() as others:
            hang = others.submit(device.ioctl, HANG, FOR_EVER, timeout=0.2)
            assert isinstance(hang.exception(), DriverTimeout)
            with pytest.raises(DriverTimeout, match=r"ioctl 0x222014 of .* did not return"):
                kdriver.stop()

    def test_what_nobody_asks_for_fails_the_test(self, kdriver_target: TargetHandle) -> None:
        with (
            pytest.raises(DriverCrashed),
            kdriver_target.driver("echo") as echo,
            echo.running(),
            echo.device(PATH) as device,
            ThreadPoolExecutor() as others,
        ):
            others.submit(device.ioctl, CRASH, number(2))

    def test_who_waits_behind_what_is_cut_short_is_told_by_what(self, kdriver: Driver) -> None:
        with kdriver.running(), kdriver.device(PATH) as device, ThreadPoolExecutor() as others:
            slow = others.submit(device.ioctl, HANG, FOR_EVER)
            kdriver.dbgprint.wait_for("hanging")
            with pytest.raises(DriverTimeout, match=r"ioctl 0x222000 of .* did not return"):
                device.ioctl(ECHO, timeout=0.2)
            told = str(slow.exception()).partition("\n")[0]
            assert told.endswith("failed with STATUS_FILE_DELETED (0xC0000123); echo was cut short")


class TestCrash:
    @pytest.mark.parametrize(
        ("how", "what"),
        [
            (0, r"bug check 0x52555354 .*panicked at echo/src/lib\.rs:\d+"),
            (1, r"page fault: write access to 0x10 at .*echo/src/lib\.rs:\d+ in echo::crash"),
            (2, r"bug check 0xE2E2 \(0x1, 0x2, 0x3, 0x4\), at .*echo/src/lib\.rs:\d+"),
        ],
        ids=["panic", "page-fault", "bug-check"],
    )
    def test_in_an_ioctl_is_raised_by_it_with_file_and_line(
        self, kdriver: Driver, how: int, what: str
    ) -> None:
        with kdriver.running(), kdriver.device(PATH) as device:
            with pytest.raises(DriverCrashed, match=what):
                device.ioctl(CRASH, number(how))
            with pytest.raises(DeviceError):
                device.read(1)
        with kdriver.running(), kdriver.device(PATH) as device:
            assert device.ioctl(COUNT, output_size=4) == number(1)
