"""The framework that the sample drivers are written on, in a kernel."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from pytest_kdriver import (
    NTSTATUS,
    DeviceError,
    Driver,
    DriverCrashed,
    StopFailed,
    TargetHandle,
    ctl_code,
)
from pytest_kdriver.image.cargo import Cargo

MOST_ALLOCATIONS = 50
CODE = Path(__file__).parents[2] / "drivers"
CHECKS: dict[str, int | str | bytes | list[str]] = {
    "Dword": 7,
    "Qword": (1 << 32) + 8,
    "Text": "text",
    "Texts": ["one", "two"],
    "Bytes": b"\xa5" * 100,
}


@pytest.mark.parametrize(
    ("name", "parameters", "outcome"),
    [
        ("hello", {}, (NTSTATUS.STATUS_SUCCESS, 0)),
        ("refuses", {"Status": 0xC00000A1}, (NTSTATUS.STATUS_WORKING_SET_QUOTA, 0)),
        ("leaks", {"Blocks": 1}, (NTSTATUS.STATUS_SUCCESS, 1)),
        (
            "leaks",
            {"Blocks": 2, "Names": 1, "Tags": ["aaaa", "leak"]},
            (NTSTATUS.STATUS_SUCCESS, 3),
        ),
    ],
)
def test_each_allocation_that_fails_is_an_error_and_leaves_nothing(
    kdriver_target: TargetHandle,
    cargo: Cargo,
    name: str,
    parameters: dict[str, int | list[str]],
    outcome: tuple[NTSTATUS, int],
) -> None:
    image = str(cargo.build(name, features=["fail-allocation"]))
    for number in range(1, MOST_ALLOCATIONS):
        with kdriver_target.driver(
            image, parameters={**parameters, "FailAllocation": number}, leaks="allow"
        ) as driver:
            status = driver.start(check=False)
            if driver.loaded:
                driver.stop()
            if status != NTSTATUS.STATUS_INSUFFICIENT_RESOURCES:
                break
            assert driver.pool.leaked == [], f"allocation {number}"
            assert not driver.pool.double_frees
    assert number > 1, "it allocates, so the first one can fail"
    assert (status, driver.pool.leaked.total_count) == outcome


def test_echo_survives_each_allocation_that_fails(
    kdriver_target: TargetHandle, cargo: Cargo
) -> None:
    image = str(cargo.build("echo", features=["fail-allocation"]))
    where = set()
    for number in range(1, MOST_ALLOCATIONS):
        with kdriver_target.driver(image, parameters={"FailAllocation": number}) as driver:
            if not driver.start(check=False).is_success:
                assert driver.last_status == NTSTATUS.STATUS_INSUFFICIENT_RESOURCES
                assert driver.pool.leaked == [], f"allocation {number}"
                where.add("init")
                continue
            with driver.device(r"\\.\Echo") as echo:
                failed = [
                    _is_refused(lambda: echo.write(b"first")),
                    _is_refused(lambda: echo.write(b"second")),
                    _is_refused(lambda: echo.ioctl(ctl_code(0x806), b"\0\0\0\0")),  # leaks nothing
                ]
                # What could not be written has changed nothing.
                expected = b"first" if failed[1] else b"second"
                assert echo.read(100) == (b"" if failed[:2] == [True, True] else expected)
        if not any(failed):
            break
        where.add("write")
    assert where == {"init", "write"}


def _is_refused(call: Callable[[], object]) -> bool:
    """Whether a call of a device fails for want of memory."""
    try:
        call()
    except DeviceError as error:
        if error.status != NTSTATUS.STATUS_INSUFFICIENT_RESOURCES:
            raise
        return True
    return False


@pytest.mark.kdriver("checks", parameters=CHECKS)
def test_checks_of_its_own_pass(kdriver: Driver, kdriver_target: TargetHandle) -> None:
    kdriver.start(check=False)
    assert [line for line in kdriver.dbgprint.lines if line.startswith("failed")] == []
    assert kdriver.loaded
    kdriver.dbgprint.fnmatch_lines(
        [
            "passed: parameters",
            "passed: mismatches",
            "passed: alignment",
            "passed: growth",
            "passed: no memory",
            "passed: stack",
            "passed: format",
            "100%s of this*is text",
            "[[]checks*lib.rs:*] 21 * 2 = 42",
            "passed: print",
            "passed: sleep",
            "passed: devices",
        ]
    )
    kdriver.stop()
    key = "HKLM\\SYSTEM\\CurrentControlSet\\Services\\checks\\Parameters"
    add = ["reg", "add", key, "/v", "Expandable", "/t", "REG_EXPAND_SZ", "/d", "%text%", "/f"]
    assert kdriver_target.run(add).exit_code == 0
    assert kdriver.start() == 0


GOING = [
    "device 2 goes, to open and read it: Err(Error(0xC0000056))",  # STATUS_DELETE_PENDING
    "device 1 goes, to open and read it: Err(Error(0xC0000056))",
]


@pytest.mark.kdriver("checks", parameters=CHECKS)
def test_devices_go_before_cleanup_and_are_closed_to_all_while_they_do(kdriver: Driver) -> None:
    kdriver.start()
    kdriver.dbgprint.expect("passed: devices")
    kdriver.stop()
    assert kdriver.dbgprint.lines[-5:] == [
        *GOING,
        "cleanup",
        "a device in cleanup: Err(Error(0xC0000056))",
        "dropped",
    ]
    for path in (r"\\.\Checks1", r"\Device\Checks1"):
        with pytest.raises(DeviceError) as error, kdriver.device(path):
            pass
        assert error.value.status == NTSTATUS.STATUS_OBJECT_NAME_NOT_FOUND


@pytest.mark.kdriver("checks", parameters={**CHECKS, "Status": 0xC00000A1})
def test_an_init_that_fails_undoes_its_devices(kdriver: Driver) -> None:
    for _ in range(2):  # the second finds no name or link taken
        assert kdriver.start(check=False) == NTSTATUS.STATUS_WORKING_SET_QUOTA
        kdriver.dbgprint.expect("passed: devices")
        assert kdriver.dbgprint.lines[-2:] == GOING
    assert kdriver.pool.leaked == []
    with pytest.raises(DeviceError), kdriver.device(r"\\.\Checks1"):
        pass


@pytest.mark.kdriver("checks", parameters={**CHECKS, "Quiet": 1})
def test_an_unload_waits_for_the_request_that_is_going_on(
    kdriver: Driver, kdriver_target: TargetHandle
) -> None:
    """Wine, and no Windows, unloads a driver that something is open on, if it is not the plugin that asks."""

    def wait_for_the_unload() -> None:
        with suppress(DriverCrashed):
            device.ioctl(ctl_code(0x801))

    kdriver.start()
    # It is stopped behind the plugin's back, so whatever call comes next tells of a crash.
    with suppress(DriverCrashed, StopFailed), kdriver.device(r"\\.\Checks1") as device:
        request = threading.Thread(target=wait_for_the_unload)
        request.start()
        kdriver.dbgprint.expect("waiting")
        kdriver_target.run(["sc", "stop", "checks"])
        request.join()
        kdriver.stop()
    lines = kdriver.dbgprint.lines
    assert lines.index("waited") < lines.index("device 1 goes")
    assert lines[-1] == "dropped"


ANY_CODE = ctl_code(0x800)


@pytest.mark.kdriver("checks", parameters=CHECKS)
def test_nothing_of_the_kernel_s_memory_reaches_a_program(kdriver: Driver) -> None:
    """The device fills no buffer, and claims to have filled it and more."""
    with kdriver.running(), kdriver.device(r"\\.\Checks1") as device:
        for length in (0, 1, 4095, 4097, 100_000):
            assert device.read(length) == bytes(length)
            assert device.ioctl(ANY_CODE, output_size=length) == bytes(length)
            assert device.write(bytes(length)) == length
        assert device.ioctl(ANY_CODE, b"input", output_size=8) == b"input\0\0\0"
        assert device.ioctl(ANY_CODE, b"input", output_size=2) == b"in"
        assert device.ioctl(ANY_CODE, b"input") == b""


@pytest.mark.kdriver("checks", parameters=CHECKS)
@pytest.mark.parametrize("method", [1, 2, 3])
def test_a_control_whose_data_are_not_copied_is_refused(kdriver: Driver, method: int) -> None:
    with kdriver.running(), kdriver.device(r"\\.\Checks1") as device:
        with pytest.raises(DeviceError) as error:
            device.ioctl(ctl_code(0x800, method=method), b"input", output_size=5)
        assert error.value.status == NTSTATUS.STATUS_INVALID_DEVICE_REQUEST


@pytest.mark.kdriver("checks", parameters=CHECKS)
def test_who_was_refused_gets_nothing_and_closes_nothing(kdriver: Driver) -> None:
    """Wine opens without waiting for the driver's answer, so it comes with the first request."""
    with kdriver.running():
        with pytest.raises(DeviceError) as error, kdriver.device(r"\\.\Checks2") as device:
            device.read(1)
        assert error.value.status == NTSTATUS.STATUS_ACCESS_DENIED
        with kdriver.device(r"\\.\Checks1"):
            pass
        kdriver.dbgprint.expect("device 1 closed")
    assert "device 2 closed" not in kdriver.dbgprint.lines


@pytest.mark.kdriver("leaks", parameters={"Blocks": 2, "Names": 1}, leaks="allow")
def test_two_leaks_of_one_run_are_two_lines_of_the_source(kdriver: Driver) -> None:
    with kdriver.running():
        pass
    source = (CODE / "leaks" / "src" / "lib.rs").read_text().splitlines()
    lines = {}
    for use in kdriver.pool.leaked:
        frame = use.caller.own_frames[0]
        assert frame.file is not None
        assert frame.line is not None
        assert frame.file.replace("\\", "/").endswith("leaks/src/lib.rs")
        lines[source[frame.line - 1].strip()] = use.count
    assert lines == {
        "buffer.try_reserve_exact(self.bytes)?;": 2,
        "name.try_reserve_exact(self.bytes)?;": 1,
    }


@pytest.mark.kdriver("missing")
def test_a_function_that_no_kernel_has_is_named(kdriver: Driver) -> None:
    with pytest.raises(DriverCrashed, match=r"ntoskrnl\.exe!KdriverNoSuchExport") as crash:
        kdriver.start()
    assert crash.value.address is not None


@pytest.mark.parametrize("where", ["init", "cleanup"])
def test_a_panic_names_its_place_in_the_source(kdriver_target: TargetHandle, where: str) -> None:
    with kdriver_target.driver("panics", parameters={"Where": where}) as driver:
        if where == "cleanup":
            driver.start()
        with pytest.raises(DriverCrashed) as crash:
            (driver.start if where == "init" else driver.stop)()
        line = driver.dbgprint.wait_for("panicked at *: as it was told", timeout=0)
        place = re.match(r"panicked at panics[\\/]src[\\/]lib.rs:(\d+):(\d+): ", line)
        assert place is not None
        source = (CODE / "panics" / "src" / "lib.rs").read_text().splitlines()
        number, column = int(place[1]), int(place[2])
        assert source[number - 1][column - 1 :].startswith('panic!("as it was told")')
        assert crash.value.code == 0x52555354
        assert crash.value.parameters[:2] == (number, column)
