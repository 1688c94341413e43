"""A crash that nobody tells of but the guest's dump."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_kdriver.errors import DriverCrashed
from pytest_kdriver.handle import TargetHandle
from pytest_kdriver.image.finder import ImageFinder
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.targets.machine import Guest
from pytest_kdriver.targets.machine_target import MachineTarget
from pytest_kdriver.targets.runs import Run
from tests.nt.drivers import write_images
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
