"""What a test holds: Driver, its views, and the target's handle, on a real Wine."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pytest_kdriver import (
    NTSTATUS,
    AgentError,
    ConfigError,
    Driver,
    DriverCrashed,
    DriverError,
    DriverTimeout,
    ImageError,
    NoSuchLine,
    PoolError,
    ServiceState,
    StartFailed,
    StopFailed,
    TargetError,
    TargetHandle,
    UnloadRefused,
    Win32Error,
)
from pytest_kdriver.image.cargo import Cargo
from pytest_kdriver.kernel.events import DriverInitCalled

HELLO = ["Hello, world!", "Bye bye!"]

hello = pytest.mark.kdriver("hello")


def stubborn(how: str, **parameters: int) -> pytest.MarkDecorator:
    return pytest.mark.kdriver("stubborn", parameters={"How": how, **parameters})


class TestStart:
    @hello
    def test_gives_driver_entry_s_status_and_stop_unloads(self, kdriver: Driver) -> None:
        assert kdriver.last_status is None
        assert not kdriver.loaded
        assert kdriver.start() is NTSTATUS.STATUS_SUCCESS
        assert kdriver.last_status == 0
        assert kdriver.loaded
        assert kdriver.dbgprint.lines == HELLO[:1]
        kdriver.stop()
        assert not kdriver.loaded
        assert kdriver.dbgprint.lines == HELLO

    @pytest.mark.kdriver("refuses", parameters={"Status": 0xC00000A1})
    def test_that_fails_raises_with_the_status_unless_it_shall_not(self, kdriver: Driver) -> None:
        with pytest.raises(StartFailed, match="STATUS_WORKING_SET_QUOTA") as failure:
            kdriver.start()
        assert failure.value.status == NTSTATUS.STATUS_WORKING_SET_QUOTA
        assert (failure.value.driver, failure.value.target) == ("refuses", "wine")
        assert any(
            "DriverEntry returned STATUS_WORKING_SET_QUOTA" in line for line in failure.value.lines
        )
        assert kdriver.start(check=False) == 0xC00000A1
        assert kdriver.last_status == NTSTATUS.STATUS_WORKING_SET_QUOTA
        assert not kdriver.loaded

    @pytest.mark.parametrize(
        ("status", "code"),
        [
            (0xC0000034, Win32Error.ERROR_FILE_NOT_FOUND),
            (0xC0000022, Win32Error.ERROR_ACCESS_DENIED),
        ],
    )
    def test_by_the_service_manager_gives_its_code(
        self, kdriver_target: TargetHandle, status: int, code: Win32Error
    ) -> None:
        with kdriver_target.driver("refuses", parameters={"Status": status}) as refuses:
            assert refuses.start_service() == code
            assert refuses.last_status == status
        with kdriver_target.driver("hello") as driver:
            assert driver.start_service() is Win32Error.ERROR_SUCCESS
            assert driver.loaded
            assert driver.start_service() is Win32Error.ERROR_SERVICE_ALREADY_RUNNING
            assert driver.loaded

    @hello
    def test_of_a_loaded_driver_is_refused_and_it_stays_loaded(self, kdriver: Driver) -> None:
        kdriver.start()
        with pytest.raises(StartFailed) as failure:
            kdriver.start()
        assert failure.value.status == NTSTATUS.STATUS_IMAGE_ALREADY_LOADED
        assert kdriver.loaded
        kdriver.stop()
        assert kdriver.dbgprint.lines == HELLO

    @hello
    def test_makes_the_service_and_the_state_is_the_service_manager_s(
        self, kdriver: Driver
    ) -> None:
        assert kdriver.service_state is None
        with kdriver.running():
            assert kdriver.service_state is ServiceState.RUNNING
        assert kdriver.service_state is ServiceState.STOPPED

    @pytest.mark.kdriver("hello", service="My Hello-1.0")
    def test_goes_by_the_service_s_name(
        self, kdriver: Driver, kdriver_target: TargetHandle
    ) -> None:
        assert (kdriver.name, kdriver.service) == ("hello", "My Hello-1.0")
        kdriver.start()
        key = "SYSTEM\\CurrentControlSet\\Services\\My Hello-1.0"
        assert kdriver_target.registry.get(key, "ImagePath") is not None
        assert kdriver_target.registry.get(key, "Type") == 1
        kdriver.stop()
        assert kdriver.dbgprint.lines == HELLO

    def test_from_a_path_with_spaces_and_umlauts(
        self, kdriver_target: TargetHandle, cargo: Cargo, tmp_path: Path
    ) -> None:
        folder = tmp_path / "böse Treiber"
        folder.mkdir()
        image = shutil.copy(cargo.build("hello"), folder / "grüß dich.sys")
        with kdriver_target.driver(str(image), service="greets") as driver, driver.running():
            assert driver.dbgprint.lines == HELLO[:1]
        assert driver.name == "grüß dich"

    def test_of_what_is_no_driver_says_so(
        self, kdriver_target: TargetHandle, tmp_path: Path
    ) -> None:
        path = tmp_path / "text.sys"
        path.write_text("no image at all")
        with (
            kdriver_target.driver(str(path)) as driver,
            pytest.raises(ImageError, match=r"text\.sys is no Windows image"),
        ):
            driver.start()

    @pytest.mark.kdriver(
        "checks",
        parameters={
            "Dword": 7,
            "Qword": 1 << 32,
            "Text": "täxt",
            "Texts": ["one", "zwei und dreißig"],
            "Bytes": bytes(range(256)),
            "Negative": -1,
        },
    )
    def test_writes_parameters_of_each_type(
        self, kdriver: Driver, kdriver_target: TargetHandle
    ) -> None:
        kdriver.start(check=False)
        key = "SYSTEM\\CurrentControlSet\\Services\\checks\\Parameters"
        assert {
            name: kdriver_target.registry.get(key, name)
            for name in ("Dword", "Qword", "Text", "Texts", "Bytes", "Negative")
        } == {
            "Dword": 7,
            "Qword": 1 << 32,
            "Text": "täxt",
            "Texts": ["one", "zwei und dreißig"],
            "Bytes": bytes(range(256)),
            "Negative": 0xFFFFFFFF,
        }


class TestStop:
    @hello
    def test_of_what_is_not_running_fails(self, kdriver: Driver) -> None:
        with pytest.raises(StopFailed, match="not running"):
            kdriver.stop()
        kdriver.start()
        kdriver.stop()
        with pytest.raises(StopFailed, match="not running"):
            kdriver.stop()

    @stubborn("no-unload")
    def test_of_a_driver_without_unload_is_refused_and_the_next_start_works(
        self, kdriver: Driver, kdriver_target: TargetHandle
    ) -> None:
        kdriver.start()
        with pytest.raises(UnloadRefused, match="no DriverUnload"):
            kdriver.stop()
        with kdriver_target.driver("hello") as driver, driver.running():
            pass
        assert kdriver.start() == 0
        with pytest.raises(UnloadRefused):
            kdriver.stop()

    @hello
    def test_running_leaves_a_driver_alone_that_the_body_stopped(self, kdriver: Driver) -> None:
        with kdriver.running() as same:
            assert same is kdriver
            kdriver.stop()
        with pytest.raises(ZeroDivisionError), kdriver.running():
            _ = 1 / 0
        assert not kdriver.loaded
        assert kdriver.dbgprint.lines == HELLO * 2

    @hello
    def test_cycle_tells_each_cycle_apart(self, kdriver: Driver) -> None:
        cycles = kdriver.cycle(3)
        assert [cycle.lines for cycle in cycles] == [HELLO] * 3
        assert all(cycle.status == 0 and not cycle.leaked for cycle in cycles)
        assert all(0 < cycle.stop_seconds < 10 and 0 < cycle.start_seconds < 30 for cycle in cycles)
        assert kdriver.dbgprint.lines == HELLO * 3

    @pytest.mark.kdriver("leaks", parameters={"Blocks": 2, "Bytes": 10}, leaks="allow")
    def test_cycle_counts_each_cycle_s_leaks(self, kdriver: Driver) -> None:
        cycles = kdriver.cycle(3)
        assert [cycle.leaked.total_size for cycle in cycles] == [20, 20, 20]
        (growth,) = cycles.growth
        assert (growth.tag, growth.blocks, growth.size, growth.certain) == ("leak", 2, 20, True)
        assert kdriver.pool.leaked.total_count == 6


class TestDeadline:
    @pytest.mark.parametrize("busy", [0, 1])
    @pytest.mark.parametrize(
        ("how", "phase", "routine"),
        [("slow-init", "start", "DriverEntry"), ("slow-cleanup", "stop", "DriverUnload")],
    )
    def test_cuts_a_hanging_driver_short_and_the_next_start_works(
        self, kdriver_target: TargetHandle, how: str, phase: str, routine: str, busy: int
    ) -> None:
        parameters: dict[str, str | int] = {"How": how, "Busy": busy}
        with kdriver_target.driver("stubborn", parameters=parameters) as driver:
            if phase == "stop":
                driver.start()
            begin = time.monotonic()
            with pytest.raises(DriverTimeout, match=f"{routine} did not return") as late:
                (driver.start if phase == "start" else driver.stop)(timeout=0.5)
            assert 0.5 <= time.monotonic() - begin < 5
            assert (late.value.phase, late.value.timeout) == (phase, 0.5)
            assert "the process that the driver ran in was ended" in str(late.value)
            driver.dbgprint.expect("slow")
            assert not driver.loaded
        with kdriver_target.driver("hello") as driver, driver.running():
            pass

    @pytest.mark.kdriver("stubborn", parameters={"How": "slow-init", "Seconds": 1}, timeout=0.3)
    def test_of_a_call_wins_over_the_marker_s(self, kdriver: Driver) -> None:
        assert kdriver.start(timeout=30) == 0
        kdriver.stop()
        with pytest.raises(DriverTimeout):
            kdriver.start()

    @pytest.mark.kdriver("stubborn", parameters={"How": "slow-init"})
    def test_another_start_meanwhile_is_told_why_it_can_t_be(
        self, kdriver: Driver, kdriver_target: TargetHandle
    ) -> None:
        with ThreadPoolExecutor() as threads, kdriver_target.driver("hello") as other:
            hanging = threads.submit(kdriver.start, timeout=5)
            kdriver.dbgprint.expect("slow", timeout=30)
            with pytest.raises(
                TargetError, match="while another driver is still in its DriverEntry"
            ):
                other.start()
            with pytest.raises(DriverTimeout):
                hanging.result()
            with pytest.raises(DriverTimeout):  # what another thread hears the test's own hears too
                kdriver.stop()
        with kdriver_target.driver("hello") as other, other.running():
            pass


class TestDbgPrint:
    @pytest.mark.kdriver("chatty", parameters={"Lines": 5, "Length": 3})
    def test_expect_and_wait_for_move_a_cursor_and_nothing_else_does(self, kdriver: Driver) -> None:
        kdriver.start()
        lines = [f"{number} a" for number in range(1, 6)]
        assert kdriver.dbgprint.expect("1 a") == "1 a"
        assert kdriver.dbgprint.lines == lines
        kdriver.dbgprint.fnmatch_lines(["1*", "3*"])
        kdriver.dbgprint.re_match_lines([r"\d a", r"5"])
        kdriver.dbgprint.no_fnmatch_line("6*")
        assert kdriver.dbgprint.wait_for("[34] *") == "3 a"
        with pytest.raises(NoSuchLine):
            kdriver.dbgprint.expect("2 a", timeout=0)  # it is behind the cursor
        assert kdriver.dbgprint.expect("4 a") == "4 a"
        assert kdriver.dbgprint.lines == lines

    @pytest.mark.kdriver("chatty", parameters={"Lines": 2, "Length": 3})
    def test_a_line_that_does_not_come_is_told_with_those_that_did(self, kdriver: Driver) -> None:
        kdriver.start()
        kdriver.dbgprint.expect("1 a")
        with pytest.raises(NoSuchLine) as missing:
            kdriver.dbgprint.expect("3 a", timeout=0.01)
        assert "no line '3 a' within 0.01 s; what was printed:\n    2 a" in str(missing.value)
        assert isinstance(missing.value, AssertionError)
        with pytest.raises(NoSuchLine, match=r"no line matching '9\*'.*\n    1 a\n    2 a"):
            kdriver.dbgprint.fnmatch_lines(["1*", "9*"])
        with pytest.raises(NoSuchLine, match=r"a line matches '2\*', and none should: '2 a'"):
            kdriver.dbgprint.no_fnmatch_line("2*")

    @pytest.mark.kdriver("chatty", parameters={"Lines": 3, "Length": 1201, "Where": "cleanup"})
    def test_long_prints_come_in_pieces_of_500_bytes(self, kdriver: Driver) -> None:
        with kdriver.running():
            assert kdriver.dbgprint.lines == []
        assert [len(line) for line in kdriver.dbgprint.lines] == [500, 500, 201] * 3
        assert [line.split()[0] for line in kdriver.dbgprint.lines[::3]] == ["1", "2", "3"]
        assert [len(raw) for raw in kdriver.dbgprint.raw] == [501, 501, 202] * 3

    @hello
    def test_is_what_this_test_has_seen_and_no_other(self, kdriver: Driver) -> None:
        assert kdriver.dbgprint.lines == []
        assert list(kdriver.dbgprint.events) == []
        assert kdriver.pool.allocated == []

    @hello
    def test_is_not_what_another_driver_printed(
        self, kdriver: Driver, kdriver_target: TargetHandle
    ) -> None:
        with kdriver_target.driver("chatty", parameters={"Lines": 3}) as chatty:
            with kdriver.running(), chatty.running():
                assert len(chatty.dbgprint.lines) == 3
            assert chatty.dbgprint.lines[0].startswith("1 ")
        assert kdriver.dbgprint.lines == HELLO

    @hello
    def test_one_driver_as_two_services_is_two_drivers(
        self, kdriver: Driver, kdriver_target: TargetHandle
    ) -> None:
        with kdriver_target.driver("hello", service="hello2") as other:
            with kdriver.running(), other.running():
                assert kdriver.dbgprint.lines == HELLO[:1]
            assert other.dbgprint.lines == HELLO
        assert kdriver.dbgprint.lines == HELLO

    @hello
    def test_two_services_of_one_name_can_t_be(
        self, kdriver: Driver, kdriver_target: TargetHandle
    ) -> None:
        with kdriver_target.driver("hello") as other:
            for loaded in (True, False):
                kdriver.start()
                if not loaded:
                    kdriver.stop()
                with pytest.raises(ConfigError, match="has a service 'hello' already.*service="):
                    other.start()
                if loaded:
                    kdriver.stop()
        with kdriver.running():
            pass

    @stubborn("slow-init", Seconds=1)
    def test_lines_are_seen_while_driver_entry_runs(self, kdriver: Driver) -> None:
        seen: list[bool] = []

        def look() -> None:
            kdriver.dbgprint.expect("slow", timeout=30)
            seen.append("done" in kdriver.dbgprint.lines)

        thread = threading.Thread(target=look)
        thread.start()
        kdriver.start()
        thread.join()
        assert seen == [False]
        kdriver.dbgprint.expect("done", timeout=0)

    @hello
    def test_holds_all_when_a_call_returns(self, kdriver: Driver) -> None:
        self.cycles(kdriver, 100)

    @pytest.mark.soak
    @hello
    def test_holds_all_when_a_call_returns_in_500_cycles(self, kdriver: Driver) -> None:
        self.cycles(kdriver, 500)

    def cycles(self, kdriver: Driver, count: int) -> None:
        for number in range(count):
            before = kdriver.window.stop
            with kdriver.running():
                assert kdriver.dbgprint.lines == [*HELLO * number, HELLO[0]]
            assert kdriver.dbgprint.lines == HELLO * (number + 1)
            assert kdriver.window.stop > before


class TestPool:
    @pytest.mark.kdriver("leaks", parameters={"Blocks": 3, "Bytes": 100}, leaks="allow")
    def test_leaked_can_t_be_had_while_the_driver_is_loaded(self, kdriver: Driver) -> None:
        assert not kdriver.pool.leaked
        with kdriver.running():
            with pytest.raises(DriverError, match="still loaded.*in_use"):
                _ = kdriver.pool.leaked
            assert (kdriver.pool.in_use.total_size, kdriver.pool.in_use.total_count) == (300, 3)
        assert kdriver.pool.leaked.total_size == 300

    @pytest.mark.kdriver(
        "leaks",
        parameters={"Blocks": 4, "Names": 4, "Bytes": 100, "Tags": ["aaaa", "bbbb"]},
        leaks="allow",
    )
    def test_leaks_are_grouped_by_tag_and_caller(self, kdriver: Driver) -> None:
        kdriver.start()
        kdriver.stop()
        leaked = kdriver.pool.leaked
        assert sorted((use.tag, use.count, use.size) for use in leaked) == [
            ("aaaa", 2, 200),
            ("aaaa", 2, 200),
            ("bbbb", 2, 200),
            ("bbbb", 2, 200),
        ]
        assert {use.pool_type for use in leaked} == {"NonPagedPoolNx"}
        assert len({use.caller for use in leaked}) == 2
        places = {re.sub(r":\d+ in ", " in ", str(use.caller)) for use in leaked}
        assert places == {
            "drivers/leaks/src/lib.rs in leaks::Plan::allocate_buffers",
            "drivers/leaks/src/lib.rs in leaks::Plan::allocate_names",
        }
        assert leaked.total_size == 800
        assert kdriver.pool.allocated.total_size > 800

    @pytest.mark.kdriver(
        "leaks", parameters={"Blocks": 4, "Bytes": 10, "Tags": ["aaaa", "bbbb"]}, tags="bbbb"
    )
    def test_only_the_tags_of_the_marker_count(self, kdriver: Driver) -> None:
        kdriver.start()
        kdriver.stop()
        assert {use.tag for use in kdriver.pool.allocated} == {"bbbb"}
        assert kdriver.pool.leaked.total_count == 2
        with pytest.raises(PoolError, match="2 blocks, 20 bytes leaked"):
            kdriver.finish()
        kdriver.resume()

    @pytest.mark.parametrize("where", ["init", "cleanup"])
    @pytest.mark.parametrize("fault", ["double-free", "wrong-tag"])
    def test_faults_are_seen_and_judged_wherever_they_happen(
        self, kdriver_target: TargetHandle, fault: str, where: str
    ) -> None:
        parameters: dict[str, str | int] = {"Blocks": 0, "Fault": fault, "Where": where}
        driver = kdriver_target.make_driver("leaks", parameters=parameters)
        driver.start()
        driver.stop()
        if fault == "double-free":
            (wrong,) = driver.pool.double_frees
            assert driver.pool.wrong_tags == ()
            assert (wrong.allocated_tag, wrong.tag) == (None, "leak")
            told = "freed twice"
        else:
            (wrong,) = driver.pool.wrong_tags
            assert driver.pool.double_frees == ()
            assert (wrong.allocated_tag, wrong.tag) == ("leak", "Wrng")
            told = "freed with a wrong tag"
        assert str(wrong.caller).startswith("drivers/leaks/src/lib.rs:")
        assert not driver.pool.leaked
        with pytest.raises(PoolError, match=told):
            driver.finish()

    @pytest.mark.kdriver("leaks", parameters={"Blocks": 1, "Where": "cleanup"}, leaks="allow")
    def test_each_start_s_leaks_count(self, kdriver: Driver) -> None:
        for number in (1, 2, 3):
            with kdriver.running():
                pass
            assert kdriver.pool.leaked.total_count == number

    @pytest.mark.kdriver("leaks", leaks="allow")
    def test_what_a_driver_had_when_it_died_is_no_leak_of_a_later_start(
        self, kdriver: Driver
    ) -> None:
        kdriver.start()
        (begun,) = kdriver.window.of(DriverInitCalled)
        kdriver._target.agent.terminate(begun.process)
        with pytest.raises(DriverCrashed):
            kdriver.dbgprint.expect("what it never says", timeout=20)
        assert kdriver.pool.in_use.total_count == 1
        with kdriver.running():
            assert kdriver.pool.in_use.total_count == 1
        assert kdriver.pool.leaked.total_count == 1
        assert kdriver.pool.allocated.total_count > 1

    @hello
    def test_what_a_driver_had_when_its_guest_was_put_back_is_no_leak_of_a_later_start(
        self, kdriver: Driver, kdriver_target: TargetHandle
    ) -> None:
        with kdriver_target.driver("leaks", leaks="allow") as leaks:
            leaks.start()
            with kdriver_target.driver("panics") as panics, pytest.raises(DriverCrashed):
                panics.start()
            leaks.stop()  # it went with its guest
            with leaks.running():
                pass
            assert leaks.pool.leaked.total_count == 1


class TestTargetHandle:
    def test_runs_programs(self, kdriver_target: TargetHandle) -> None:
        done = kdriver_target.run(["cmd", "/c", "echo hello& exit 7"])
        assert (done.exit_code, done.stdout) == (7, b"hello\r\n")
        echoed = kdriver_target.run(["cmd", "/c", "more"], stdin=b"from stdin\r\n", timeout=60)
        assert b"from stdin" in echoed.stdout

    def test_ends_a_program_that_takes_too_long_and_says_so(
        self, kdriver_target: TargetHandle
    ) -> None:
        late = kdriver_target.run(["cmd", "/c", "for /l %i in (1,0,2) do @rem"], timeout=0.5)
        assert late.timed_out

    def test_a_driver_may_be_stopped_and_started_by_a_program(
        self, kdriver_target: TargetHandle
    ) -> None:
        with kdriver_target.driver("hello") as driver:
            driver.start()
            assert kdriver_target.run(["sc", "stop", "hello"]).exit_code == 0
            assert driver.dbgprint.lines == HELLO
            assert not driver.loaded
            with pytest.raises(StopFailed, match="it is not running"):
                driver.stop()
            driver.start()
            kdriver_target.run(["sc", "stop", "hello"])
        with kdriver_target.driver("leaks", parameters={"Blocks": 2}) as driver:
            driver.start()
            kdriver_target.run(["sc", "stop", "leaks"])
            with pytest.raises(PoolError, match="2 blocks"):
                driver.finish()

    def test_puts_gets_and_deletes_files(
        self, kdriver_target: TargetHandle, tmp_path: Path
    ) -> None:
        content = bytes(range(256)) * 5000
        (tmp_path / "file").write_bytes(content)
        kdriver_target.put(tmp_path / "file", "C:\\a folder\\größe.bin")
        assert kdriver_target.get("C:\\a folder\\größe.bin") == content
        kdriver_target.put(b"", "C:\\a folder\\größe.bin")
        assert kdriver_target.get("C:\\a folder\\größe.bin") == b""
        kdriver_target.delete("C:\\a folder\\größe.bin")
        with pytest.raises(AgentError) as missing:
            kdriver_target.get("C:\\a folder\\größe.bin")
        assert missing.value.code == Win32Error.ERROR_FILE_NOT_FOUND

    def test_sets_reads_and_deletes_registry_values(self, kdriver_target: TargetHandle) -> None:
        registry, key = kdriver_target.registry, "SOFTWARE\\kdriver test"
        assert registry.get(key, "Value") is None
        for value in (1, 1 << 40, "text", b"\0\xff", ["one", "two"], ""):
            registry.set(key, "Value", value)
            assert registry.get(key, "Value") == value
        registry.delete(key, "Value")
        assert registry.get(key, "Value") is None

    def test_says_what_it_is(self, kdriver_target: TargetHandle) -> None:
        assert {"kernel-log", "pool", "crashes"} <= kdriver_target.capabilities
        assert kdriver_target.name

    def test_refuses_parameters_that_the_registry_can_t_keep(
        self, kdriver_target: TargetHandle
    ) -> None:
        with (
            pytest.raises(ValueError, match="REG_QWORD"),
            kdriver_target.driver("hello", parameters={"A": 1 << 64}),
        ):
            pass

    def test_judges_each_of_its_drivers_at_the_end_of_the_with(
        self, kdriver_target: TargetHandle
    ) -> None:
        drivers: list[Driver] = []

        def start(name: str) -> Driver:
            with kdriver_target.driver(name) as driver:
                drivers.append(driver)
                driver.start()
            return driver

        def start_and(body: Callable[[], object]) -> None:
            with kdriver_target.driver("leaks", leaks="allow") as driver:
                drivers.append(driver)
                driver.start()
                body()

        start("hello")
        with pytest.raises(PoolError, match="leaked"):
            start("leaks")
        with pytest.raises(ZeroDivisionError):  # the body's error matters more
            start_and(lambda: 1 / 0)
        with pytest.raises(pytest.skip.Exception):  # an outcome, and no Exception
            start_and(lambda: pytest.skip("half way"))
        assert [(driver.loaded, driver.service_state) for driver in drivers] == [(False, None)] * 4


class TestCrash:
    @pytest.mark.parametrize(
        ("how", "code", "told"),
        [
            ("panic", 0x52555354, r"bug check 0x52555354 \(0x43, "),
            ("bug-check", 0xE2E2, r"bug check 0xE2E2 \(0x1, 0x2, 0x3, 0x4\)"),
            ("page-fault", 0xC0000005, r"page fault: write access to 0x10 at address 0x"),
            ("int3", 0x80000003, r"unhandled exception STATUS_BREAKPOINT"),
        ],
    )
    def test_says_what_and_where(
        self, kdriver_target: TargetHandle, how: str, code: int, told: str
    ) -> None:
        with kdriver_target.driver("panics", parameters={"How": how}) as driver:
            with pytest.raises(DriverCrashed, match=told) as crash:
                driver.start()
            assert crash.value.code == code
            assert crash.value.lines
            assert (crash.value.driver, crash.value.target) == ("panics", kdriver_target.name)
            if how in ("page-fault", "int3"):
                assert crash.value.address is not None
            driver.dbgprint.wait_for("about to *", timeout=0)
            assert not driver.loaded

    @pytest.mark.kdriver("hello", leaks="allow")
    def test_of_another_driver_takes_this_one_with_it_and_it_can_be_started_again(
        self, kdriver: Driver, kdriver_target: TargetHandle
    ) -> None:
        kdriver.start()
        with kdriver_target.driver("panics") as panics, pytest.raises(DriverCrashed):
            panics.start()
        kdriver.stop()
        with kdriver.running():
            assert kdriver.service_state is ServiceState.RUNNING

    def test_of_another_driver_leaves_this_one_s_leaks_unseen_and_says_so(
        self, kdriver_target: TargetHandle
    ) -> None:
        def lose_one() -> None:
            with kdriver_target.driver("hello") as lost, kdriver_target.driver("panics") as panics:
                lost.start()
                with pytest.raises(DriverCrashed):
                    panics.start()

        with pytest.raises(PoolError, match="its guest was put back while it was loaded"):
            lose_one()
