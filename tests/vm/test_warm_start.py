"""A guest that goes on from where another one like it had booted to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.driver import Driver
from pytest_kdriver.guest.agent import CLOCK_TOLERANCE
from pytest_kdriver.image.finder import ImageFinder
from pytest_kdriver.targets.libvirt.machine import LibvirtMachine
from pytest_kdriver.targets.machine_target import MachineTarget
from tests.vm.conftest import MANIFEST

CANARY = r"C:\canary"


@pytest.fixture
def start(winevm_config: TargetConfig, own_cache: Path) -> Iterator[Callable[[], MachineTarget]]:
    """Start a target on a winevm that no other test has."""
    config = replace(winevm_config, vm={**winevm_config.vm, "memory": 768})
    targets: list[MachineTarget] = []

    def start() -> MachineTarget:
        targets.append(MachineTarget("warm", LibvirtMachine(config)))
        targets[-1].start()
        return targets[-1]

    yield start
    for target in targets:
        target.close()


def booted(target: MachineTarget) -> bool:
    """Whether this machine booted: its kernel says so on the console."""
    machine = target.machine
    assert isinstance(machine, LibvirtMachine)
    console = machine._running().domain.spec.console
    assert console is not None
    return "Linux version" in console.read_text(errors="replace")


def kept(target: MachineTarget) -> Path:
    """Where a guest like this one is kept."""
    machine = target.machine
    assert isinstance(machine, LibvirtMachine)
    warm_start = machine._running().warm_start
    assert warm_start is not None
    return warm_start.path


def test_one_that_can_not_go_on_boots_and_others_go_on_from_there(
    start: Callable[[], MachineTarget], capfd: pytest.CaptureFixture[str]
) -> None:
    found = start()  # booted or not
    with kept(found).open("r+b") as disk:
        disk.truncate(1 << 20)
    found.close()
    capfd.readouterr()

    first = start()
    assert booted(first)
    assert "boots, as it could not go on from its last boot: " in capfd.readouterr().err
    assert kept(first).stat().st_mode & 0o777 == 0o600
    first.close()

    second, third = start(), start()
    assert not booted(second)
    assert not booted(third)
    for target in (second, third):
        assert abs(target.agent.clock() - time.time()) < CLOCK_TOLERANCE
    assert capfd.readouterr().err == ""

    image = ImageFinder(MANIFEST.parent, MANIFEST, profile="dev").find("hello", beside=None)
    second.agent.put(b"alive", CANARY)
    for _ in range(2):
        driver = Driver(second, image, name="hello")
        with driver.running():
            driver.dbgprint.expect("Hello, world!")
        driver.finish()
        second.revert()
        assert second.agent.hash(CANARY) is None
