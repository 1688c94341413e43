"""One start, assert and stop, against StartService and ControlService(STOP) in a loop in the guest."""

from __future__ import annotations

import time

from bench.figure import Figure, Limited, median
from bench.floor_program import floor_program
from bench.guest import driver_image, wine_target
from pytest_kdriver.driver import Driver
from pytest_kdriver.targets.prefix import find_wine

CYCLES = 200
WARM_UP = 10


def measure() -> list[Figure]:
    """Both in the same prefix, one after the other by turns, so that a busy moment hits both."""
    with wine_target() as target:
        driver = Driver(target, driver_image("hello"), name="hello")
        driver.cycle(WARM_UP)
        with floor_program(find_wine(), target.prefix, "cycle", "hello") as program:
            for _ in range(WARM_UP):
                program.round()
            values, floors = [], []
            for _ in range(CYCLES):
                values.append(one_cycle(driver))
                floors.append(program.round())
        driver.finish()
    return [
        Figure(
            name="cycle",
            value=median(values) * 1000,
            unit="ms",
            floor=median(floors) * 1000,
            limit=1.3,
            limited=Limited.RATIO,
            note=f"start, assert and stop of hello; median of {CYCLES}. Floor: StartService and "
            "ControlService(STOP) in a loop in one program of the same prefix, by turns",
        )
    ]


def one_cycle(driver: Driver) -> float:
    """Start hello, see that it says so, stop it; the seconds that it took."""
    begin = time.perf_counter()
    driver.start()
    driver.dbgprint.expect("Hello, world!")
    driver.stop()
    return time.perf_counter() - begin
