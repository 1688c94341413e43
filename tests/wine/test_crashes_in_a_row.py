"""Crashes of every kind, one after the other: after each the next test passes, and nothing stays."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from pytest_kdriver import Driver, DriverCrashed, TargetHandle, ctl_code
from pytest_kdriver.targets import prefix
from pytest_kdriver.targets.wine import WineTarget

Crash = Callable[[TargetHandle], None]

CRASH = ctl_code(0x807)


def in_init(how: str) -> Crash:
    def crash(handle: TargetHandle) -> None:
        with (
            handle.driver("panics", parameters={"How": how}) as driver,
            pytest.raises(DriverCrashed),
        ):
            driver.start()

    return crash


def in_cleanup(how: str) -> Crash:
    def crash(handle: TargetHandle) -> None:
        with handle.driver("panics", parameters={"How": how, "Where": "cleanup"}) as driver:
            driver.start()
            with pytest.raises(DriverCrashed):
                driver.stop()

    return crash


def in_ioctl(how: int) -> Crash:
    def crash(handle: TargetHandle) -> None:
        with (
            handle.driver("echo") as driver,
            driver.running(),
            driver.device(r"\\.\Echo") as device,
            pytest.raises(DriverCrashed),
        ):
            device.ioctl(CRASH, how.to_bytes(4, "little"))

    return crash


def missing_export(handle: TargetHandle) -> None:
    with handle.driver("missing") as driver, pytest.raises(DriverCrashed, match="not export"):
        driver.start()


def killed(handle: TargetHandle) -> None:
    with handle.driver("hello") as driver, driver.running():
        os.kill(unix_pid(handle, driver), signal.SIGKILL)
        with pytest.raises(DriverCrashed, match="the process that ran the driver ended"):
            driver.dbgprint.expect("never printed", timeout=20)


def unix_pid(handle: TargetHandle, driver: Driver) -> int:
    found = []
    for pid in prefix.processes(wine(handle).prefix):
        with suppress(OSError):  # it ended meanwhile
            if f"/{driver.service}.sys" in Path(f"/proc/{pid}/maps").read_text():
                found.append(pid)
    (pid,) = found
    return pid


def wine(handle: TargetHandle) -> WineTarget:
    target = handle._target
    assert isinstance(target, WineTarget)
    return target


KINDS: list[Crash] = [
    *(in_init(how) for how in ("panic", "page-fault", "bug-check", "int3")),
    *(in_cleanup(how) for how in ("panic", "page-fault", "bug-check", "int3")),
    *(in_ioctl(how) for how in range(3)),
    missing_export,
    killed,
]


@pytest.mark.parametrize("count", [len(KINDS), pytest.param(100, marks=pytest.mark.soak)])
def test_after_each_the_next_start_works_and_nothing_stays(
    kdriver_target: TargetHandle, count: int
) -> None:
    order = random.Random(4)
    kinds = [
        kind for _ in range(-(-count // len(KINDS))) for kind in order.sample(KINDS, len(KINDS))
    ]
    says_hello(kdriver_target)
    target = wine(kdriver_target)
    descriptors = open_descriptors()
    for crash in kinds[:count]:
        crash(kdriver_target)
        says_hello(kdriver_target)
    assert open_descriptors() == descriptors
    names = {folder.name for folder in target.prefix.parent.glob("prefix-*")}
    assert names == {target.prefix.name, f"{target.prefix.name}-server"}
    others = b"WINEPREFIX=" + os.fsencode(target.prefix.parent)
    assert set(processes_of(others)) == set(prefix.processes(target.prefix))


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def processes_of(environment: bytes) -> list[int]:
    """The processes whose environment has a variable that begins so."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if environment in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def says_hello(handle: TargetHandle) -> None:
    with handle.driver("hello") as hello:
        with hello.running():
            pass
        assert hello.dbgprint.lines == ["Hello, world!", "Bye bye!"]
