"""What is tried on a Windows that has a kernel's debugger, tried on a simulated NT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_kdriver.errors import BuildError
from pytest_kdriver.image.pe import Image
from pytest_kdriver.targets.machine_target import MachineTarget
from pytest_kdriver.targets.windows.kernel_log_trials import BREAKS, CRASHES
from pytest_kdriver.targets.windows.self_test import KERNEL_LOG, self_test
from pytest_kdriver.targets.windows.trials import LOADS, Verdict
from tests.nt import machine
from tests.nt.drivers import BREAKPOINT_AT, FAULT_AT, Driver, find_script, write_images
from tests.nt.guest import Kernel, Script
from tests.nt.machine import NtMachine


class Breaks(Driver):
    def entry(self) -> int:
        self.kernel.breakpoint(BREAKPOINT_AT)
        return 0


class Crashes(Driver):
    def entry(self) -> int:
        self.kernel.fault(FAULT_AT, then=0x7E)


def script_of(found: Image, file: str) -> Callable[[Kernel], Script] | None:
    """What the drivers of the self-test do, which have no name of a script in them."""
    code = found.read(found.entry, len(BREAKS))
    if code.startswith(BREAKS):
        return Breaks
    if code.startswith(CRASHES):
        return Crashes
    if code.startswith(LOADS):
        return Driver
    return find_script(found, file)


def test_what_is_claimed_of_the_debugger_holds_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "find_script", script_of)
    write_images(tmp_path)

    def sample(name: str) -> Path:
        path = tmp_path / f"{name}.sys"
        if not path.exists():
            raise BuildError("it is not built here")
        return path

    target = MachineTarget("nt", NtMachine("nt"))
    try:
        target.start()
        results = list(self_test(target, sample))
    finally:
        target.close()
    ours = [result for result in results if result.claim.where == KERNEL_LOG]
    tried = [result for result in ours if not isinstance(result.claim.trial, str)]
    assert len(tried) == 7
    bad = {
        result.claim.text: result.outcome.seen
        for result in tried
        if result.outcome.verdict is not Verdict.HOLDS
    }
    assert bad == {}
