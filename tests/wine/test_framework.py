"""The framework that the sample drivers are written on, in a kernel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pytest_kdriver import NTSTATUS, Driver, DriverCrashed, TargetHandle
from pytest_kdriver.image.cargo import Cargo

MOST_ALLOCATIONS = 50
CODE = Path(__file__).parents[2] / "drivers"


@pytest.mark.parametrize(
    ("name", "parameters", "outcome"),
    [
        ("hello", {}, (NTSTATUS.STATUS_SUCCESS, 0)),
        ("refuses", {"Status": 0xC00000A1}, (NTSTATUS.STATUS_WORKING_SET_QUOTA, 0)),
        ("leaks", {"Blocks": 1}, (NTSTATUS.STATUS_SUCCESS, 1)),
        ("leaks", {"Blocks": 3, "Tags": ["aaaa", "leak"]}, (NTSTATUS.STATUS_SUCCESS, 3)),
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


@pytest.mark.kdriver(
    "checks",
    parameters={
        "Dword": 7,
        "Qword": (1 << 32) + 8,
        "Text": "text",
        "Texts": ["one", "two"],
        "Bytes": b"\xa5" * 100,
    },
)
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
        ]
    )
    kdriver.stop()
    assert kdriver.dbgprint.lines[-2:] == ["cleanup", "dropped"]
    key = "HKLM\\SYSTEM\\CurrentControlSet\\Services\\checks\\Parameters"
    add = ["reg", "add", key, "/v", "Expandable", "/t", "REG_EXPAND_SZ", "/d", "%text%", "/f"]
    assert kdriver_target.run(add).exit_code == 0
    assert kdriver.start() == 0


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
