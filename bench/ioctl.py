"""One ioctl from the host, against DeviceIoControl in a loop in one program of the guest."""

from __future__ import annotations

import time

from bench.figure import Figure, Limited, median
from bench.floor_program import IOCTLS, floor_program
from bench.guest import driver_image, wine_target
from pytest_kdriver.device import Device, ctl_code
from pytest_kdriver.driver import Driver
from pytest_kdriver.targets.prefix import find_wine

ROUNDS = 40
WARM_UP = 3
DEVICE = r"\\.\Echo"
ECHO = ctl_code(0x800)
DATA = b"Z" * 64


def measure() -> list[Figure]:
    """Rounds of as many calls each, by turns, so that a busy moment hits both."""
    with wine_target() as target:
        driver = Driver(target, driver_image("echo"), name="echo")
        with (
            driver.running(),
            driver.device(DEVICE) as device,
            floor_program(find_wine(), target.prefix, "ioctl", DEVICE) as program,
        ):
            for _ in range(WARM_UP):
                program.round()
                _round(device)
            values, floors = [], []
            for _ in range(ROUNDS):
                values.append(_round(device))
                floors.append(program.round() / IOCTLS)
        driver.finish()
    value, floor = median(values), median(floors)
    return [
        Figure(
            name="ioctl",
            value=value * 1e6,
            unit="us",
            floor=floor * 1e6,
            limit=3,
            limited=Limited.RATIO,
            note=f"device.ioctl of echo, {len(DATA)} bytes in and out; median of {ROUNDS} means of {IOCTLS}. "
            "Floor: the same of DeviceIoControl in a loop in one program of the same prefix, by turns",
        ),
        Figure(
            name="ioctls per second",
            value=1 / value,
            unit="1/s",
            floor=1 / floor,
            note="the same, one after the other from one thread",
        ),
    ]


def _round(device: Device) -> float:
    """The mean of as many calls as a round of the floor has, in seconds."""
    begin = time.perf_counter()
    for _ in range(IOCTLS):
        echoed = device.ioctl(ECHO, DATA, output_size=len(DATA))
    seconds = time.perf_counter() - begin
    assert echoed == DATA
    return seconds / IOCTLS
