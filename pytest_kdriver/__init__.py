"""Integration tests for Windows kernel drivers, written as ordinary pytest tests.

The fixtures ``kdriver`` and ``kdriver_target`` and the marker ``kdriver`` come by themselves; what else a
test needs is here. Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_kdriver.device import Device, ctl_code
    from pytest_kdriver.driver import CycleResult, Cycles, Driver, ServiceState
    from pytest_kdriver.errors import (
        AgentError,
        AgentProtocolError,
        BuildError,
        CapabilityError,
        ConfigError,
        DeviceError,
        DriverCrashed,
        DriverError,
        DriverTimeout,
        ImageError,
        KdriverError,
        KernelLogError,
        LinkError,
        NoSuchLine,
        NotImplementedByGuest,
        PoolError,
        StartFailed,
        StopFailed,
        TargetError,
        UnloadRefused,
    )
    from pytest_kdriver.handle import TargetHandle
    from pytest_kdriver.kernel.pool import Caller, Frame, PoolUse, PoolUses, WrongFree
    from pytest_kdriver.kernel.pool_growth import PoolGrowth
    from pytest_kdriver.ntstatus import NTSTATUS
    from pytest_kdriver.win32error import Win32Error

_HOME = {
    "device": ("Device", "ctl_code"),
    "driver": ("CycleResult", "Cycles", "Driver", "ServiceState"),
    "errors": (
        "AgentError",
        "AgentProtocolError",
        "BuildError",
        "CapabilityError",
        "ConfigError",
        "DeviceError",
        "DriverCrashed",
        "DriverError",
        "DriverTimeout",
        "ImageError",
        "KdriverError",
        "KernelLogError",
        "LinkError",
        "NoSuchLine",
        "NotImplementedByGuest",
        "PoolError",
        "StartFailed",
        "StopFailed",
        "TargetError",
        "UnloadRefused",
    ),
    "handle": ("TargetHandle",),
    "kernel.pool": ("Caller", "Frame", "PoolUse", "PoolUses", "WrongFree"),
    "kernel.pool_growth": ("PoolGrowth",),
    "ntstatus": ("NTSTATUS",),
    "win32error": ("Win32Error",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
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


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
