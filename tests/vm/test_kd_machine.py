"""A machine whose kernel has a debugger, on libvirt and QEMU: the simulated kernel, at winevm's COM2."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.errors import LinkError, TargetError
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.kernel.dump import read_dump
from pytest_kdriver.kernel.events import BugCheck, DebugPrint, KernelMessage, ProcessorState
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.kernel.sources.text import SerialText
from pytest_kdriver.targets.kd_pump import KdPump, SerialPump
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.libvirt.kept import kept_vms
from pytest_kdriver.targets.libvirt.machine import LibvirtMachine
from pytest_kdriver.targets.machine_target import MachineTarget
from tests.dump_builder import header, minidump
from tests.vm.standin import PREFIX
from tests.vm.tiny_guest import TinyGuest

SIMULATOR = [Path(__file__).parents[1] / "kd" / name for name in ("run.py", "simulator.py")]
KDRIVER = "import sys; from pytest_kdriver.cli import main; sys.exit(main())"
TICK = 0.02
NT = 0xFFFFF80000000000
SECONDS = 30.0


class Machine(LibvirtMachine):
    """Starts the simulated kernel when the agent of a guest that booted first answers."""

    def _reach_agent(self, vm, deadline):  # type: ignore[no-untyped-def]  # as it is there
        agent = super()._reach_agent(vm, deadline)
        if vm.agent is None and not is_simulated(agent):
            begin_to_simulate(agent)
        return agent


def shell(agent: Agent, command: str) -> None:
    """Have the guest's Linux do it; nobody waits for its end."""
    agent.run([r"Z:\bin\sh", "-c", command])


def is_simulated(agent: Agent) -> bool:
    return agent.hash(r"Z:\run\kd\steps") is not None


def begin_to_simulate(agent: Agent) -> None:
    for path in SIMULATOR:
        agent.put(path, f"Z:\\run\\kd\\{path.name}")
    image = {"path": r"\SystemRoot\system32\ntoskrnl.exe", "base": NT, "size": 0x1000000}
    agent.put(json.dumps({"load": image}).encode() + b"\n", r"Z:\run\kd\steps")
    step = json.dumps({"print": {"text": "tick N\n"}}).replace("N", "'$n'")
    count = f"n=$((n + 1)); printf '%s\\n' '{step}' >> /run/kd/steps"
    agent.put(
        "tail -n +1 -f /run/kd/steps | python3 /run/kd/run.py --port /dev/ttyS1 --faulty &\n"
        f"n=0; while sleep {TICK}; do {count}; done\n".encode(),
        r"Z:\run\kd\simulate",
    )
    shell(agent, "systemd-run --unit=kd /bin/sh /run/kd/simulate")


def do(agent: Agent, step: dict[str, dict[str, object]]) -> None:
    shell(agent, f"printf '%s\\n' '{json.dumps(step)}' >> /run/kd/steps")


@pytest.fixture(scope="module")
def target(winevm_config: TargetConfig, vm_cache: Path) -> Iterator[MachineTarget]:
    settings = {
        **winevm_config.vm,
        "kernel_log": "kd",
        "kernel_log_port": "com2",
        "warm_start": False,
    }
    config = TargetConfig(name="kd", kind="libvirt", vm=settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDRIVER_CACHE", str(vm_cache))
        target = MachineTarget("kd", Machine(config, dumps=True))
        try:
            target.start()
            yield target
        finally:
            target.close()


def ticks(target: MachineTarget, start: int, least: int = 20) -> list[int]:
    """The numbers of the prints from log position ``start`` on, at least so many."""
    window = target.log.window(None, start)
    deadline = time.monotonic() + SECONDS
    while True:
        found = [int(event.text.split()[1]) for event in window.of(DebugPrint)]
        if len(found) >= least:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(TICK)


def test_is_met_while_it_runs_and_each_print_comes_once(target: MachineTarget) -> None:
    assert isinstance(target.guest.feed, KdPump)
    assert "us for its debugger on average, " in target.describe()
    assert "kernel-log" in target.capabilities
    found = ticks(target, 0)
    assert found == list(range(found[0], found[0] + len(found)))


@pytest.mark.parametrize("time_", range(3))
def test_goes_on_where_it_was_when_it_is_put_back(target: MachineTarget, time_: int) -> None:
    before = ticks(target, len(target.log), 60)[-1]
    _ = target.agent  # it may have been touched
    generation, position = target.generation, len(target.log)
    target.revert()
    assert target.generation == generation + 1
    told = [event.text for event in target.log.window(None, position).of(KernelMessage)]
    assert not [text for text in told if "made anew" in text]
    begin = len(target.log)
    found = ticks(target, begin)
    assert found[0] < before
    assert found == list(range(found[0], found[0] + len(found)))


def test_tells_where_its_processors_are_and_goes_on(target: MachineTarget) -> None:
    position = len(target.log)
    target.examine_hang()
    window = target.log.window(None, position)
    assert [state.processor for state in window.of(ProcessorState)] == [0, 1]
    assert ticks(target, len(target.log))


def test_that_bug_checks_ends_what_waits_for_its_agent_and_is_put_back(
    target: MachineTarget,
) -> None:
    agent, position = target.agent, len(target.log)
    parameters = [8, 2, 0, NT + 0x1000]
    do(agent, {"bug_check": {"code": 0xD1, "parameters": parameters, "blamed": "a.sys"}})
    with pytest.raises(LinkError):
        agent.run(["cmd.exe", "/c", "pause"], stdin=b"", time_limit=SECONDS)
    found = target.log.window(None, position).wait_for(
        lambda _, event: isinstance(event, BugCheck), SECONDS
    )
    assert found is not None
    assert isinstance(found[1], BugCheck)
    assert (found[1].code, found[1].blamed) == (0xD1, "a.sys")
    assert "bug check 0xD1 DRIVER_IRQL_NOT_LESS_OR_EQUAL" in str(target.machine.failure())
    with pytest.raises(TargetError), target.agent_errors("load"):
        target.agent.query_service("kdriver")
    target.repair()
    assert ticks(target, len(target.log))


def test_its_dump_is_fetched_behind_its_restart(target: MachineTarget, tmp_path: Path) -> None:
    agent, position = target.agent, len(target.log)
    content = minidump(head=bytes(header(code=0xD1)))
    agent.put(b"an older one", r"C:\Windows\Minidump\122525-1-01.dmp")
    shell(agent, f"touch -d yesterday {PREFIX}/drive_c/windows/Minidump/122525-1-01.dmp")
    agent.put(content, r"C:\Windows\Minidump\112326-1-01.dmp")  # which the simulated kernel won't
    do(agent, {"bug_check": {"code": 0xD1, "parameters": [8, 2, 0, NT + 0x1000]}})
    window = target.log.window(None, position)
    assert window.wait_for(lambda _, event: isinstance(event, BugCheck), SECONDS)
    target.break_down("it crashed")
    assert target.collect(tmp_path / "test", dump=True) == []
    assert {path.name for path in tmp_path.iterdir()} >= {"test.png", "test.xml", "test.dmp"}
    assert read_dump(tmp_path / "test.dmp").code == 0xD1
    assert (tmp_path / "test.dmp").read_bytes() == content
    target.repair()
    assert ticks(target, len(target.log))


def test_that_is_kept_can_be_listened_to(target: MachineTarget, own_cache: Path) -> None:
    told = target.keep()
    assert told is not None
    found = re.search(r"kdriver (kd listen unix:\S+)", told)
    assert found is not None
    command = [sys.executable, "-c", KDRIVER, *found[1].split()]
    (machine,) = kept_vms()
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listener:
            assert listener.stdout is not None
            assert next(line for line in listener.stdout if "tick" in line)
            listener.send_signal(signal.SIGINT)
        assert listener.returncode == 0
    finally:
        machine.remove()


def test_text_of_a_guest_s_serial_port_is_lines(hypervisor: Hypervisor, guest_folder: Path) -> None:
    log = KernelLog()
    guest = TinyGuest(hypervisor, guest_folder)
    pumps: list[SerialPump] = []
    try:
        guest.domain.start_held(
            lambda: pumps.append(SerialPump(guest.sockets / "com1", SerialText(), log, "text"))
        )
        window = log.window(None, 0)
        found = window.wait_for(lambda _, event: isinstance(event, DebugPrint), SECONDS)
        assert found is not None
        assert next(window.of(DebugPrint)).lines == ["the tiny guest is up"]
    finally:
        for pump in pumps:
            pump.close()
        guest.close()
