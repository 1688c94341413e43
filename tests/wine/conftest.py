"""What the tests on a real Wine share: a cache of their own, and projects as a user has them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pytest_kdriver.session  # noqa: F401 -- once, or each run inside of this process imports it anew
from pytest_kdriver.image.cargo import Cargo
from pytest_kdriver.paths import cache_directory
from pytest_kdriver.targets import prefix

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "drivers" / "Cargo.toml"

_RESULT = re.compile(
    r"(?:\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED|XFAIL|RERUN) )?"
    r"\S+?\.py::(\S+)(?: (PASSED|FAILED|ERROR|SKIPPED|XFAIL|RERUN)\b.*)?"
)


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
    for name, folder in (("RUSTUP_HOME", ".rustup"), ("CARGO_HOME", ".cargo")):
        monkeypatch.setenv(name, os.environ.get(name) or str(Path.home() / folder))
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # many processes, the same modules
    pytester: pytest.Pytester = request.getfixturevalue("pytester")  # from here on HOME is another
    pytester.path.joinpath("kdriver.toml").write_text(f'manifest = "{MANIFEST}"\n')
    return pytester


Run = Callable[..., pytest.RunResult]
Verdicts = Callable[[pytest.RunResult], dict[str, str]]


@pytest.fixture
def run(project: pytest.Pytester) -> Run:
    """Run pytest in the project, with warnings as errors, as a process of its own."""

    def run(*arguments: str) -> pytest.RunResult:
        return project.runpytest_subprocess("-W", "error", "-v", *arguments, timeout=300)

    return run


@pytest.fixture
def verdicts() -> Verdicts:
    """The verdicts of a run by the tests' names, in order; two of one test with a comma between."""

    def verdicts(result: pytest.RunResult) -> dict[str, str]:
        found: dict[str, str] = {}
        for line in result.outlines:
            match = _RESULT.fullmatch(line.rstrip())
            if match is None or not (verdict := match[1] or match[3]):
                continue
            name = match[2]
            found[name] = f"{found[name]}, {verdict}" if name in found else verdict
        return found

    return verdicts


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
