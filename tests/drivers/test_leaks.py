"""The driver that leaks: a leak fails a test without a word, so these say that they want one."""

import pytest

from pytest_kdriver import Driver, PoolError


@pytest.mark.kdriver("leaks", parameters={"Blocks": 3, "Bytes": 100}, leaks="allow")
def test_each_leaked_block_is_counted(kdriver: Driver) -> None:
    with kdriver.running():
        assert kdriver.pool.in_use.total_size == 300
    (leak,) = kdriver.pool.leaked
    assert (leak.tag, leak.count, leak.size, leak.pool_type) == ("leak", 3, 300, "NonPagedPoolNx")


@pytest.mark.kdriver(
    "leaks", parameters={"Blocks": 4, "Tags": ["aaaa", "bbbb"], "Where": "cleanup"}, leaks="allow"
)
def test_leaks_of_the_cleanup_are_told_apart_by_tag(kdriver: Driver) -> None:
    with kdriver.running():
        assert kdriver.pool.in_use.total_count < 4
    leaked = kdriver.pool.leaked
    assert {use.tag for use in leaked} == {"aaaa", "bbbb"}
    assert leaked.total_count == 4


@pytest.mark.kdriver("leaks", parameters={"Blocks": 0})
def test_a_driver_that_leaks_nothing_passes(kdriver: Driver) -> None:
    with kdriver.running():
        pass
    assert kdriver.pool.leaked.total_size == 0


@pytest.mark.xfail(raises=PoolError, reason="it leaks, and nobody allowed it")
@pytest.mark.kdriver("leaks")
def test_a_leak_fails_a_test_without_a_word(kdriver: Driver) -> None:
    with kdriver.running():
        pass
