"""Wine as a target, below the plugin: clones, reverts, deaths, and what is left in the end."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.driver import Driver
from pytest_kdriver.errors import (
    AgentError,
    DriverCrashed,
    DriverTimeout,
    NotImplementedByGuest,
    TargetError,
    UnloadRefused,
)
from pytest_kdriver.handle import TargetHandle
from pytest_kdriver.image.cargo import Cargo
from pytest_kdriver.image.finder import ImageFinder
from pytest_kdriver.kernel.events import DebugPrint, KernelMessage, ProcessDied
from pytest_kdriver.targets import machine_target, prefix
from pytest_kdriver.targets import wine as wine_module
from pytest_kdriver.targets.target import ParameterValue
from pytest_kdriver.targets.wine import WineTarget

CONFIG = TargetConfig(name="wine", kind="wine")
CANARY = "C:\\canary.txt"

Make = Callable[..., Driver]


@pytest.fixture(scope="module")
def shared(cache: Path) -> Iterator[WineTarget]:
    """One target for all tests that leave it as it was, or put it back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDRIVER_CACHE", str(cache))
        target = WineTarget(CONFIG)
        target.start()
        yield target
        target.close()


@pytest.fixture
def target(shared: WineTarget, own_cache: Path) -> WineTarget:
    shared.revert()
    return shared


def drivers_on(target: WineTarget, cargo: Cargo) -> Make:
    handle = TargetHandle(target, ImageFinder(Path("/"), cargo.manifest))

    def make(name: str, parameters: Mapping[str, ParameterValue] | None = None) -> Driver:
        image = cargo.build(name)
        return handle.make_driver(str(image), parameters=parameters)

    return make


@pytest.fixture
def make(target: WineTarget, cargo: Cargo) -> Make:
    """A driver on the target; it is not judged."""
    return drivers_on(target, cargo)


def unix_pid(target: WineTarget, what: str) -> int:
    """The process of the target's prefix whose command line, or mapped files, name ``what``."""
    found = []
    for pid in prefix.processes(target.prefix):
        process = Path("/proc", str(pid))
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            if what in command or what in (process / "maps").read_text():
                found.append(pid)
        except OSError:
            continue
    (pid,) = found
    return pid


class TestClone:
    def test_costs_less_than_20_mb_of_its_own(self, target: WineTarget) -> None:
        own = shared_size = 0
        for folder, _, files in os.walk(target.prefix):
            for name in files:
                status = Path(folder, name).lstat()
                if status.st_nlink == 1:
                    own += status.st_blocks * 512
                else:
                    shared_size += status.st_size
        assert own < 20_000_000
        assert shared_size > 100_000_000

    def test_shares_nothing_that_programs_write(self, target: WineTarget) -> None:
        for name in ("system.reg", "user.reg", "userdef.reg"):
            assert (target.prefix / name).stat().st_nlink == 1


class TestRevert:
    def test_gives_a_clean_guest(self, target: WineTarget, make: Make) -> None:
        driver = make("hello")
        driver.start()
        target.agent.put(b"here", CANARY)
        target.agent.set_value("SOFTWARE\\kdriver", "canary", 1)
        generation, old = target.generation, target.prefix
        target.revert()
        assert target.generation == generation + 1
        assert not old.exists()
        with pytest.raises(AgentError):
            target.agent.get(CANARY)
        assert target.agent.get_value("SOFTWARE\\kdriver", "canary") is None
        assert target.agent.query_service("hello") is None

    def test_of_an_untouched_guest_costs_nothing(self, target: WineTarget) -> None:
        generation = target.generation
        target.revert()
        target.repair()
        assert target.generation == generation


class TestDeath:
    def test_of_a_driver_s_process_is_found_though_nothing_says_so(
        self, target: WineTarget, make: Make
    ) -> None:
        driver = make("hello")
        driver.start()
        window = target.log.window("hello")
        os.kill(unix_pid(target, "/hello.sys"), signal.SIGKILL)
        found = window.wait_for(lambda _, event: isinstance(event, ProcessDied), 5.0)
        assert found is not None, "not found within 5 s; it should take well below one"
        with pytest.raises(DriverCrashed, match="the process that ran the driver ended"):
            driver.stop()
        assert driver.start() == 0
        driver.stop()

    def test_of_the_agent_is_told_by_a_loaded_driver_and_the_guest_put_back(
        self, target: WineTarget, make: Make
    ) -> None:
        driver = make("hello")
        driver.start()
        window = target.log.window("hello")
        os.kill(unix_pid(target, "kdagent.exe"), signal.SIGKILL)
        assert window.wait_for(lambda _, event: isinstance(event, ProcessDied), 5.0) is not None
        assert any("the agent is gone" in event.text for event in window.of(KernelMessage))
        with pytest.raises(DriverCrashed):
            driver.stop()
        generation = target.generation
        assert driver.start() == 0
        assert target.generation == generation + 1
        driver.stop()

    def test_of_the_agent_between_calls_is_mended_by_the_next(
        self, target: WineTarget, make: Make
    ) -> None:
        pid = unix_pid(target, "kdagent.exe")
        dying = target.agent.wait_process(target.agent.info.pid)
        os.kill(pid, signal.SIGKILL)
        assert dying.exception(10) is not None
        driver = make("hello")
        assert driver.start() == 0
        driver.stop()

    def test_of_services_exe_is_told_and_the_guest_put_back(
        self, target: WineTarget, make: Make
    ) -> None:
        driver = make("hello")
        services = unix_pid(target, "services.exe")
        os.kill(services, signal.SIGKILL)
        with pytest.raises(TargetError, match=r"services\.exe is gone"):
            driver.start()
        assert driver.start() == 0
        driver.stop()

    def test_of_the_agent_s_patience_is_told_as_the_target_s(
        self, target: WineTarget, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        driver = make("hello")
        driver.start()
        monkeypatch.setattr(machine_target, "FENCE_TIMEOUT", 0.2)
        os.kill(unix_pid(target, "kdagent.exe"), signal.SIGSTOP)
        with pytest.raises(TargetError, match="its kernel log does not flow"):
            driver.stop(timeout=0.2)
        monkeypatch.undo()
        assert driver.start() == 0
        driver.stop()


Crash = tuple[str, Mapping[str, ParameterValue], type[Exception]]

CRASHES: list[Crash] = [
    ("panics", {"How": "panic"}, DriverCrashed),
    ("panics", {"How": "panic", "Where": "cleanup"}, DriverCrashed),
    ("panics", {"How": "page-fault"}, DriverCrashed),
    ("panics", {"How": "page-fault", "Where": "cleanup"}, DriverCrashed),
    ("panics", {"How": "bug-check"}, DriverCrashed),
    ("panics", {"How": "bug-check", "Where": "cleanup"}, DriverCrashed),
    ("panics", {"How": "int3"}, DriverCrashed),
    ("panics", {"How": "int3", "Where": "cleanup"}, DriverCrashed),
    ("missing", {}, DriverCrashed),
    ("stubborn", {"How": "no-unload"}, UnloadRefused),
    ("stubborn", {"How": "slow-init"}, DriverTimeout),
    ("stubborn", {"How": "slow-cleanup", "Busy": 1}, DriverTimeout),
]


class TestCrashes:
    def test_in_a_row_each_followed_by_a_start_that_works(
        self, target: WineTarget, make: Make
    ) -> None:
        self.crash(make, CRASHES)

    @pytest.mark.soak
    @pytest.mark.parametrize("crash", CRASHES)
    def test_ten_of_a_kind_in_a_row(
        self,
        target: WineTarget,
        make: Make,
        crash: Crash,
    ) -> None:
        self.crash(make, [crash] * 10)

    def crash(self, make: Make, crashes: list[Crash]) -> None:
        for name, parameters, error in crashes:
            bad = make(name, parameters)
            with pytest.raises(error):
                start_and_stop(bad)
            bad.finish()
            good = make("hello")
            start_and_stop(good)
            assert good.dbgprint.lines == ["Hello, world!", "Bye bye!"]
            good.finish()


def start_and_stop(driver: Driver) -> None:
    driver.start(timeout=None if driver.name != "stubborn" else 1.0)
    driver.stop(timeout=None if driver.name != "stubborn" else 1.0)


class TestLog:
    def test_goes_to_disk_and_is_read_back(
        self, own_cache: Path, cargo: Cargo, tmp_path: Path
    ) -> None:
        target = WineTarget(CONFIG, artifacts=tmp_path / "artifacts")
        target.start()
        try:
            chatty = drivers_on(target, cargo)("chatty", {"Lines": 40000, "Length": 60})
            chatty.start()
            (spilled,) = (tmp_path / "artifacts").glob("*.events")
            assert spilled.stat().st_size > 1_000_000
            lines = chatty.dbgprint.lines
            assert [int(line.split()[0]) for line in lines] == list(range(1, 40001))
        finally:
            target.close()
        assert chatty.dbgprint.lines == lines
        assert list((tmp_path / "artifacts").glob("*")) == []


class TestAgent:
    def test_on_wine_a_driver_can_t_be_loaded_but_by_the_service_manager(
        self, target: WineTarget, make: Make, cargo: Cargo
    ) -> None:
        target.install("hello", cargo.build("hello"), {}, 30)
        with pytest.raises(NotImplementedByGuest):
            target.agent.load_driver("hello")


class TestEnd:
    def test_leaves_nothing(
        self,
        own_cache: Path,
        cargo: Cargo,
        left_behind: Callable[[], list[str]],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        temporary = tmp_path / "tmp"
        temporary.mkdir()
        monkeypatch.setenv("TMPDIR", str(temporary))  # Debian's Wine 10 dies of one
        before = set(left_behind())
        target = WineTarget(CONFIG)
        target.start()
        driver = drivers_on(target, cargo)("hello")
        driver.start()
        server = Path("/proc", str(unix_pid(target, "wineserver")), "cwd").readlink()
        assert server.is_dir()
        assert set(left_behind()) - before
        target.close()
        target.close()
        assert not set(left_behind()) - before
        assert not server.exists()
        assert not list(temporary.iterdir())

    def test_leaves_no_file_descriptor_however_often(self, own_cache: Path, cargo: Cargo) -> None:
        def open_descriptors() -> int:
            gc.collect()  # a log's file is open for as long as something may read it
            return len(list(Path("/proc/self/fd").iterdir()))

        def use() -> None:
            target = WineTarget(CONFIG)
            target.start()
            driver = drivers_on(target, cargo)("chatty", {"Lines": 30000})
            driver.start()
            driver.stop()
            target.break_down("to have it made anew")
            target.repair()
            target.close()

        use()
        before = open_descriptors()
        for _ in range(3):
            use()
        assert open_descriptors() == before

    def test_of_a_closed_target_is_told(self, own_cache: Path) -> None:
        target = WineTarget(CONFIG)
        with pytest.raises(TargetError, match="was not started"):
            _ = target.log
        with pytest.raises(TargetError, match="is not running"):
            _ = target.agent
        target.close()

    def test_of_a_wine_that_does_not_start_is_told_and_leaves_nothing(
        self,
        own_cache: Path,
        monkeypatch: pytest.MonkeyPatch,
        left_behind: Callable[[], list[str]],
    ) -> None:
        before = set(left_behind())
        target = WineTarget(CONFIG)
        nowhere = SimpleNamespace(executable=lambda: Path("/nonexistent.exe"))
        monkeypatch.setattr(wine_module, "AGENT", nowhere)
        with pytest.raises(TargetError, match="it did not start"):
            target.start()
        target.close()
        assert not set(left_behind()) - before


@pytest.fixture
def stillborn(tmp_path: Path) -> Callable[[int], TargetConfig]:
    """A Wine whose agents end before they say a word, so many times."""

    def make(times: int) -> TargetConfig:
        real = prefix.find_wine()
        loader, left = tmp_path / "wine64", tmp_path / "left"
        left.write_text("x" * times)
        loader.write_text(
            "#!/bin/sh\n"
            f'if [ -s {left} ] && [ "${{1%kdagent.exe}}" != "$1" ]; then\n'
            f"    truncate -s -1 {left}; exit 7\n"
            "fi\n"
            f'exec {real.loader} "$@"\n'
        )
        loader.chmod(0o755)
        (tmp_path / "wineserver64").symlink_to(real.server)
        return TargetConfig(name="wine", kind="wine", wine=str(loader))

    return make


class TestStillbornAgent:
    def test_is_started_again(
        self, own_cache: Path, stillborn: Callable[[int], TargetConfig], cargo: Cargo
    ) -> None:
        target = WineTarget(stillborn(wine_module.START_ATTEMPTS - 1))
        try:
            target.start()
            driver = drivers_on(target, cargo)("hello")
            with driver.running():
                pass
            assert driver.dbgprint.lines == ["Hello, world!", "Bye bye!"]
        finally:
            target.close()

    def test_is_told_where_it_happens_each_time(
        self, own_cache: Path, stillborn: Callable[[int], TargetConfig]
    ) -> None:
        target = WineTarget(stillborn(wine_module.START_ATTEMPTS))
        with pytest.raises(TargetError, match="it ended with 7"):
            target.start()
        target.close()


def test_a_print_of_another_process_is_no_driver_s(target: WineTarget, make: Make) -> None:
    driver = make("hello")
    driver.start()
    target.agent.fence("a word of the agent's")
    target.fence()
    assert [event.lines for event in driver.window.of(DebugPrint)] == [["Hello, world!"]]
    driver.stop()
