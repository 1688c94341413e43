"""The Windows path from pytest down to the kernel's debugger, on a simulated NT. Not verified on Windows."""

from __future__ import annotations

import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pytest_kdriver.driver import Driver
from pytest_kdriver.errors import DriverCrashed, DriverTimeout
from pytest_kdriver.kernel.dump import read_dump
from pytest_kdriver.targets.machine_target import MachineTarget
from tests.conftest import Run, Verdicts, failure
from tests.nt.drivers import write_images
from tests.nt.machine import NtMachine
from tests.nt.project import nt_project

HELLO = """
import pytest

@pytest.mark.kdriver("hello.sys")
def test_hello(kdriver):
    with kdriver.running():
        kdriver.dbgprint.expect("Hello, world!")
    assert kdriver.dbgprint.lines == ["Hello, world!", "Bye bye!"]
"""


@pytest.fixture
def project(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path
) -> pytest.Pytester:
    return nt_project(monkeypatch, request, tmp_path)


def went_through(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if line.startswith("nt: ")]


def test_a_driver_that_says_hello_passes_with_its_lines(project: pytest.Pytester, run: Run) -> None:
    project.makepyfile(HELLO)
    result = run()
    result.assert_outcomes(passed=1)
    assert went_through(result) == ["nt: 1 boots, 0 reverts, mistakes: []"]


def test_a_driver_that_refuses_has_its_own_status(
    project: pytest.Pytester, run: Run, verdicts: Verdicts
) -> None:
    project.makepyfile(
        """
        import pytest
        from pytest_kdriver import StartFailed

        @pytest.mark.kdriver("refuses.sys", parameters={"Status": 0xC00000A1})
        def test_status(kdriver):
            assert kdriver.start(check=False) == 0xC00000A1
            assert not kdriver.loaded

        @pytest.mark.kdriver("refuses.sys")
        def test_raises(kdriver):
            with pytest.raises(StartFailed, match="STATUS_UNSUCCESSFUL"):
                kdriver.start()

        @pytest.mark.kdriver("stubborn.sys")
        def test_no_unload(kdriver):
            from pytest_kdriver import UnloadRefused
            kdriver.start()
            with pytest.raises(UnloadRefused):
                kdriver.stop()
        """
    )
    result = run()
    result.assert_outcomes(passed=3)
    assert went_through(result) == ["nt: 1 boots, 0 reverts, mistakes: []"]


CRASHES = """
import pytest
from pytest_kdriver import DriverCrashed, ctl_code

CRASH = ctl_code(0x807)

@pytest.mark.kdriver("panics.sys")
def test_panic(kdriver):
    kdriver.start()

@pytest.mark.kdriver("panics.sys", parameters={"How": "bug-check"})
def test_caught(kdriver, nt):
    with pytest.raises(DriverCrashed) as crash:
        kdriver.start()
    assert crash.value.code == 0xE2E2
    assert crash.value.parameters == (1, 2, 3, 4)
    assert any("about to bug-check" in line for line in crash.value.lines)

@pytest.mark.kdriver("panics.sys", parameters={"How": "bug-check", "Where": "cleanup"})
def test_in_unload(kdriver):
    kdriver.start()
    with pytest.raises(DriverCrashed, match="bug check 0xE2E2"):
        kdriver.stop()

@pytest.mark.kdriver("panics.sys", parameters={"Where": "cleanup"})
def test_at_the_end_of_the_body(kdriver):
    kdriver.start()

@pytest.mark.kdriver("echo.sys")
def test_in_a_device_call(kdriver):
    with kdriver.running(), kdriver.device(r"\\\\.\\Echo") as device:
        with pytest.raises(DriverCrashed, match="bug check 0xE2E2"):
            device.ioctl(CRASH, bytes([2]))

@pytest.mark.kdriver("panics.sys", parameters={"How": "page-fault"})
def test_page_fault(kdriver):
    kdriver.start()

@pytest.mark.kdriver("panics.sys", parameters={"How": "unhandled"})
def test_unhandled_exception(kdriver):
    kdriver.start()

@pytest.mark.kdriver("echo.sys")
def test_page_fault_in_a_device_call(kdriver):
    with kdriver.running(), kdriver.device(r"\\\\.\\Echo") as device:
        device.ioctl(CRASH, bytes([1]))

@pytest.mark.kdriver("panics.sys", parameters={"How": "verifier", "Where": "cleanup"})
def test_verifier(kdriver):
    kdriver.start()

@pytest.mark.kdriver("hello.sys", leaks="allow")
def test_another_one_crashes_and_the_test_knows(kdriver, kdriver_target):
    with kdriver.running():
        with kdriver_target.driver("panics.sys") as panics:
            with pytest.raises(DriverCrashed):
                panics.start()

@pytest.mark.kdriver("panics.sys")
@pytest.mark.xfail(raises=DriverCrashed, strict=True)
def test_xfail(kdriver):
    kdriver.start()

@pytest.mark.kdriver("hello.sys")
def test_last_one_runs(kdriver):
    with kdriver.running(): pass
    assert kdriver.dbgprint.lines == ["Hello, world!", "Bye bye!"]
"""


def test_a_bug_check_is_a_crash_of_the_call_that_brought_it_in_the_words_that_wine_s_has(
    project: pytest.Pytester, run: Run, verdicts: Verdicts
) -> None:
    project.makepyfile(CRASHES)
    result = run()
    assert verdicts(result) == {
        "test_panic[nt]": "FAILED",
        "test_caught[nt]": "PASSED",
        "test_in_unload[nt]": "PASSED",
        "test_at_the_end_of_the_body[nt]": "FAILED",
        "test_in_a_device_call[nt]": "PASSED",
        "test_page_fault[nt]": "FAILED",
        "test_unhandled_exception[nt]": "FAILED",
        "test_page_fault_in_a_device_call[nt]": "FAILED",
        "test_verifier[nt]": "FAILED",
        "test_another_one_crashes_and_the_test_knows[nt]": "PASSED",
        "test_xfail[nt]": "XFAIL",
        "test_last_one_runs[nt]": "PASSED",
    }
    told = failure(result, "test_panic[nt]")
    panicked = "bug check 0x52555354 (0x0, 0x0, 0x0, 0x0), panicked at panics/src/lib.rs:76:17\n"
    assert f"DriverCrashed: panics on nt: {panicked}" in told
    assert re.search(r"\d\.\d{3}  \S+: panicked at panics/src/lib.rs:\d+", told)
    assert ">       kdriver.start()" in told
    assert re.search(r"the guest's kernel: it waited \d+ us for its debugger on average", told)
    assert "pytest_kdriver/driver.py" not in told
    assert re.search(r"-+ DbgPrint -+\nabout to panic\n", told)
    assert "bug check 0x52555354" in failure(result, "test_at_the_end_of_the_body[nt]")
    fault = failure(result, "test_page_fault[nt]")
    assert "bug check 0x7E" in fault
    assert "panics+0x1010" in fault
    unhandled = failure(result, "test_unhandled_exception[nt]")
    assert "bug check 0x1E" in unhandled
    assert "at panics+0x1010" in unhandled
    fault = failure(result, "test_page_fault_in_a_device_call[nt]")
    assert "bug check 0x3B" in fault
    assert "at echo+0x1010" in fault
    verifier = failure(result, "test_verifier[nt]")
    assert "the kernel blames panics.sys" in verifier
    assert "bug check 0xC4" in verifier
    assert "3 allocations not freed" in verifier
    assert went_through(result) == ["nt: 1 boots, 11 reverts, mistakes: []"]


def test_a_breakpoint_or_an_assertion_fails_the_test_unless_it_is_expected(
    project: pytest.Pytester, run: Run, verdicts: Verdicts
) -> None:
    project.makepyfile(
        """
        import pytest
        from pytest_kdriver import DriverCrashed

        @pytest.mark.kdriver("panics.sys", parameters={"How": "int3"})
        def test_breakpoint(kdriver):
            with kdriver.running():
                pass

        @pytest.mark.kdriver("panics.sys", parameters={"How": "int2c", "Where": "cleanup"})
        def test_assertion(kdriver):
            with kdriver.running():
                pass

        @pytest.mark.kdriver("panics.sys", parameters={"How": "int3"})
        def test_expected(kdriver):
            with pytest.raises(DriverCrashed, match="breakpoint"):
                kdriver.start()

        @pytest.mark.kdriver("hello.sys")
        def test_next(kdriver):
            kdriver.start()
        """
    )
    result = run()
    assert verdicts(result) == {
        "test_breakpoint[nt]": "FAILED",
        "test_assertion[nt]": "FAILED",
        "test_expected[nt]": "PASSED",
        "test_next[nt]": "PASSED",
    }
    for name, what in (
        ("breakpoint", "breakpoint (int 3)"),
        ("assertion", "assertion failed (int 2Ch)"),
    ):
        told = failure(result, f"test_{name}[nt]")
        assert f"DriverCrashed: panics on nt: {what} at address 0x" in told
        assert "which without a debugger is a bug check, at panics+0x1020" in told


def test_a_driver_that_hangs_is_a_timeout_that_shows_where_the_processors_are(
    project: pytest.Pytester, run: Run, verdicts: Verdicts
) -> None:
    project.makepyfile(
        r"""
        import pytest
        from pytest_kdriver import DriverTimeout, ctl_code

        @pytest.mark.kdriver("stubborn.sys", parameters={"How": "slow-init"}, timeout=1)
        def test_in_init(kdriver):
            kdriver.start()

        @pytest.mark.kdriver("stubborn.sys", parameters={"How": "slow-cleanup"}, timeout=1)
        def test_in_cleanup(kdriver):
            with kdriver.running():
                pass

        @pytest.mark.kdriver("echo.sys", timeout=1)
        def test_in_a_device_call(kdriver):
            with kdriver.running(), kdriver.device(r"\\.\Echo") as device:
                device.ioctl(ctl_code(0x805), bytes(4))

        @pytest.mark.kdriver("hello.sys")
        def test_next(kdriver):
            kdriver.start()
        """
    )
    result = run()
    assert verdicts(result) == {
        "test_in_init[nt]": "FAILED",
        "test_in_cleanup[nt]": "FAILED",
        "test_in_a_device_call[nt]": "FAILED",
        "test_next[nt]": "PASSED",
    }
    for name, driver in (
        ("test_in_init[nt]", "stubborn"),
        ("test_in_cleanup[nt]", "stubborn"),
        ("test_in_a_device_call[nt]", "echo"),
    ):
        told = failure(result, name)
        assert "did not return within 1 s" in told
        assert re.search(rf"processor 0 is at ntoskrnl\+0x(.*\n)+? .* {driver}\+0x1030\n", told)
        assert "processor 1 is at ntoskrnl+0x" in told
    assert went_through(result) == ["nt: 1 boots, 3 reverts, mistakes: []"]


def test_a_guest_that_stands_still_altogether_is_a_timeout_and_is_put_back(
    project: pytest.Pytester, run: Run, verdicts: Verdicts
) -> None:
    project.makepyfile(
        """
        import pytest
        from pytest_kdriver import DriverTimeout

        @pytest.mark.kdriver("hello.sys")
        def test_frozen(kdriver, nt):
            kdriver.start()
            nt.guest.freeze()
            kdriver.stop(timeout=1)

        @pytest.mark.kdriver("hello.sys")
        def test_next(kdriver):
            with kdriver.running(): pass
            assert kdriver.dbgprint.lines == ["Hello, world!", "Bye bye!"]
        """
    )
    result = run()
    assert verdicts(result) == {"test_frozen[nt]": "FAILED", "test_next[nt]": "PASSED"}
    told = failure(result, "test_frozen[nt]")
    assert "DriverUnload did not return within 1 s" in told
    assert "processor 0" not in told
    assert "the processors are can't be told: the kernel did not stop for its debugger" in told


def test_of_a_suite_of_20_tests_the_5_that_crash_are_reported_and_each_is_followed_by_a_revert(
    project: pytest.Pytester, run: Run, verdicts: Verdicts
) -> None:
    crashing = {3, 7, 8, 14, 19}
    project.makepyfile(
        f"""
        import pytest

        @pytest.mark.parametrize("number", range(20))
        def test_it(kdriver_target, nt, number):
            reverts = nt.reverts
            assert reverts == sum(crash < number for crash in {crashing})
            name = "panics.sys" if number in {crashing} else "hello.sys"
            with kdriver_target.driver(name) as driver, driver.running():
                driver.dbgprint.expect("Hello, world!")
        """
    )
    result = run()
    failed = {name for name, verdict in verdicts(result).items() if verdict == "FAILED"}
    assert failed == {f"test_it[nt-{number}]" for number in crashing}
    result.assert_outcomes(passed=15, failed=5)
    for name in failed:
        assert "DriverCrashed: panics on nt: bug check 0x52555354" in failure(result, name)
    assert went_through(result) == ["nt: 1 boots, 4 reverts, mistakes: []"]


def test_a_debugger_s_port_that_is_lost_is_an_error_that_is_seen(
    project: pytest.Pytester, run: Run, verdicts: Verdicts
) -> None:
    project.makepyfile(
        """
        import pytest

        @pytest.mark.kdriver("hello.sys")
        def test_lost(kdriver, nt):
            with kdriver.running():
                nt.guest.lose_debugger_port()

        @pytest.mark.kdriver("hello.sys")
        def test_next(kdriver):
            with kdriver.running():
                kdriver.dbgprint.expect("Hello, world!")
        """
    )
    result = run()
    assert verdicts(result) == {"test_lost[nt]": "FAILED", "test_next[nt]": "PASSED"}
    assert "kernel log" in failure(result, "test_lost[nt]")


LEAKS = """
import pytest
from pytest_kdriver import PoolError

@pytest.mark.kdriver("leaks.sys", tags="leak", parameters={"Blocks": 3, "Bytes": 100})
def test_leak(kdriver):
    with kdriver.running(): pass

@pytest.mark.kdriver("leaks.sys", tags="leak", parameters={"Blocks": 0, "Late": 2})
def test_freed_late(kdriver):
    with kdriver.running(): pass

@pytest.mark.kdriver("leaks.sys", tags="leak", leaks="allow")
def test_allowed(kdriver):
    with kdriver.running(): pass

@pytest.mark.kdriver("refuses.sys", tags="refu", parameters={"Blocks": 2})
def test_failed_init(kdriver):
    kdriver.start(check=False)

@pytest.mark.kdriver("hello.sys", tags="leak")
def test_clean(kdriver):
    with kdriver.running(): pass
"""


def test_blocks_left_behind_by_the_counters_of_their_tags_fail_the_test(
    project: pytest.Pytester, run: Run, verdicts: Verdicts
) -> None:
    project.makepyfile(LEAKS)
    result = run()
    assert verdicts(result) == {
        "test_leak[nt]": "FAILED",
        "test_freed_late[nt]": "PASSED",
        "test_allowed[nt]": "PASSED",
        "test_failed_init[nt]": "FAILED",
        "test_clean[nt]": "PASSED",
    }
    leak = failure(result, "test_leak[nt]")
    assert "leaks on nt: 3 blocks, 300 bytes leaked" in leak
    assert "tag 'leak'" in leak
    assert "2 blocks, 200 bytes leaked" in failure(result, "test_failed_init[nt]")


def test_two_machines_at_once_do_not_disturb_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path)

    def work(name: str, crashes: bool) -> list[str]:
        machine = NtMachine(name)
        target = MachineTarget(name, machine)
        target.start()
        lines = []
        try:
            for number in range(4):
                if crashes:
                    panics = Driver(target, tmp_path / "panics.sys", name="panics")
                    with pytest.raises(DriverCrashed, match="bug check 0x52555354"):
                        panics.start()
                hello = Driver(target, tmp_path / "hello.sys", name=f"hello{number}", leaks="allow")
                with hello.running():
                    pass
                lines += hello.dbgprint.lines
                hello.finish()
        finally:
            target.close()
        assert machine.mistakes == []
        assert (machine.boots, machine.reverts) == (1, 4 if crashes else 0)
        return lines

    with ThreadPoolExecutor(2) as pool:
        both = pool.submit(work, "first", True), pool.submit(work, "second", False)
        assert [future.result(60) for future in both] == [["Hello, world!", "Bye bye!"] * 4] * 2


def test_a_bug_check_that_no_call_brought_fails_the_test_that_runs(
    project: pytest.Pytester, run: Run, verdicts: Verdicts
) -> None:
    project.makepyfile(
        """
        import pytest
        from pytest_kdriver import DriverCrashed

        IRQL = 0xD1, (0x10, 2, 1, 0xFFFFF80212345678)

        @pytest.mark.kdriver("hello.sys")
        def test_nobody_calls(kdriver, nt):
            kdriver.start()
            nt.guest.bug_check_now(*IRQL)

        @pytest.mark.kdriver("hello.sys")
        def test_the_next_call_says_so(kdriver, nt):
            kdriver.start()
            nt.guest.bug_check_now(*IRQL)
            with pytest.raises(DriverCrashed, match="bug check 0xD1"):
                kdriver.stop()
            assert kdriver.start() == 0

        @pytest.mark.kdriver("hello.sys")
        def test_a_wait_says_so(kdriver, nt):
            kdriver.start()
            nt.guest.bug_check_now(*IRQL)
            with pytest.raises(DriverCrashed, match="bug check 0xD1"):
                kdriver.dbgprint.wait_for("what it never says", timeout=20)

        @pytest.mark.kdriver("hello.sys")
        def test_next(kdriver):
            with kdriver.running(): pass
        """
    )
    result = run()
    assert verdicts(result) == {
        "test_nobody_calls[nt]": "FAILED",
        "test_the_next_call_says_so[nt]": "PASSED",
        "test_a_wait_says_so[nt]": "PASSED",
        "test_next[nt]": "PASSED",
    }
    assert "bug check 0xD1" in failure(result, "test_nobody_calls[nt]")


def test_a_crash_behind_an_unload_is_the_driver_s_while_it_is_judged_and_else_told_before_the_next_test(
    project: pytest.Pytester, run: Run, verdicts: Verdicts
) -> None:
    project.makepyfile(
        """
        import threading
        import pytest

        LATE = 0xCE, (0xFFFFF80212345678, 16, 0xFFFFF80212345678, 0)

        @pytest.mark.kdriver("leaks.sys", tags="leak")
        def test_while_its_pool_settles(kdriver, nt):
            kdriver.start()
            threading.Timer(0.1, nt.guest.bug_check_now, LATE).start()
            kdriver.stop()

        @pytest.fixture
        def late(nt):
            yield
            nt.guest.bug_check_now(*LATE)
            while not nt.agent.closed:
                pass

        @pytest.mark.kdriver("hello.sys")
        def test_of_which_it_comes(late, kdriver):
            with kdriver.running(): pass

        @pytest.mark.kdriver("refuses.sys")
        @pytest.mark.parametrize("number", range(2))
        def test_next(kdriver, number):
            kdriver.start(check=False)

        @pytest.mark.kdriver("hello.sys")
        def test_last(late, kdriver):
            with kdriver.running(): pass
        """
    )
    result = run()
    assert verdicts(result) == {
        "test_while_its_pool_settles[nt]": "FAILED",
        "test_of_which_it_comes[nt]": "PASSED",
        "test_next[nt-0]": "ERROR",
        "test_next[nt-1]": "PASSED",
        "test_last[nt]": "PASSED, ERROR",
    }
    told = failure(result, "test_while_its_pool_settles[nt]")
    assert "DriverCrashed: leaks on nt: bug check 0xCE" in told
    assert "TargetError" not in told
    words = "the guest stopped: bug check 0xCE [^;]*, when nobody called it; unloaded before: hello"
    for test in ("test_next[nt-0]", "test_last[nt]"):
        told = failure(result, test)
        assert re.search(rf"TargetError: target 'nt': {words}\b", told)
        assert "hello: is gone from 0x" in told
    assert went_through(result) == ["nt: 1 boots, 2 reverts, mistakes: []"]


def test_a_guest_that_crashes_of_the_nmi_that_it_got_while_it_hung_is_a_timeout_and_no_more(
    project: pytest.Pytester, run: Run, verdicts: Verdicts
) -> None:
    project.makepyfile(
        """
        import pytest
        from pytest_kdriver import DriverTimeout

        @pytest.fixture(autouse=True)
        def interrupt(nt, monkeypatch):
            def examine_hang(guest):
                nt.guest.bug_check_now(0x80, (0x4F4454, 0, 0, 0))
                while not nt.agent.closed:
                    pass
            monkeypatch.setattr(nt, "examine_hang", examine_hang)

        @pytest.mark.kdriver("stubborn.sys", parameters={"How": "slow-init"}, timeout=1)
        def test_expected(kdriver):
            with pytest.raises(DriverTimeout):
                kdriver.start()

        @pytest.mark.kdriver("stubborn.sys", parameters={"How": "slow-init"}, timeout=1)
        def test_expected_beside_another(kdriver, kdriver_target):
            with kdriver_target.driver("hello.sys", leaks="allow") as hello:
                hello.start()
                with pytest.raises(DriverTimeout):
                    kdriver.start()

        @pytest.mark.kdriver("stubborn.sys", parameters={"How": "slow-init"}, timeout=1)
        def test_hangs(kdriver):
            kdriver.start()
        """
    )
    result = run()
    assert verdicts(result) == {
        "test_expected[nt]": "PASSED",
        "test_expected_beside_another[nt]": "PASSED",
        "test_hangs[nt]": "FAILED",
    }
    told = failure(result, "test_hangs[nt]")
    assert "DriverTimeout: stubborn on nt: DriverEntry did not return within 1 s" in told
    assert "DriverCrashed" not in told
    assert "bug check 0x80 NMI_HARDWARE_FAILURE" in told


def test_a_driver_that_prints_without_end_is_a_timeout_and_the_guest_is_put_back_amid_a_print(
    project: pytest.Pytester, run: Run, verdicts: Verdicts
) -> None:
    project.makepyfile(
        """
        import pytest

        @pytest.mark.kdriver("stubborn.sys", parameters={"How": "flood"}, timeout=1)
        @pytest.mark.parametrize("number", range(2))
        def test_flood(kdriver, number):
            kdriver.start()

        @pytest.mark.kdriver("hello.sys")
        def test_next(kdriver):
            with kdriver.running(): pass
            assert kdriver.dbgprint.lines == ["Hello, world!", "Bye bye!"]
        """
    )
    result = run()
    result.assert_outcomes(failed=2, passed=1)
    assert "DriverEntry did not return within 1 s" in failure(result, "test_flood[nt-1]")
    assert went_through(result) == ["nt: 1 boots, 2 reverts, mistakes: []"]


def test_an_address_is_in_the_image_that_lies_there_in_the_guest_that_was_put_back(
    project: pytest.Pytester, run: Run, verdicts: Verdicts
) -> None:
    project.makepyfile(
        """
        import pytest
        from pytest_kdriver import DriverCrashed

        @pytest.mark.kdriver("hello.sys", service="first", leaks="allow")
        def test_two_small_ones(kdriver, kdriver_target, nt):
            kdriver.start()
            with kdriver_target.driver("hello.sys", service="second", leaks="allow") as second:
                second.start()
                nt.guest.bug_check_now(0xE2, (0, 0, 0, 0))

        @pytest.mark.kdriver("large.sys")
        def test_a_large_one(kdriver):
            kdriver.start()
        """
    )
    result = run()
    assert verdicts(result)["test_a_large_one[nt]"] == "FAILED"
    told = failure(result, "test_a_large_one[nt]")
    assert "at large+0x21010" in told
    assert "second+" not in told


def test_with_dumps_a_kernel_that_crashed_writes_its_minidump_and_the_next_test_passes(
    project: pytest.Pytester, run: Run, verdicts: Verdicts
) -> None:
    project.makepyfile(
        """
        import pytest

        @pytest.mark.kdriver("panics.sys", parameters={"How": "bug-check"})
        def test_crashes(kdriver):
            kdriver.start()

        @pytest.mark.kdriver("hello.sys")
        def test_next(kdriver):
            with kdriver.running(): pass
            assert kdriver.dbgprint.lines == ["Hello, world!", "Bye bye!"]
        """
    )
    result = run("--kdriver-artifacts", "kept", "--kdriver-dumps")
    assert verdicts(result) == {"test_crashes[nt]": "FAILED", "test_next[nt]": "PASSED"}
    (path,) = (project.path / "kept").glob("*.dmp")
    dump = read_dump(path)
    assert (dump.code, dump.parameters) == (0xE2E2, (1, 2, 3, 4))
    assert "panics.sys" in {module.name for module in dump.modules}
    assert went_through(result) == ["nt: 1 boots, 1 reverts, mistakes: []"]


KINDS: dict[str, tuple[str, dict[str, str]]] = {
    **{
        f"{how} in {where}": ("panics", {"How": how, "Where": where})
        for how in ("panic", "page-fault", "unhandled", "bug-check", "int3", "int2c")
        for where in ("init", "cleanup")
    },
    "hang in init": ("stubborn", {"How": "slow-init"}),
    "hang in cleanup": ("stubborn", {"How": "slow-cleanup"}),
    "flood": ("stubborn", {"How": "flood"}),
}


@pytest.mark.soak
def test_after_each_of_many_crashes_the_next_start_works_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path)
    machine = NtMachine("nt")
    target = MachineTarget("nt", machine)
    target.start()

    def says_hello() -> None:
        hello = Driver(target, tmp_path / "hello.sys", name="hello")
        with hello.running():
            pass
        assert hello.dbgprint.lines == ["Hello, world!", "Bye bye!"]
        hello.finish()

    says_hello()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    threads = threading.active_count()
    order = random.Random(4)
    for _ in range(100):
        name, parameters = KINDS[order.choice(list(KINDS))]
        image = tmp_path / f"{name}.sys"
        driver = Driver(target, image, name=name, parameters=parameters, timeout=1.0)
        with pytest.raises((DriverCrashed, DriverTimeout)), driver.running():
            pass
        driver.finish()
        target.repair()
        says_hello()
    assert (machine.boots, machine.reverts) == (1, 100)
    spilled = 1  # the log's own file, once it needs one
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + spilled
    assert threading.active_count() <= threads
    target.close()
    assert machine.mistakes == []
