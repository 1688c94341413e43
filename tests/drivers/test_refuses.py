"""The driver whose init refuses."""

import pytest

from pytest_kdriver import NTSTATUS, Driver, StartFailed


@pytest.mark.kdriver("refuses", parameters={"Status": 0xC00000A1})
def test_init_error_reaches_the_loader(kdriver: Driver) -> None:
    assert kdriver.start(check=False) == NTSTATUS.STATUS_WORKING_SET_QUOTA


@pytest.mark.kdriver("refuses", parameters={"Status": 0xC0DE1234})
def test_a_status_of_one_s_own_is_exact(kdriver: Driver) -> None:
    with pytest.raises(StartFailed, match="0xC0DE1234") as failure:
        kdriver.start()
    assert failure.value.status == 0xC0DE1234


@pytest.mark.kdriver("refuses")
def test_what_init_allocated_is_freed_when_it_refuses(kdriver: Driver) -> None:
    assert kdriver.start(check=False) == NTSTATUS.STATUS_UNSUCCESSFUL
    assert kdriver.pool.allocated
    assert not kdriver.pool.leaked
