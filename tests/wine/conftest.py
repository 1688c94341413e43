"""What the tests on a real Wine share: a cache of their own, and projects as a user has them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pytest_kdriver.session  # noqa: F401 -- once, or each run inside of this process imports it anew
from pytest_kdriver.image.cargo import Cargo
from pytest_kdriver.paths import cache_directory
from pytest_kdriver.targets import prefix
from tests.conftest import new_project

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "drivers" / "Cargo.toml"


@pytest.fixture(scope="session")
def cache() -> Iterator[Path]:
    """A cache folder whose runs are these tests' alone; template and agent are the real one's."""
    real = cache_directory()
    own = real / f"tests-{os.getpid()}"
    own.mkdir(parents=True)
    for name in ("wine", "agent"):
        (real / name).mkdir(exist_ok=True)
        (own / name).symlink_to(real / name)
    yield own
    for run in own.glob("runs/*/prefix-*"):
        prefix.remove(run)
    shutil.rmtree(own)


@pytest.fixture
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, in the environment: what this test starts leaves its runs there, and nothing else does."""
    monkeypatch.setenv("KDRIVER_CACHE", str(cache))
    return cache


@pytest.fixture(scope="session")
def cargo() -> Cargo:
    """The sample drivers, built when they are first asked for."""
    return Cargo(MANIFEST)


@pytest.fixture
def project(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, own_cache: Path
) -> pytest.Pytester:
    """An empty project of a user's, with a ``kdriver.toml`` that names the sample drivers."""
    pytester = new_project(monkeypatch, request)
    pytester.path.joinpath("kdriver.toml").write_text(f'manifest = "{MANIFEST}"\n')
    return pytester


@pytest.fixture
def left_behind(cache: Path) -> Callable[[], list[str]]:
    """What there is of runs in the tests' cache: folders, and processes of their prefixes."""

    def left_behind() -> list[str]:
        folders = list((cache / "runs").glob("*")) + list((cache / "runs").glob(".*"))
        mark = f"WINEPREFIX={cache}".encode()
        processes = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (entry / "environ").read_bytes():
                    processes.append(f"process {entry.name}")
            except OSError:
                continue
        return [*map(str, folders), *processes]

    return left_behind
