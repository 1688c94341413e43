"""A guest put back: part by part, against the bare loading of its snapshot, and against libvirt's own way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from bench.figure import Figure, Limited, median
from bench.vm.guest import BareGuest
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.targets.libvirt import machine
from pytest_kdriver.targets.machine_target import MachineTarget
from pytest_kdriver.targets.port_pump import PortPump

RUNS = 11
OWN_RUNS = 7
REST = 0.3
"""Seconds between two measurements: both begin with a guest that has come to rest."""

_OWN = "libvirts-own"


def measure(target: MachineTarget, bare: BareGuest) -> list[Figure]:
    """By turns, so that a busy moment hits both."""
    _revert(target)
    reverts, loads = [], []
    for _ in range(RUNS):
        time.sleep(REST)
        loads.append(bare.load_snapshot(machine.SNAPSHOT))
        time.sleep(REST)
        reverts.append(_revert(target))
    answers, clocks, logs, ends = zip(*reverts, strict=True)
    load = median(loads)
    parts = (
        ("clock", [b - a for a, b in zip(answers, clocks, strict=True)], "until date has set it"),
        ("log", [b - a for a, b in zip(clocks, logs, strict=True)], "a session on its port"),
        (
            "checks",
            [b - a for a, b in zip(logs, ends, strict=True)],
            "a fence through the kernel log, the service manager's answer, clock, disk and agent",
        ),
    )
    return [
        Figure(
            name="revert",
            value=median(answers),
            unit="s",
            floor=load,
            limit=2,
            limited=Limited.RATIO,
            note="until the agent's first answer over the serial link; one virtual CPU; median of "
            f"{RUNS}. Floor: QMP's snapshot-load of the same guest, by turns",
        ),
        *(
            Figure(name=f"revert, {name}", value=median(seconds), unit="s", note=f"then: {told}")
            for name, seconds, told in parts
        ),
        Figure(
            name="revert, in all",
            value=median(ends),
            unit="s",
            floor=load,
            note="until a test may begin. Floor: as above",
        ),
        _against_libvirt(median(answers), bare),
    ]


def _against_libvirt(answer: float, bare: BareGuest) -> Figure:
    """The last thing done with the guest: afterwards its QEMU is one that the target does not know."""
    bare.take_snapshot(_OWN)
    floors = []
    for _ in range(OWN_RUNS):
        floors.append(bare.revert_to_snapshot(_OWN))
        time.sleep(REST)
    return Figure(
        name="revert, ours to libvirt's",
        value=answer,
        unit="s",
        floor=median(floors),
        limit=0.333,
        limited=Limited.RATIO,
        note=f"both until the agent's first answer; median of {RUNS} and {OWN_RUNS}. Floor: "
        "virDomainRevertToSnapshot of an internal snapshot of the same guest",
    )


def _revert(target: MachineTarget) -> tuple[float, float, float, float]:
    """The seconds until the agent's first answer, the clock, the log's session and all of it were there."""
    target.agent.pending  # noqa: B018 -- what was not used would not be put back
    ends: dict[str, float] = {}
    with ExitStack() as noted:
        for owner, name in (
            (Agent, "_greet"),
            (machine, "set_clock"),
            (PortPump, "begin"),
        ):
            noted.enter_context(_noting(owner, name, ends))
        begin = time.perf_counter()
        target.revert()
        end = time.perf_counter()
    assert target.broken is None
    answer, clock, log = (ends[name] - begin for name in ("_greet", "set_clock", "begin"))
    return answer, clock, log, end - begin


@contextmanager
def _noting(owner: object, name: str, ends: dict[str, float]) -> Iterator[None]:
    """Note when a function of the product's was over."""
    function = getattr(owner, name)

    def noted(*arguments: object, **named: object) -> object:
        result = function(*arguments, **named)
        ends[name] = time.perf_counter()
        return result

    with mock.patch.object(owner, name, noted):
        yield
