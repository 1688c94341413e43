"""A debugger at a guest's real serial port: QEMU's, with the simulated kernel behind it in ``winevm``."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.kernel.events import BugCheck, DebugPrint, Event, ImageLoaded, ProcessorState
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.kernel.sources.kd.session import KdSession, KdState
from pytest_kdriver.targets.kd_pump import KdPump
from pytest_kdriver.targets.libvirt.domain import Domain
from pytest_kdriver.targets.libvirt.domain_xml import DomainSpec
from pytest_kdriver.targets.libvirt.machine import LibvirtMachine
from pytest_kdriver.targets.machine_target import MachineTarget
from tests.kd.simulator import DATA, HEADER

SIMULATOR = Path(__file__).parents[1] / "kd"
SECONDS = 60.0
LONG = "." * 400
"""So much that the line is hardly ever silent: 36 ms of a print, at a serial line's speed."""

STATUS = r"Z:\run\kd\status"

Step = dict[str, dict[str, Any]]


class Machine(LibvirtMachine):
    """A guest that has a second serial port."""

    def _specify(self, *args: Any, sockets: Path, **others: Any) -> DomainSpec:
        spec = super()._specify(*args, sockets=sockets, **others)
        return replace(spec, ports=(*spec.ports, ("com2", sockets / "kd")))


class Recorded(KdSession):
    """Keeps what it heard."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = b""

    def receive_data(self, data: bytes, now: float) -> list[Event]:
        self.heard += data
        return super().receive_data(data, now)

    @property
    def is_within_packet(self) -> bool:
        """Whether what it heard, which must be without a fault so far, ends in the middle of a packet."""
        at, behind = 0, 0
        while at <= len(self.heard) - HEADER.size:
            leader, _, size, _, _ = HEADER.unpack_from(self.heard, at)
            behind = at + HEADER.size + (size + 1 if leader == DATA else 0)
            if behind > len(self.heard):
                return True
            at = behind
        return at < len(self.heard)


class Guest:
    """A guest, and a debugger at its COM2."""

    def __init__(self, target: MachineTarget) -> None:
        self.target = target
        machine = target.machine
        assert isinstance(machine, LibvirtMachine)
        vm = machine._running()
        self.domain: Domain = vm.domain
        self.session = Recorded()
        self.log = KernelLog()
        self.pump = KdPump(vm.sockets / "kd", self.log, "kd", session=self.session, timeout=SECONDS)

    def simulate(self, *steps: Step) -> None:
        """Have the guest's COM2 be a kernel's that does ``steps``."""
        agent = self.target.agent
        for name in ("run.py", "simulator.py"):
            agent.put(SIMULATOR / name, rf"Z:\run\kd\{name}")
        agent.put(json.dumps(steps).encode(), r"Z:\run\kd\script")
        command = ["systemd-run", "--unit=kd", "python3", "/run/kd/run.py", "--port", "/dev/ttyS1"]
        command += ["--baud", "115200", "--faulty"]
        command += ["--script", "/run/kd/script", "--status", "/run/kd/status"]
        agent.run([r"Z:\bin\sh", "-c", shlex.join(command)])

    def mistakes(self) -> list[str]:
        """What the kernel says that its debugger did wrong."""
        status: dict[str, list[str]] = json.loads(self.target.agent.get(STATUS))
        return status["errors"]

    def wait(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        position = 0
        while not until():
            assert time.monotonic() < deadline, list(self.log.read())[-20:]
            self.log.wait(position, time.monotonic() + 0.1)
            position = len(self.log)

    def numbers(self) -> list[int]:
        """The numbers that were printed, as they were told."""
        prints = (event for event in self.log.read() if isinstance(event, DebugPrint))
        return [int(event.text.split()[0]) for event in prints]

    def wait_for_more(self, number: int) -> None:
        """Wait for so many prints more."""
        wanted = len(self.numbers()) + number
        self.wait(lambda: len(self.numbers()) >= wanted)


@pytest.fixture(scope="module")
def shared(winevm_config: TargetConfig, vm_cache: Path) -> Iterator[MachineTarget]:
    config = replace(winevm_config, vm={**winevm_config.vm, "warm_start": False})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDRIVER_CACHE", str(vm_cache))
        target = MachineTarget(config.name, Machine(config))
        try:
            target.start()
            yield target
        finally:
            target.close()


@pytest.fixture
def guest(shared: MachineTarget, own_cache: Path) -> Iterator[Guest]:
    shared.revert()
    guest = Guest(shared)
    yield guest
    guest.pump.close()


def runs(numbers: list[int]) -> list[list[int]]:
    """Them, cut where one is not the next of the one before."""
    cut: list[list[int]] = []
    for number in numbers:
        if cut and number == cut[-1][-1] + 1:
            cut[-1].append(number)
        else:
            cut.append([number])
    return cut


COUNT: Step = {"count": {"text": "{n} " + LONG + "\n", "number": 100_000}}


def test_prints_come_once_and_in_order_across_loads_of_a_snapshot_from_within_a_packet(
    guest: Guest,
) -> None:
    guest.simulate(COUNT)
    guest.wait_for_more(20)
    for _ in range(50):
        with guest.domain.held():
            guest.pump.catch_up()  # what QEMU holds comes also from a guest that stands still
            if guest.session.is_within_packet:
                before = guest.numbers()[-1]
                guest.domain.snapshot_save("within", method="qmp")
                break
        guest.wait_for_more(1)
    else:
        pytest.fail("the guest was never stopped in the middle of a packet")
    for _ in range(5):
        guest.wait_for_more(10)
        guest.domain.snapshot_load("within")
        guest.pump.begin(SECONDS)
        guest.wait_for_more(20)
    first, *others = runs(guest.numbers())
    assert first[0] == 0
    assert [run[0] for run in others] == [before + 1] * 5
    assert all(len(run) >= 20 for run in others)
    assert guest.session.attached
    assert guest.mistakes() == []


def test_no_print_is_lost_where_the_debugger_goes_and_comes_again(guest: Guest) -> None:
    """The one that was under way may come again: nobody knows whether it was heard."""
    guest.simulate(COUNT)
    for _ in range(5):
        guest.wait_for_more(10)
        guest.pump.reconnect(SECONDS)
        guest.pump.begin(SECONDS)
    guest.wait_for_more(10)
    found = runs(guest.numbers())
    assert found[0][0] == 0
    assert all(later[0] == earlier[-1] for earlier, later in pairwise(found))
    assert len(found) <= 6
    assert guest.mistakes() == []


def test_a_kernel_that_nobody_listened_to_is_found(guest: Guest) -> None:
    """QEMU drops what comes while nobody is at its socket."""
    guest.pump.close()
    guest.simulate(COUNT)
    guest.wait(lambda: guest.target.agent.hash(STATUS) is not None)
    met = Guest(guest.target)
    try:
        met.pump.begin(SECONDS)
        met.wait_for_more(20)
        assert len(runs(met.numbers())) == 1
        assert met.numbers()[0] == 0
        met.pump.break_in(SECONDS)
        states = [event for event in met.log.read() if isinstance(event, ProcessorState)]
        assert [state.processor for state in states] == [0, 1]
        met.wait_for_more(5)
        assert met.mistakes() == []
    finally:
        met.pump.close()


def test_a_bug_check_behind_a_serial_port_has_its_stack(guest: Guest) -> None:
    base = 0xFFFFF80340000000
    path = r"\SystemRoot\System32\drivers\demo.sys"
    fatal = {
        "code": 0xD1,
        "parameters": [1, 2, 3, 4],
        "blamed": "demo.sys",
        "stack": [base + 0x123],
    }
    guest.simulate({"load": {"path": path, "base": base, "size": 0x6000}}, {"bug_check": fatal})
    guest.wait(lambda: guest.session.state is KdState.HELD)
    guest.pump.catch_up()
    images = [event.driver for event in guest.log.read() if isinstance(event, ImageLoaded)]
    assert images[-1] == "demo"
    (found,) = [event for event in guest.log.read() if isinstance(event, BugCheck)]
    assert (found.code, found.parameters, found.blamed) == (0xD1, (1, 2, 3, 4), "demo.sys")
    assert base + 0x123 in found.stack
    assert guest.mistakes() == []
