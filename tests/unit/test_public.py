"""What the package offers to others, frozen: a change here is a change of the API."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pytest_kdriver

NAMES = [
    "NTSTATUS",
    "AgentError",
    "AgentProtocolError",
    "BuildError",
    "Caller",
    "CapabilityError",
    "ConfigError",
    "CycleResult",
    "Cycles",
    "Device",
    "DeviceError",
    "Driver",
    "DriverCrashed",
    "DriverError",
    "DriverTimeout",
    "Frame",
    "ImageError",
    "KdriverError",
    "KernelLogError",
    "LinkError",
    "NoSuchLine",
    "NotImplementedByGuest",
    "PoolError",
    "PoolGrowth",
    "PoolUse",
    "PoolUses",
    "ServiceState",
    "StartFailed",
    "StopFailed",
    "TargetError",
    "TargetHandle",
    "UnloadRefused",
    "Win32Error",
    "WrongFree",
    "ctl_code",
]


def test_the_public_names_are_these() -> None:
    assert pytest_kdriver.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_can_be_had(name: str) -> None:
    assert getattr(pytest_kdriver, name).__name__ == name
    assert name in dir(pytest_kdriver)


def test_there_are_no_others() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        _ = pytest_kdriver.Nope


def test_the_plugin_alone_imports_nothing_of_the_rest() -> None:
    code = (
        "import sys, pytest_kdriver.plugin\n"
        "print(*sorted(m for m in sys.modules if m.startswith('pytest_kdriver')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pytest_kdriver", "pytest_kdriver.plugin"]
