"""A machine that can be put back, and whose kernel log can't be had, as a Windows's without a debugger."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.driver import Driver
from pytest_kdriver.errors import TargetError
from pytest_kdriver.image.cargo import Cargo
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.targets import prefix
from pytest_kdriver.targets.machine import Guest
from pytest_kdriver.targets.machine_target import MachineTarget
from pytest_kdriver.targets.runs import Run
from pytest_kdriver.targets.wine import WineMachine

PATIENCE = 20.0


class BlindWine(WineMachine):
    """A Wine whose trace nobody reads to the end."""

    def boot(self, run: Run, log: KernelLog, generation: int) -> Guest:
        return Guest(super().boot(run, log, generation).agent, None)


@pytest.fixture
def target(own_cache: Path) -> Iterator[MachineTarget]:
    config = TargetConfig(
        name="blind", kind="wine", without=frozenset({"kernel-log", "pool", "crashes"})
    )
    try:
        machine = BlindWine(config)
    except TargetError as error:
        pytest.skip(str(error))
    target = MachineTarget("blind", machine)
    try:
        target.start()
        yield target
    finally:
        target.close()


def lose_the_agent(target: MachineTarget) -> None:
    machine = target.machine
    assert isinstance(machine, WineMachine)
    for pid in prefix.processes(machine.prefix):
        if b"kdagent.exe" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while not target.guest.agent.closed:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def hello(target: MachineTarget, cargo: Cargo) -> Driver:
    return Driver(target, cargo.build("hello"), name="hello", leaks="allow", timeout=30)


def test_a_loss_between_two_calls_of_a_test_fails_it_once(
    target: MachineTarget, cargo: Cargo
) -> None:
    driver = hello(target, cargo)
    assert driver.start() == NTSTATUS.STATUS_SUCCESS
    generation = target.generation
    lose_the_agent(target)
    with pytest.raises(TargetError, match="the connection was lost while hello was installed"):
        driver.stop()
    driver.finish()
    assert target.generation == generation + 1
    second = hello(target, cargo)
    assert second.start() == NTSTATUS.STATUS_SUCCESS
    second.stop()


def test_a_loss_with_no_driver_there_is_mended_in_silence(
    target: MachineTarget, cargo: Cargo
) -> None:
    driver = hello(target, cargo)
    driver.start()
    driver.stop()
    driver.finish()
    lose_the_agent(target)
    target.repair()
    assert hello(target, cargo).start() == NTSTATUS.STATUS_SUCCESS


def test_what_was_installed_before_it_was_put_back_is_forgotten(
    target: MachineTarget, cargo: Cargo
) -> None:
    hello(target, cargo).start()
    target.revert()
    lose_the_agent(target)
    target.repair()
    assert target.agent.query_service("hello") is None
