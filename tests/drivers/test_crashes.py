"""Drivers that panic, hang, or don't want to go."""

import pytest

from pytest_kdriver import Driver, DriverCrashed, DriverTimeout, UnloadRefused

RUST = 0x52555354
"""What the framework's panic handler bug-checks with."""


@pytest.mark.kdriver("panics")
def test_a_panic_says_where(kdriver: Driver) -> None:
    with pytest.raises(DriverCrashed) as crash:
        kdriver.start()
    assert crash.value.code == RUST
    kdriver.dbgprint.fnmatch_lines(["about to panic", "panicked at panics?src?lib.rs:*"])


@pytest.mark.kdriver("panics", parameters={"Where": "cleanup", "How": "page-fault"})
def test_a_page_fault_has_its_address(kdriver: Driver) -> None:
    kdriver.start()
    with pytest.raises(DriverCrashed, match="page fault: write access to 0x10"):
        kdriver.stop()


@pytest.mark.kdriver("stubborn")
def test_a_driver_without_unload_says_so(kdriver: Driver) -> None:
    kdriver.start()
    with pytest.raises(UnloadRefused):
        kdriver.stop()


@pytest.mark.kdriver("stubborn", parameters={"How": "slow-init", "Busy": 1}, timeout=3)
def test_a_driver_that_hangs_is_cut_short(kdriver: Driver) -> None:
    with pytest.raises(DriverTimeout, match="DriverEntry did not return"):
        kdriver.start()
    kdriver.dbgprint.expect("slow")
