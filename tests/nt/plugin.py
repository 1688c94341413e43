"""A pytest plugin by which targets whose names begin with ``nt`` are simulated NTs: ``-p tests.nt.plugin``.

It is loaded beside pytest-kdriver's own; all but the machine is as a user has it. At the end it tells what
the machines went through.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_kdriver import session as kdriver_session
from pytest_kdriver.config import TargetConfig
from pytest_kdriver.targets.machine_target import MachineTarget
from pytest_kdriver.targets.target import Target
from tests.nt.machine import NtMachine

_make_target = kdriver_session.make_target
_machines: list[NtMachine] = []


def make_target(
    config: TargetConfig, *, artifacts: Path | None = None, dumps: bool = False
) -> Target:
    """As ``session.make_target``, which knows only kinds that a config may have."""
    if not config.name.startswith("nt"):
        return _make_target(config, artifacts=artifacts, dumps=dumps)
    machine = NtMachine(config.name)
    _machines.append(machine)
    return MachineTarget(config.name, machine, artifacts=artifacts)


kdriver_session.make_target = make_target


@pytest.fixture
def nt() -> NtMachine:
    """The machine that was made last."""
    return _machines[-1]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each machine; the debugger's mistakes in the protocol, if it made any, too."""
    for machine in _machines:
        terminalreporter.write_line(
            f"nt: {machine.boots} boots, {machine.reverts} reverts, mistakes: {machine.mistakes}"
        )
