"""A user's project whose targets are simulated NTs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import new_project
from tests.nt.drivers import write_images

ROOT = Path(__file__).parents[2]


def nt_project(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, folder: Path
) -> pytest.Pytester:
    """A project with the targets nt and nt-2, the first its default, and an image of each driver.

    Its cache is in ``folder``.
    """
    monkeypatch.setenv("KDRIVER_CACHE", str(folder / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester = new_project(monkeypatch, request)
    write_images(pytester.path)
    pytester.makefile(
        ".toml", kdriver='vm = "nt"\n[targets.nt]\nkind = "wine"\n[targets.nt-2]\nkind = "wine"\n'
    )
    pytester.makeini('[pytest]\naddopts = "-ptests.nt.plugin"\n')
    return pytester
