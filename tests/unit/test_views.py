"""The DbgPrint and pool views of a window, and crashes, from events made by hand."""

from __future__ import annotations

import threading
import tomllib
from pathlib import Path

import pytest

from pytest_kdriver.errors import DriverCrashed, DriverError, NoSuchLine
from pytest_kdriver.kernel.caller import FRAMEWORK, Frame
from pytest_kdriver.kernel.crash import describe, find_crash, locate_crash
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
    PoolStack,
    ProcessDied,
    UnhandledException,
)
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.kernel.pool import Pool, PoolUses
from pytest_kdriver.kernel.text import describe_event, kernel_lines
from pytest_kdriver.source_frame import SourceFrame

BASE = 0x180000000
OWN = "/home/me/drivers/a/src/lib.rs"
RAW_VEC = r"\rustc\59807616e1fa\library\alloc\src\raw_vec\mod.rs"


class Source:
    """Symbols of image ``a``: what is at each offset, and how often they were asked for."""

    def __init__(
        self, known: dict[int, list[SourceFrame]] | None = None, problem: str | None = None
    ) -> None:
        self.problem = problem
        self.loads = 0
        self._known = known or {}

    def load(self) -> Source:
        self.loads += 1
        return self

    def locate(self, offset: int) -> tuple[SourceFrame, ...]:
        return tuple(self._known.get(offset, ()))


ALLOCATOR = SourceFrame(
    "windows_kernel_rs::allocator::impl$1::alloc", "/w/windows-kernel-rs/src/allocator.rs", 62
)
SOURCE = {
    0x000: [ALLOCATOR],
    0x0FF: [
        SourceFrame("alloc::raw_vec::RawVec<u8>::grow_one", RAW_VEC, 10),
        SourceFrame("a::push", OWN, 20),
        SourceFrame("a::fill", OWN, 30),
    ],
    0x1FF: [
        SourceFrame("alloc::raw_vec::RawVec<u8>::finish_grow", RAW_VEC, 11),
        SourceFrame("a::push", OWN, 20),
        SourceFrame("a::fill", OWN, 30),
    ],
    0x2FF: [SourceFrame("a::push", OWN, 20), SourceFrame("a::other", OWN, 40)],
    0x3FF: [SourceFrame("a::init", OWN, 50)],
}


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


def stack(address: int, *offsets: int) -> Event:
    return PoolStack(0.0, "a", address, (*(BASE + offset for offset in offsets), 0x7000))


def pool(
    *events: Event,
    loaded: bool = False,
    tags: tuple[str, ...] = (),
    source: Source | None = None,
) -> Pool:
    log = KernelLog()
    window = log.window("a")
    log.append([DriverInitCalled(0.0, "a", 1, BASE), ImageLoaded(0.0, "a", BASE, 0x1000), *events])

    def refuse(unloaded: bool) -> None:
        if unloaded and loaded:
            raise DriverError("it is still loaded", driver="a", target="t")

    return Pool(
        window,
        driver="a",
        tags=tags,
        load_symbols=source.load if source else None,
        refuse=refuse,
    )


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


OVERLAPPING = BASE + 0x800
"""Where a second load lies that begins in the middle of where the first was."""


@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_overlapping_loads_are_told_apart_by_when_they_were(told: bool) -> None:
    source = Source(SOURCE)
    second: list[Event] = [
        DriverInitCalled(0.0, "a", 2, OVERLAPPING),
        *([ImageLoaded(0.0, "a", OVERLAPPING, 0x1000)] if told else []),
        allocated(2, caller=OVERLAPPING + 0x400),
        PoolFreed(0.0, "a", 2, b"Wrng", OVERLAPPING + 0x300, True),
        allocated(3, caller=OVERLAPPING + 0x400),
    ]
    view = pool(allocated(1, caller=BASE + 0x400), *second, source=source)
    (leak,) = view.leaked
    assert (leak.count, str(leak.caller)) == (2, f"{OWN}:50 in a::init")
    (wrong,) = view.wrong_tags
    assert str(wrong.caller) == f"{OWN}:20 in a::push"
    assert str(wrong.allocated_by) == f"{OWN}:50 in a::init"


def test_one_address_in_two_loads_is_two_places() -> None:
    view = pool(
        allocated(1, caller=BASE + 0xC00),
        DriverInitCalled(0.0, "a", 2, OVERLAPPING),
        ImageLoaded(0.0, "a", OVERLAPPING, 0x1000),
        allocated(2, caller=BASE + 0xC00),
    )
    assert sorted(str(use.caller) for use in view.leaked) == ["a+0x400", "a+0xC00"]


def test_what_is_problematic_of_a_later_start_is_told_by_its_own_load() -> None:
    log = KernelLog()
    log.append([DriverInitCalled(0.0, "a", 1, BASE), ImageLoaded(0.0, "a", BASE, 0x1000)])
    log.append([DriverInitCalled(0.0, "a", 2, OVERLAPPING)])
    start = len(log)
    log.append([ImageLoaded(0.0, "a", OVERLAPPING, 0x1000)])
    log.append([allocated(1, caller=OVERLAPPING + 0xFFF)])
    view = Pool(log.window("a", 0), driver="a", refuse=lambda _: None)
    assert "from a+0xFFF" in view.problems(leaks=True, start=start)


def test_a_block_with_its_stack_is_shown_by_the_driver_s_own_line_inlined_functions_counted() -> (
    None
):
    view = pool(allocated(1), stack(1, 1, 0x100, 0x400), source=Source(SOURCE))
    (leak,) = view.leaked
    assert str(leak.caller) == f"{OWN}:20 in a::push"
    assert leak.caller.frames == (
        Frame(BASE + 1, "a", 1, ALLOCATOR.function, ALLOCATOR.file, 62),
        Frame(BASE + 0x100, "a", 0x100, SOURCE[0xFF][0].function, RAW_VEC, 10),
        Frame(BASE + 0x100, "a", 0x100, "a::push", OWN, 20),
        Frame(BASE + 0x100, "a", 0x100, "a::fill", OWN, 30),
        Frame(BASE + 0x400, "a", 0x400, "a::init", OWN, 50),
        Frame(0x7000, None, 0x7000),
    )
    assert f"tag 'rust'  PagedPool  from {OWN}:20 in a::push" in view.problems(leaks=True)


def test_one_line_is_one_row_whatever_alloc_did_there() -> None:
    view = pool(
        allocated(1),
        stack(1, 1, 0x100, 0x400),
        allocated(2),
        stack(2, 1, 0x200, 0x400),
        source=Source(SOURCE),
    )
    (leak,) = view.leaked
    assert leak.count == 2


def test_rows_of_the_same_line_are_told_apart_by_who_called_it() -> None:
    view = pool(
        allocated(1, 30),
        stack(1, 1, 0x100, 0x400),
        allocated(2, 20),
        stack(2, 1, 0x300, 0x400),
        allocated(3, 10),
        stack(3, 1, 0x400),
        source=Source(SOURCE),
    )
    assert [line.partition("from ")[2] for line in str(view.leaked).splitlines()] == [
        f"{OWN}:20 in a::push, called from {OWN}:30 in a::fill",
        f"{OWN}:20 in a::push, called from {OWN}:40 in a::other",
        f"{OWN}:50 in a::init",
    ]


def test_rows_of_one_caller_that_differ_in_the_tag_need_no_more_than_its_line() -> None:
    view = pool(
        allocated(1),
        stack(1, 1, 0x100, 0x400),
        allocated(2, tag=b"else"),
        stack(2, 1, 0x100, 0x400),
        source=Source(SOURCE),
    )
    assert {line.partition("from ")[2] for line in str(view.leaked).splitlines()} == {
        f"{OWN}:20 in a::push"
    }


def test_a_lone_call_from_a_crate_names_no_wrong_line_and_says_what_helps() -> None:
    view = pool(allocated(1), source=Source(SOURCE))
    (leak,) = view.leaked
    assert str(leak.caller) == "windows_kernel_rs (a+0x1)"
    assert "build the driver with the feature capture-stacks" in view.problems(leaks=True)


def test_with_a_stack_there_is_nothing_to_advise() -> None:
    view = pool(allocated(1), stack(1, 1), source=Source(SOURCE))
    assert "from windows_kernel_rs (a+0x1)" in view.problems(leaks=True)
    assert "capture-stacks" not in view.problems(leaks=True)
    view = pool(allocated(1), stack(1, 1, 0x400), source=Source(SOURCE))
    assert "capture-stacks" not in view.problems(leaks=True)


def test_without_symbols_a_caller_is_an_offset_and_the_reason_is_told() -> None:
    view = pool(allocated(1), stack(1, 1, 0x100), source=Source(problem="there is no a.pdb"))
    (leak,) = view.leaked
    assert str(leak.caller) == "a+0x1"
    assert view.problems(leaks=True).endswith("no file and line: there is no a.pdb")


def test_two_stacks_without_symbols_are_two_callers_and_the_next_load_s_are_the_same() -> None:
    second = BASE + 0x100000
    view = pool(
        allocated(1),
        stack(1, 1, 0x100),
        allocated(2),
        stack(2, 1, 0x200),
        DriverInitCalled(0.0, "a", 2, second),
        ImageLoaded(0.0, "a", second, 0x1000),
        allocated(1, caller=second + 1),
        PoolStack(0.0, "a", 1, (second + 1, second + 0x100, 0x8000)),
    )
    assert sorted(use.count for use in view.leaked) == [1, 2]


def test_a_function_without_a_line_is_named_with_its_offset() -> None:
    source = Source({0: [SourceFrame("memcpy", None, None)]})
    (leak,) = pool(allocated(1), source=source).leaked
    assert str(leak.caller) == "memcpy (a+0x1)"


def test_a_block_s_next_life_has_no_stack_of_its_last() -> None:
    view = pool(
        allocated(1), stack(1, 1, 0x400), freed(1), allocated(1, caller=BASE + 0x300),
        source=Source(SOURCE),
    )  # fmt: skip
    assert str(view.leaked[0].caller) == f"{OWN}:20 in a::push"


def test_what_was_freed_costs_no_look_at_the_symbols() -> None:
    source = Source(SOURCE)
    view = pool(allocated(1), stack(1, 1, 0x400), freed(1), source=source)
    assert not view.leaked
    assert not view.double_frees
    assert view.problems(leaks=True) == ""
    assert source.loads == 0


def test_a_wrong_free_says_who_freed_and_who_had_allocated() -> None:
    source = Source({**SOURCE, 1: [SourceFrame("a::drop", OWN, 60)]})
    view = pool(allocated(1), stack(1, 1, 0x400), freed(1), freed(1, found=False), source=source)
    assert view.problems(leaks=True) == (
        f"freed twice:\n0x1 freed twice, the second time from {OWN}:60 in a::drop; "
        f"it was allocated from {OWN}:50 in a::init"
    )


def test_a_file_below_the_current_folder_is_shown_relative_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = Source({0: [SourceFrame("a::init", str(tmp_path / "a" / "lib.rs"), 7)]})
    (leak,) = pool(allocated(1), source=source).leaked
    assert str(leak.caller) == "a/lib.rs:7 in a::init"


@pytest.mark.parametrize(
    ("function", "file", "own"),
    [
        ("a::init", "/home/me/a/src/lib.rs", True),
        ("a::init", r"C:\me\a\src\lib.rs", True),
        ("leak", "/home/me/mingw-w64-drivers/leak.c", True),
        ("core_dump::write", "/home/me/core/src/alloc/lib.rs", True),
        ("a::init", "/home/me/git/checkouts/a/src/lib.rs", True),
        ("a::init", "/home/me/registry/src/a.c", True),
        ("a::init", "/home/me/registry/src/x-1.0/src/lib.rs", True),
        ("a::init", "/home/me/kernel-device/src/lib.rs", True),
        ("kernel_pool::init", "/home/me/pool/src/lib.rs", True),
        ("a::init", None, False),
        ("core::ptr::drop_in_place<a::Module>", "/home/me/a/src/lib.rs", False),
        ("enum2$<core::option::Option<a::Module> >::take", "/home/me/a/src/lib.rs", False),
        ("alloc::vec::Vec<a::Block>::push", RAW_VEC, False),
        ("f", "/usr/src/rustc-1.85.1/library/core/src/ptr/mod.rs", False),
        ("f", r"\root\.rustup\toolchains\x\lib\rustlib\src\rust\library\core\src\ptr.rs", False),
        ("f", "/root/.cargo/registry/src/index.crates.io-1949cf8c6b5b557f/x-1.0/src/lib.rs", False),
        ("f", "/root/.cargo/git/checkouts/x-1949cf8c6b5b557f/1a2b3c4/src/lib.rs", False),
        ("a::_::__rust_alloc", "/w/drivers/windows-kernel-rs/src/entry.rs", False),
        ("a::init", r"C:\cargo\registry\src\github.com-1ecc6299db9ec823\x-1.0\src\lib.rs", False),
        ("kernel_text::utf16::try_string", r"C:\w\drivers\kernel-text\src\utf16.rs", False),
        ("kernel_text::utf16::try_string", "/w/drivers/kernel-text/src/utf16.rs", False),
        ("__main", "./mingw-w64-crt/crt/gccmain.c", False),
        ("ExAllocate", "/usr/share/mingw-w64/include/ddk/wdm.h", False),
    ],
)
def test_own_source_is_what_the_driver_s_author_wrote(
    function: str, file: str | None, own: bool
) -> None:
    assert Frame(BASE, "a", 0, function, file, 1).in_own_source is own


def test_the_framework_s_crates_are_all_known() -> None:
    drivers = Path(__file__).parents[2] / "drivers"
    members = tomllib.loads((drivers / "Cargo.toml").read_text())["workspace"]["members"]
    libraries = [m for m in members if "cdylib" not in (drivers / m / "Cargo.toml").read_text()]
    assert sorted(libraries) == sorted(FRAMEWORK)


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
        (BugCheck(0.0, "a", 0x44, (1,)), "bug check 0x44 MULTIPLE_IRP_COMPLETE_REQUESTS (0x1)"),
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


def crash_of(event: Event, source: Source, *before: Event) -> str:
    log = KernelLog()
    log.append([DriverInitCalled(0.0, "a", 1, BASE), *before, event])
    log.append([ImageLoaded(0.0, "a", BASE, 0x1000)])  # told when the call is over
    window = log.window("a", 0)
    crash = find_crash(window, "a")
    assert crash is not None
    return locate_crash(crash, window, "a", source.load).description


def test_a_fault_is_told_by_the_line_of_its_own_instruction() -> None:
    fault = UnhandledException(0.0, "a", 0xC0000005, BASE + 0x3FF, ("write", 0x10))
    assert crash_of(fault, Source(SOURCE)) == (
        f"page fault: write access to 0x10 at address 0x1800003FF, at {OWN}:50 in a::init"
    )


def test_a_bug_check_is_told_by_the_line_of_the_call_before_its_return_address() -> None:
    check = BugCheck(0.0, "a", 0xE2E2, (1, 2), BASE + 0x400)
    assert crash_of(check, Source(SOURCE)) == (
        f"bug check 0xE2E2 (0x1, 0x2), at {OWN}:50 in a::init"
    )


def test_a_crash_is_told_by_the_load_that_it_was_in() -> None:
    fault = UnhandledException(0.0, "a", 0xC0000005, OVERLAPPING + 0x3FF, ("write", 0x10))
    log = KernelLog()
    for base, events in ((BASE, []), (OVERLAPPING, [fault])):
        log.append([DriverInitCalled(0.0, "a", 1, base), *events])
        log.append([ImageLoaded(0.0, "a", base, 0x1000)])
    window = log.window("a", 0)
    crash = find_crash(window, "a")
    assert crash is not None
    told = locate_crash(crash, window, "a", Source(SOURCE).load).description
    assert told.endswith(f"at {OWN}:50 in a::init")


@pytest.mark.parametrize("source", [Source(SOURCE), Source(problem="there is no a.pdb")])
def test_a_panic_is_told_by_what_it_printed_last(source: Source) -> None:
    assert crash_of(
        BugCheck(0.0, "a", 0x52555354, (), BASE + 1),
        source,
        DebugPrint(0.0, "a", b"panicked at a/src/old.rs:1:1: an earlier one\n"),
        DebugPrint(0.0, "a", b"panicked at a/src/lib.rs:67:17: as it was told\n"),
        DebugPrint(0.0, "b", b"panicked at b/src/lib.rs:1:1: another driver\n"),
    ).endswith(", panicked at a/src/lib.rs:67:17")


def test_a_crash_without_symbols_has_its_offset_and_the_reason() -> None:
    fault = UnhandledException(0.0, "a", 0xC0000005, BASE + 0x3FF, ("write", 0x10))
    assert crash_of(fault, Source(problem="there is no a.pdb")).endswith(
        "at address 0x1800003FF, at a+0x3FF; no file and line: there is no a.pdb"
    )


def test_a_crash_elsewhere_costs_no_look_at_the_symbols() -> None:
    source = Source(SOURCE)
    for event in (
        UnhandledException(0.0, "a", 0xC0000005, 0x7000, ("write", 0x10)),
        BugCheck(0.0, "a", 1, ()),
        ProcessDied(0.0, "a", 1, None),
    ):
        assert crash_of(event, source) == describe(event)
    assert source.loads == 0


def test_the_last_lines_leave_pool_calls_and_fences_out() -> None:
    log = KernelLog()
    log.append([allocated(1), Fence(0.0, None, "x"), DebugPrint(1.5, "a", b"hi\n")])
    assert kernel_lines(log.window("a", 0), 10) == ["   1.500  a: hi"]
