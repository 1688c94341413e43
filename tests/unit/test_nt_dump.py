"""A crash that nobody tells of but the guest's dump."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_kdriver.errors import DriverCrashed
from pytest_kdriver.guest.messages import Completed
from pytest_kdriver.handle import TargetHandle
from pytest_kdriver.image.finder import ImageFinder
from pytest_kdriver.kernel.events import BugCheck
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.targets.machine import Guest
from pytest_kdriver.targets.machine_target import MachineTarget
from pytest_kdriver.targets.runs import Run
from pytest_kdriver.targets.windows import dumps
from tests.nt.drivers import write_images
from tests.nt.guest import NtGuest
from tests.nt.machine import NtMachine


class BlindMachine(NtMachine):
    """What its kernel's debugger is told is in nobody's log: as if it had none."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.capabilities -= {"kernel-log"}

    def boot(self, run: Run, log: KernelLog, generation: int) -> Guest:
        return super().boot(run, KernelLog(), generation)

    def _guest(self) -> Guest:
        return Guest(super()._guest().agent, None)


def test_is_the_crash_of_the_call_that_brought_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path)
    target = MachineTarget("nt", BlindMachine("nt"))
    try:
        target.start()
        handle = TargetHandle(target, ImageFinder(tmp_path, None))
        driver = handle.make_driver(str(tmp_path / "panics.sys"), parameters={"How": "bug-check"})
        with pytest.raises(DriverCrashed) as caught:
            driver.start()
        assert caught.value.code == 0xE2E2
        assert caught.value.parameters == (1, 2, 3, 4)
        assert target.collect(tmp_path / "test", dump=True) == []
        assert (tmp_path / "test.dmp").read_bytes().startswith(b"PAGEDU64")
        driver.finish()
        after = handle.make_driver(str(tmp_path / "hello.sys"))
        with after.running():
            pass
        after.finish()
    finally:
        target.close()


@pytest.mark.parametrize("comes", [True, False])
def test_a_dump_that_is_not_there_when_the_agent_answers_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dumps, "POLL", 0.01)
    monkeypatch.setattr(dumps, "WRITTEN_WITHIN", 20.0 if comes else 0.1)
    looks = 0
    list_dumps = NtGuest._list_dumps

    def list_later(guest: NtGuest) -> Completed:
        nonlocal looks
        looks += 1
        if comes and looks > 3:
            return list_dumps(guest)
        nothing = b"File Not Found\r\n"
        return Completed(exit_code=1, stdout=b"", stderr=nothing, timed_out=False, truncated=False)

    monkeypatch.setattr(NtGuest, "_list_dumps", list_later)
    write_images(tmp_path)
    target = MachineTarget("nt", NtMachine("nt"))
    try:
        target.start()
        driver = TargetHandle(target, ImageFinder(tmp_path, None)).make_driver(
            str(tmp_path / "panics.sys")
        )
        with pytest.raises(DriverCrashed):
            driver.start()
        missing = target.collect(tmp_path / "test", dump=True)
        assert (tmp_path / "test.dmp").exists() == comes
        assert [text.partition(":")[0] for text in missing] == ([] if comes else [".dmp"])
        assert looks > 3
    finally:
        target.close()


class LateMachine(NtMachine):
    """Its debugger hears of the crash when the guest was put back already."""

    def revert(self, guest: Guest, log: KernelLog) -> Guest | None:
        reverted = super().revert(guest, log)
        self._note_bug_check(BugCheck(0.0, None, 0xD1, (1, 2, 3, 4)))
        while reverted is not None and not reverted.agent.closed:
            pass
        return reverted

    def let_dump(self, guest: Guest) -> Guest | None:
        pytest.fail("nobody waits for a dump while a guest is put back")


def test_is_none_of_a_guest_that_crashed_while_it_was_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
    machine = LateMachine("nt")
    target = MachineTarget("nt", machine)
    try:
        target.start()
        target.agent.set_clock(0)
        target.revert()
        assert (machine.boots, machine.reverts) == (2, 1)
        assert not target.agent.closed
    finally:
        target.close()
