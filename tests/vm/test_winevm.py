"""A target under libvirt, on the guest that this project makes: put back for real, and what is in force."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.driver import Driver
from pytest_kdriver.errors import TargetError
from pytest_kdriver.guest.agent import CLOCK_TOLERANCE, Agent
from pytest_kdriver.image.finder import ImageFinder
from pytest_kdriver.kernel.events import KernelMessage
from pytest_kdriver.targets.libvirt import machine as libvirt_machine
from pytest_kdriver.targets.libvirt.domain import Domain
from pytest_kdriver.targets.libvirt.machine import LibvirtMachine
from pytest_kdriver.targets.machine import FOLDER
from pytest_kdriver.targets.machine_target import MachineTarget

DRIVERS = Path(__file__).parents[2] / "drivers" / "Cargo.toml"
CANARY = r"C:\canary"


@pytest.fixture(scope="session")
def images() -> ImageFinder:
    return ImageFinder(DRIVERS.parent, DRIVERS, profile="dev")


@pytest.fixture
def make(winevm: MachineTarget, images: ImageFinder) -> Iterator[Callable[[str], Driver]]:
    drivers: list[Driver] = []

    def make(name: str) -> Driver:
        driver = Driver(winevm, images.find(name, beside=None), name=name, leaks="allow")
        drivers.append(driver)
        return driver

    yield make
    for driver in drivers:
        driver.finish()


def uptime(agent: Agent) -> float:
    """Seconds since the guest booted, as its kernel counts them."""
    script = "cat /proc/uptime >/tmp/uptime.new; mv /tmp/uptime.new /tmp/uptime"
    agent.run([r"Z:\bin\sh", "-c", script])
    while agent.hash(r"Z:\tmp\uptime") is None:  # Wine tells no end of Unix programs
        time.sleep(0.05)
    return float(agent.get(r"Z:\tmp\uptime").split()[0])


def driver_processes(target: MachineTarget) -> set[int]:
    """The processes that drivers run in; Wine's own have some."""
    processes = target.agent.processes()
    return {process.pid for process in processes if process.name.lower() == "winedevice.exe"}


class TestRevert:
    def test_takes_files_and_drivers_away(
        self, winevm: MachineTarget, put_back: Callable[[], None], make: Callable[[str], Driver]
    ) -> None:
        drivers = driver_processes(winevm)
        make("echo").start()
        assert driver_processes(winevm) > drivers
        winevm.agent.put(b"alive", CANARY)
        generation = winevm.generation
        put_back()
        assert winevm.generation == generation + 1
        assert winevm.agent.hash(CANARY) is None
        assert winevm.agent.query_service("echo") is None
        assert driver_processes(winevm) == drivers

    def test_is_proved_on_the_same_guest(self, winevm: MachineTarget) -> None:
        """No new QEMU, no new agent: the snapshot was loaded."""
        before = winevm.agent
        winevm.agent.put(b"alive", CANARY)
        winevm.revert()
        assert winevm.agent is before

    def test_of_an_untouched_guest_costs_nothing(self, winevm: MachineTarget) -> None:
        generation = winevm.generation
        winevm.revert()
        assert winevm.generation == generation

    def test_lets_the_log_go_on(
        self, put_back: Callable[[], None], make: Callable[[str], Driver]
    ) -> None:
        make("hello").start()
        put_back()
        driver = make("hello")
        driver.start()
        assert driver.dbgprint.lines == ["Hello, world!"]

    def test_tells_of_no_death_of_the_drivers_that_it_took(
        self, put_back: Callable[[], None], make: Callable[[str], Driver]
    ) -> None:
        driver = make("hello")
        driver.start()
        put_back()
        assert not [e for e in driver.window.of(KernelMessage) if "agent is gone" in e.text]

    def test_brings_the_clock_along(
        self, winevm: MachineTarget, put_back: Callable[[], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was saved will be a day old: of a host that is a day ahead, here, to be seen."""
        winevm.agent.set_clock(time.time() - 86400)
        with pytest.raises(TargetError, match="the guest's clock is off by -86"):
            winevm.machine.check(winevm.guest)
        now = time.time
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: now() + 86400)
            put_back()
            assert abs(winevm.agent.clock() - time.time()) < CLOCK_TOLERANCE
        winevm.agent.set_clock(time.time())

    def test_brings_the_guests_own_time_back(
        self, winevm: MachineTarget, put_back: Callable[[], None]
    ) -> None:
        """Else all that waits in it is due at once. By TCG a TSC does not go back: see recipe.toml."""
        uptimes = []
        for _ in range(2):
            put_back()
            uptimes.append(uptime(winevm.agent))
            time.sleep(10)
        assert abs(uptimes[1] - uptimes[0]) < 5

    def test_of_a_guest_whose_agent_is_dead_brings_it_back(self, winevm: MachineTarget) -> None:
        agent = winevm.agent
        with pytest.raises(Exception, match=r"link|agent"):
            agent.terminate(agent.info.pid)
        winevm.repair()
        assert winevm.agent.query_service("kdriver") is None
        assert winevm.broken is None


class TestInForce:
    def test_a_full_disk_is_told_with_the_command_that_mends_it(
        self, winevm: MachineTarget, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(libvirt_machine, "FREE_SPACE", 1 << 50)
        with pytest.raises(TargetError, match=r"C: has \d+ MiB free.*kdriver image remove"):
            winevm.machine.check(winevm.guest)

    def test_an_agent_of_an_older_package_is_told(
        self, winevm: MachineTarget, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(libvirt_machine, "_ASKED_FOR", frozenset({"hello", "fly"}))
        with pytest.raises(TargetError, match="agent is older than this package, and can't fly"):
            winevm.machine.check(winevm.guest)


def test_an_image_that_is_there_is_not_copied_again(
    winevm: MachineTarget, images: ImageFinder, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = images.find("hello", beside=None)
    winevm.install("hello", image, {}, 30)
    winevm.uninstall("hello", 30)
    with monkeypatch.context() as patch:
        patch.setattr(winevm.agent, "put", lambda *_, **__: pytest.fail("it was copied again"))
        winevm.install("hello", image, {}, 30)
        winevm.uninstall("hello", 30)
    folder = f"{FOLDER}\\"
    winevm.agent.run(["cmd", "/c", f"rmdir /s /q {folder}"], time_limit=30)
    winevm.install("hello", image, {}, 30)


def test_libvirts_own_way_puts_back_too(
    winevm_config: TargetConfig,
    own_cache: Path,
    images: ImageFinder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For what QEMU's snapshot jobs refuse; it starts QEMU anew, and all sockets are others."""

    def refuse(*_: object) -> None:
        raise TargetError("QEMU's snapshot-save: refused")

    monkeypatch.setattr(Domain, "_save_by_qmp", refuse)
    config = replace(winevm_config, vm={**winevm_config.vm, "warm_start": False})
    target = MachineTarget("winevm", LibvirtMachine(config))
    try:
        target.start()
        assert "put back by libvirt's revert" in target.describe()
        target.agent.put(b"alive", CANARY)
        target.revert()
        assert target.generation == 2
        assert target.agent.hash(CANARY) is None
        driver = Driver(target, images.find("hello", beside=None), name="hello")
        driver.start()
        driver.stop()
        assert driver.dbgprint.lines == ["Hello, world!", "Bye bye!"]
        driver.finish()
        assert target.machine._running().domain.spec.name.endswith("-1")  # type: ignore[attr-defined]
    finally:
        target.close()


def test_its_description_says_what_it_runs_by_and_how_it_is_put_back(winevm: MachineTarget) -> None:
    told = winevm.describe()
    assert "winevm under libvirt" in told
    assert "KVM" in told
    assert "put back by QEMU's snapshot-load" in told
