"""One start, assert and stop over the serial link, against the service manager's calls in the guest."""

from __future__ import annotations

from bench.cycle import one_cycle
from bench.figure import Figure, Limited, median
from bench.floor_program import floor_executable, to_rounds
from bench.guest import driver_image
from pytest_kdriver.driver import Driver
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.targets.machine_target import MachineTarget

TURNS = 6
ROUNDS = 3
WARM_UP = 1
_PROGRAM = r"C:\kdriver\floor.exe"
_TIME_LIMIT = 60.0


def measure(target: MachineTarget) -> list[Figure]:
    """By turns, so that a busy moment hits both; the first of each turn does not count."""
    target.agent.put(floor_executable(), _PROGRAM)
    driver = Driver(target, driver_image("hello"), name="hello")
    driver.cycle(WARM_UP)
    values, floors = [], []
    for _ in range(TURNS):
        floors += _floor_cycles(target.agent)[WARM_UP:]
        values += [one_cycle(driver) for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
    driver.finish()
    return [
        Figure(
            name="cycle in a VM",
            value=median(values) * 1000,
            unit="ms",
            floor=median(floors) * 1000,
            limit=1.3,
            limited=Limited.RATIO,
            note=f"start, assert and stop of hello over the serial link; median of {len(values)}. Floor: "
            "StartService and ControlService(STOP) in a loop in one program of the same guest, by turns",
        )
    ]


def _floor_cycles(agent: Agent) -> list[float]:
    command = [_PROGRAM, "cycle", "hello"]
    done = agent.run(command, stdin=b"." * (WARM_UP + ROUNDS), time_limit=_TIME_LIMIT)
    return to_rounds(done.stdout)
