"""Leaks on a kernel without a trace, by its counters: a simulated NT. Not verified on Windows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run, Verdicts, failure
from tests.nt.project import nt_project

DEAF = """
from tests.nt.guest import NtGuest

NtGuest._pool_tags = lambda self: b""  # a kernel whose answer makes no sense
"""


@pytest.fixture
def project(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path
) -> pytest.Pytester:
    return nt_project(monkeypatch, request, tmp_path)


def test_a_leaking_driver_fails_with_the_table_and_a_clean_one_passes(
    project: pytest.Pytester, run: Run, verdicts: Verdicts
) -> None:
    project.makepyfile(
        """
        import pytest

        @pytest.mark.kdriver("leaks.sys", parameters={"Blocks": 3, "Bytes": 100})
        def test_leaks(kdriver):
            with kdriver.running(): pass

        @pytest.mark.kdriver("leaks.sys", parameters={"Blocks": 0})
        def test_clean(kdriver):
            with kdriver.running(): pass

        @pytest.mark.kdriver("refuses.sys", parameters={"Blocks": 2})
        def test_refuses_and_leaks(kdriver):
            kdriver.start(check=False)

        @pytest.mark.kdriver("leaks.sys", parameters={"Blocks": 1})
        def test_told_beside_what_the_body_raised(kdriver):
            kdriver.start()
            kdriver.stop()
            assert False

        @pytest.mark.kdriver("leaks.sys", tags=["leak", "Irp "], parameters={"Blocks": 2})
        def test_leaks_among_others(kdriver):
            with kdriver.running(): pass
        """
    )
    result = run()
    assert verdicts(result) == {
        "test_leaks[nt]": "FAILED",
        "test_clean[nt]": "PASSED",
        "test_refuses_and_leaks[nt]": "FAILED",
        "test_told_beside_what_the_body_raised[nt]": "FAILED",
        "test_leaks_among_others[nt]": "FAILED",
    }
    leak = failure(result, "test_leaks[nt]")
    assert "leaks on nt: 3 blocks, 300 bytes leaked:" in leak
    assert "    3 blocks         300 bytes  tag 'leak'  NonPaged  from unknown" in leak
    assert "The kernel's counters name no caller" in leak
    assert "refuses on nt: 2 blocks, 200 bytes" in failure(result, "test_refuses_and_leaks[nt]")
    beside = failure(result, "test_told_beside_what_the_body_raised[nt]")
    assert "1 block, 64 bytes leaked" in beside
    noisy = failure(result, "test_leaks_among_others[nt]")
    assert "2 blocks         128 bytes  tag 'leak'" in noisy
    assert "Tag 'Irp ' may be others' as well" in noisy
    assert "were still changing" in noisy


def test_many_cycles_tell_what_each_leaves(
    project: pytest.Pytester, run: Run, verdicts: Verdicts
) -> None:
    project.makepyfile(
        """
        import pytest

        @pytest.mark.kdriver("leaks.sys", parameters={"Blocks": 1, "Bytes": 20}, leaks="allow")
        def test_cycles(kdriver):
            cycles = kdriver.cycle(10)
            assert [cycle.leaked.total_count for cycle in cycles] == [1] * 10
            (growth,) = cycles.growth
            assert (growth.tag, growth.blocks, growth.size) == ("leak", 1, 20)
            assert growth.certain

        @pytest.mark.kdriver("leaks.sys", parameters={"Blocks": 0})
        def test_clean_cycles(kdriver):
            assert kdriver.cycle(10).growth == ()
        """
    )
    result = run()
    assert verdicts(result) == {"test_cycles[nt]": "PASSED", "test_clean_cycles[nt]": "PASSED"}


def test_what_takes_single_blocks_is_skipped(
    project: pytest.Pytester, run: Run, verdicts: Verdicts
) -> None:
    project.makepyfile(
        """
        import pytest

        @pytest.mark.kdriver("hello.sys", requires="pool-blocks")
        def test_blocks(kdriver):
            assert not kdriver.pool.allocated

        @pytest.mark.kdriver("hello.sys", requires="pool")
        def test_leaks(kdriver):
            with kdriver.running(): pass
            assert not kdriver.pool.leaked
        """
    )
    result = run()
    assert verdicts(result) == {"test_blocks[nt]": "SKIPPED", "test_leaks[nt]": "PASSED"}


def test_a_kernel_that_does_not_tell_its_counters_has_no_view_of_the_pool(
    project: pytest.Pytester, run: Run, verdicts: Verdicts
) -> None:
    project.makeconftest(DEAF)
    project.makepyfile(
        """
        import pytest

        @pytest.mark.kdriver("hello.sys", requires="pool")
        def test_requires(kdriver):
            pass

        @pytest.mark.kdriver("hello.sys")
        def test_blind(kdriver):
            with kdriver.running(): pass

        @pytest.mark.kdriver("hello.sys", leaks="allow")
        def test_allowed(kdriver):
            with kdriver.running(): pass
        """
    )
    result = run()
    assert verdicts(result) == {
        "test_requires[nt]": "SKIPPED",
        "test_blind[nt]": "FAILED",
        "test_allowed[nt]": "PASSED",
    }
    assert "whether it leaks can't be seen on target 'nt'" in failure(result, "test_blind[nt]")
