"""The driver that says hello."""

import pytest

from pytest_kdriver import NTSTATUS, Driver


@pytest.mark.kdriver("hello")
def test_says_hello_and_goodbye(kdriver: Driver) -> None:
    with kdriver.running():
        kdriver.dbgprint.expect("Hello, world!")
    assert kdriver.dbgprint.lines == ["Hello, world!", "Bye bye!"]


@pytest.mark.kdriver("hello")
def test_can_be_started_again_and_again(kdriver: Driver) -> None:
    for cycle in kdriver.cycle(5):
        assert cycle.status == NTSTATUS.STATUS_SUCCESS
        assert cycle.lines == ["Hello, world!", "Bye bye!"]
        assert not cycle.leaked


@pytest.mark.kdriver("hello")
def test_is_a_service_like_any_other(kdriver: Driver) -> None:
    assert kdriver.start_service() == 0
    assert kdriver.service_state is not None
    assert kdriver.service_state.name == "RUNNING"
    kdriver.stop()
    assert kdriver.service_state.name == "STOPPED"
