"""tests/drivers, as a user runs them, in a virtual machine: by either agent, one with each isolation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("settings", "isolation"),
    [
        pytest.param(('agent = "ssh"',), "module", id="ssh, by module"),
        pytest.param((), "test", id="serial, by test"),
    ],
)
def test_they_pass(
    project: pytest.Pytester,
    configure: Callable[..., None],
    settings: tuple[str, ...],
    isolation: str,
) -> None:
    configure(*settings)
    for path in (ROOT / "tests" / "drivers").glob("test_*.py"):
        shutil.copy(path, project.path)
    done = project.runpytest_subprocess(
        *("-W", "error", "--kdriver-vm=winevm", f"--kdriver-isolation={isolation}"), timeout=600
    )
    outcomes = done.parseoutcomes()
    assert set(outcomes) <= {"passed", "xfailed"}, done.stdout.str()
    assert outcomes["passed"] >= 20
    done.stdout.fnmatch_lines([f"kdriver: winevm (*snapshot-load); isolation {isolation}"])
