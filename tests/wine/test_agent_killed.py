"""The agent, killed in the middle of whatever it does: told at once, and the next call finds a guest."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pytest_kdriver import Driver, DriverCrashed, TargetError, TargetHandle, ctl_code
from pytest_kdriver.kernel.events import DebugPrint, DriverInitCalled, DriverUnloadCalled, Event
from pytest_kdriver.targets import prefix
from pytest_kdriver.targets.wine import WineTarget

PATIENCE = 20.0
"""Seconds for what shall be told at once: the deadlines of the calls are far longer."""

HANG = ctl_code(0x805)
FOR_EVER = b"\xff" * 4


@contextmanager
def killed_when(handle: TargetHandle, begun: Callable[[WineTarget], bool]) -> Iterator[None]:
    """Kill the agent once ``begun`` says so; the body is then over soon."""
    target = handle._target
    assert isinstance(target, WineTarget)
    killed: list[float] = []

    def kill() -> None:
        while not begun(target):
            time.sleep(0.001)
        for pid in processes_of(target, b"kdagent.exe"):
            os.kill(pid, signal.SIGKILL)
            killed.append(time.monotonic())

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    yield
    over = time.monotonic()
    killer.join(PATIENCE)
    assert len(killed) == 1
    assert over - killed[0] < PATIENCE


def processes_of(target: WineTarget, program: bytes) -> list[int]:
    """The pids of the guest's processes whose command line names ``program``."""
    found = []
    for pid in prefix.processes(target.prefix):
        with suppress(OSError):  # it ended meanwhile
            if program in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def seen(driver: Driver, kind: type[Event], text: str = "") -> Callable[[WineTarget], bool]:
    return lambda _: any(
        not isinstance(event, DebugPrint) or event.text.startswith(text)
        for event in driver.window.of(kind)
    )


def test_while_a_file_goes_in(kdriver_target: TargetHandle) -> None:
    def begun(target: WineTarget) -> bool:
        return any((target.prefix / "drive_c" / "big").glob("file.kdagent-*"))

    with (
        killed_when(kdriver_target, begun),
        pytest.raises(TargetError, match="put: "),
    ):
        kdriver_target.put(bytes(512 << 20), "C:\\big\\file")
    kdriver_target.put(b"small", "C:\\big\\file")
    assert kdriver_target.get("C:\\big\\file") == b"small"


def test_while_a_program_runs(kdriver_target: TargetHandle) -> None:
    def begun(target: WineTarget) -> bool:
        return bool(processes_of(target, b"ping"))

    with killed_when(kdriver_target, begun), pytest.raises(TargetError, match="run: "):
        kdriver_target.run(["ping", "-n", "100", "127.0.0.1"], timeout=100)
    assert kdriver_target.run(["cmd", "/c", "echo", "here"]).stdout == b"here\r\n"


@pytest.mark.kdriver("stubborn", parameters={"How": "slow-init"}, timeout=100)
def test_in_driver_entry(kdriver: Driver, kdriver_target: TargetHandle) -> None:
    begun = seen(kdriver, DriverInitCalled)
    with killed_when(kdriver_target, begun), pytest.raises((TargetError, DriverCrashed)):
        kdriver.start()
    says_hello(kdriver_target)


@pytest.mark.kdriver("stubborn", parameters={"How": "slow-cleanup"}, timeout=100)
def test_in_driver_unload(kdriver: Driver, kdriver_target: TargetHandle) -> None:
    kdriver.start()
    begun = seen(kdriver, DriverUnloadCalled)
    with killed_when(kdriver_target, begun), pytest.raises((TargetError, DriverCrashed)):
        kdriver.stop()
    says_hello(kdriver_target)


@pytest.mark.kdriver("echo", timeout=100)
def test_in_an_ioctl(kdriver: Driver, kdriver_target: TargetHandle) -> None:
    with kdriver.running(), kdriver.device(r"\\.\Echo") as device:
        begun = seen(kdriver, DebugPrint, "hanging")
        with killed_when(kdriver_target, begun), pytest.raises(DriverCrashed, match="process"):
            device.ioctl(HANG, FOR_EVER)
    says_hello(kdriver_target)


def says_hello(handle: TargetHandle) -> None:
    with handle.driver("hello") as hello:
        with hello.running():
            pass
        assert hello.dbgprint.lines == ["Hello, world!", "Bye bye!"]
