"""The driver that prints a lot."""

import pytest

from pytest_kdriver import Driver


@pytest.mark.kdriver("chatty", parameters={"Lines": 5000, "Length": 80})
def test_no_line_is_lost(kdriver: Driver) -> None:
    with kdriver.running():
        lines = kdriver.dbgprint.lines
    assert [int(line.split()[0]) for line in lines] == list(range(1, 5001))
    assert {len(line) for line in lines} == {80}


@pytest.mark.kdriver("chatty", parameters={"Lines": 2, "Length": 1200})
def test_a_long_line_comes_in_pieces_of_500_bytes(kdriver: Driver) -> None:
    with kdriver.running():
        lines = kdriver.dbgprint.lines
    assert [len(line) for line in lines] == [500, 500, 200] * 2
