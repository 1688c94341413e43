"""The DbgPrint and pool views of a window, and crashes, from events made by hand."""

from __future__ import annotations

import threading

import pytest

from pytest_kdriver.errors import DriverCrashed, DriverError, NoSuchLine
from pytest_kdriver.kernel.bugcheck import describe, find_crash
from pytest_kdriver.kernel.dbgprint import DbgPrint
from pytest_kdriver.kernel.events import (
    BugCheck,
    DebugPrint,
    DriverInitCalled,
    Event,
    Fence,
    ImageLoaded,
    MissingExport,
    PoolAllocated,
    PoolFreed,
    ProcessDied,
    UnhandledException,
)
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.kernel.pool import Pool, PoolUses
from pytest_kdriver.kernel.text import describe_event, kernel_lines

BASE = 0x180000000


def crashed() -> DriverCrashed:
    return DriverCrashed("it crashed", driver="a", target="t")


def printed(*texts: str) -> tuple[KernelLog, DbgPrint]:
    log = KernelLog()
    view = DbgPrint(log.window("a"), driver="a", target="t", on_crash=crashed)
    log.append([DebugPrint(0.0, "a", text.encode()) for text in texts])
    return log, view


def test_lines_are_cut_at_newlines_and_calls_are_never_joined() -> None:
    _, view = printed("one\n", "two\nthree\n", "part ", "part\n", "\n", "gap\n\n")
    assert view.lines == ["one", "two", "three", "part ", "part", "", "gap", ""]


def test_expect_finds_the_next_whole_line_and_moves_on() -> None:
    _, view = printed("a\n", "b\na\n", "c\n")
    view.expect("a", timeout=0)
    view.expect("a", timeout=0)
    with pytest.raises(NoSuchLine, match=r"no line 'a' within 0 s; what was printed:\n    c"):
        view.expect("a", timeout=0)
    assert view.expect("c", timeout=0) == "c"
    with pytest.raises(NoSuchLine, match="nothing was printed"):
        view.expect("c", timeout=0)


def test_expect_takes_two_lines_of_one_call_one_by_one() -> None:
    _, view = printed("x\nx\n")
    view.expect("x", timeout=0)
    view.expect("x", timeout=0)
    with pytest.raises(NoSuchLine):
        view.expect("x", timeout=0)


def test_expect_is_no_pattern_and_no_part() -> None:
    _, view = printed("count *\n")
    with pytest.raises(NoSuchLine):
        view.expect("count", timeout=0)
    view.expect("count *", timeout=0)


def test_wait_for_is_a_pattern_and_shares_the_cursor() -> None:
    _, view = printed("read 1\n", "read 2\n", "done\n")
    assert view.wait_for("read ?", timeout=0) == "read 1"
    assert view.wait_for("read *", timeout=0) == "read 2"
    assert view.expect("done", timeout=0) == "done"


def test_expect_waits_for_what_is_printed_later() -> None:
    log, view = printed()
    timer = threading.Timer(0.05, lambda: log.append([DebugPrint(0.0, "a", b"late\n")]))
    timer.start()
    assert view.expect("late", timeout=30) == "late"
    timer.join()


def test_waiting_for_a_line_ends_when_the_driver_crashes() -> None:
    log, view = printed("x\n")
    log.append([BugCheck(0.0, "a", 1, ())])
    with pytest.raises(DriverCrashed):
        view.expect("never", timeout=30)


def test_looking_does_not_move_the_cursor() -> None:
    _, view = printed("a\n", "b\n")
    view.fnmatch_lines(["a", "b"])
    view.re_match_lines(["[ab]", "b$"])
    view.no_fnmatch_line("c*")
    assert view.lines == ["a", "b"]
    view.expect("a", timeout=0)


def test_lines_are_matched_in_order_with_others_between() -> None:
    _, view = printed("a\n", "b\n", "c\n")
    view.fnmatch_lines(["a", "c"])
    with pytest.raises(NoSuchLine, match="no line matching 'a'"):
        view.fnmatch_lines(["c", "a"])
    with pytest.raises(NoSuchLine, match="matches 'b', and none should: 'b'"):
        view.no_fnmatch_line("b")


def test_raw_keeps_the_bytes() -> None:
    log, view = printed()
    log.append([DebugPrint(0.0, "a", b"\xff\n"), DebugPrint(0.0, "b", b"other\n")])
    assert view.raw == [b"\xff\n"]
    assert view.lines == ["\\xff"]
    assert [event.driver for event in view.events] == ["a"]


# pool


def allocated(address: int, size: int = 10, tag: bytes = b"rust", caller: int = BASE + 1) -> Event:
    return PoolAllocated(0.0, "a", address, size, tag, "PagedPool", caller)


def freed(address: int, tag: bytes | None = b"rust", *, found: bool = True) -> Event:
    return PoolFreed(0.0, "a", address, tag, BASE + 2, found)


def pool(*events: Event, loaded: bool = False, tags: tuple[str, ...] = ()) -> Pool:
    log = KernelLog()
    window = log.window("a")
    log.append([DriverInitCalled(0.0, "a", 1, BASE), ImageLoaded(0.0, "a", BASE, 0x1000), *events])

    def refuse(unloaded: bool) -> None:
        if unloaded and loaded:
            raise DriverError("it is still loaded", driver="a", target="t")

    return Pool(window, driver="a", tags=tags, refuse=refuse)


def test_what_was_freed_is_not_leaked() -> None:
    view = pool(allocated(1), allocated(2), freed(1), freed(2, None))
    assert not view.leaked
    assert view.leaked == []
    assert view.allocated.total_count == 2
    assert view.problems(leaks=True) == ""


def test_leaks_are_grouped_by_tag_and_caller_the_largest_first() -> None:
    view = pool(
        allocated(1),
        allocated(2),
        allocated(3, 100),
        allocated(4, 7, b"ab\0\0"),
        allocated(5, 5, caller=BASE + 9),
    )
    assert [(use.tag, use.size, use.count, str(use.caller)) for use in view.leaked] == [
        ("rust", 120, 3, "a+0x1"),
        ("ab", 7, 1, "a+0x1"),
        ("rust", 5, 1, "a+0x9"),
    ]
    assert view.leaked.total_size == 132
    assert view.leaked.total_count == 5
    assert "132 bytes leaked" in view.problems(leaks=True)
    assert view.problems(leaks=False) == ""


def test_a_loaded_driver_has_leaked_nothing_yet() -> None:
    view = pool(allocated(1), loaded=True)
    with pytest.raises(DriverError, match="still loaded"):
        _ = view.leaked
    assert view.in_use.total_size == 10


def test_a_block_that_is_freed_twice() -> None:
    view = pool(allocated(1), freed(1), freed(1, found=False))
    (double,) = view.double_frees
    assert (double.address, str(double.caller)) == (1, "a+0x2")
    assert "freed twice" in view.problems(leaks=False)


def test_a_block_that_was_allocated_again_is_not_freed_twice() -> None:
    assert not pool(allocated(1), freed(1), allocated(1), freed(1)).double_frees


def test_a_free_of_what_was_never_seen_is_no_double_free() -> None:
    assert not pool(freed(99, found=False)).double_frees


def test_a_free_with_another_tag() -> None:
    view = pool(allocated(1), freed(1, b"Wrng"))
    (wrong,) = view.wrong_tags
    assert (wrong.allocated_tag, wrong.tag) == ("rust", "Wrng")
    assert not view.leaked
    assert "wrong tag" in view.problems(leaks=False)


def test_calls_from_outside_of_the_image_do_not_count() -> None:
    assert not pool(allocated(1, caller=0x7000)).leaked


def test_only_the_asked_tags_count() -> None:
    view = pool(allocated(1), allocated(2, tag=b"mine"), tags=("mine",))
    assert [use.tag for use in view.leaked] == ["mine"]


def test_the_next_load_s_addresses_are_others() -> None:
    view = pool(
        allocated(1),
        DriverInitCalled(0.0, "a", 2, BASE + 0x100000),
        ImageLoaded(0.0, "a", BASE + 0x100000, 0x1000),
        allocated(1, caller=BASE + 0x100001),
        PoolFreed(0.0, "a", 1, b"rust", BASE + 0x100002, True),
    )
    (leak,) = view.leaked
    assert (leak.count, leak.size) == (1, 10)


def test_the_same_place_in_another_load_is_the_same_caller() -> None:
    second = BASE + 0x100000
    view = pool(
        allocated(1),
        DriverInitCalled(0.0, "a", 2, second),
        ImageLoaded(0.0, "a", second, 0x1000),
        allocated(1, caller=second + 1),
    )
    assert [str(use.caller) for use in view.leaked] == ["a+0x1"]
    assert view.leaked[0].count == 2


def test_pool_uses_are_a_sequence() -> None:
    leaked = pool(allocated(1), allocated(2, tag=b"x")).leaked
    assert isinstance(leaked[0:1], PoolUses)
    assert list(leaked) == [leaked[0], leaked[1]]
    assert repr(leaked).startswith("PoolUses([PoolUse(")
    assert str(PoolUses()) == "nothing"


# crashes


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (BugCheck(0.0, "a", 0xE2E2, (1, 2)), "bug check 0xE2E2 (0x1, 0x2)"),
        (
            UnhandledException(0.0, "a", 0x80000003, 16),
            "STATUS_BREAKPOINT (0x80000003) at address 0x10",
        ),
        (
            UnhandledException(0.0, "a", 5, 16, ("read", 1)),
            "page fault: read access to 0x1 at address 0x10",
        ),
        (MissingExport(0.0, "a", "ntoskrnl.exe", "Nope", 16), "ntoskrnl.exe!Nope"),
        (ProcessDied(0.0, "a", 1, 9), "exit code 0x9"),
        (ProcessDied(0.0, "a", 1, None), "unknown exit code"),
    ],
)
def test_a_crash_is_told_in_words(
    event: BugCheck | UnhandledException | MissingExport | ProcessDied, words: str
) -> None:
    assert words in describe(event)
    log = KernelLog()
    log.append([event])
    crash = find_crash(log.window("a", 0), "a")
    assert crash is not None
    assert words in crash.description
    assert describe_event(event)


def test_another_driver_s_crash_is_not_ours() -> None:
    log = KernelLog()
    log.append([UnhandledException(0.0, "b", 1, 1), ProcessDied(0.0, "b", 1, 1)])
    assert find_crash(log.window(None, 0), "a") is None


def test_a_bug_check_of_nobody_is_everybody_s() -> None:
    log = KernelLog()
    log.append([BugCheck(0.0, None, 1, ())])
    assert find_crash(log.window("a", 0), "a") is not None


def test_an_exception_of_nobody_is_ours_only_if_we_died() -> None:
    log = KernelLog()
    log.append([UnhandledException(0.0, None, 0xC0000005, 1)])
    assert find_crash(log.window("a", 0), "a") is None
    log.append([ProcessDied(0.0, "a", 1, 1)])
    crash = find_crash(log.window("a", 0), "a")
    assert crash is not None
    assert "ended" in crash.description


def test_the_last_lines_leave_pool_calls_and_fences_out() -> None:
    log = KernelLog()
    log.append([allocated(1), Fence(0.0, None, "x"), DebugPrint(1.5, "a", b"hi\n")])
    assert kernel_lines(log.window("a", 0), 10) == ["   1.500  a: hi"]
