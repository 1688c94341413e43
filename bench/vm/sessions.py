"""Whole runs of pytest in a VM: what isolation costs a test, and what a second worker gains."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.figure import Figure, Limited, median
from bench.guest import MANIFEST, plain_environment
from bench.vm.guest import IMAGE

ISOLATED = 8
TESTS = 16

_CONFTEST = """
import json, os, time
from pathlib import Path
import pytest

SAID = Path(os.environ["BENCH_FOLDER"])
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
BEGUN = []
TESTS = []

@pytest.fixture(scope="session", autouse=True)
def together(kdriver_target):
    # The guest is up by now; the work begins when those of all workers are.
    (SAID / f"up-{os.getpid()}").touch()
    deadline = time.monotonic() + 120
    while len(list(SAID.glob("up-*"))) < WORKERS:
        assert time.monotonic() < deadline, "another worker's guest did not come up"
        time.sleep(0.01)
    BEGUN.append(time.monotonic())

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    begin = time.monotonic()
    result = yield
    TESTS.append((item.name, begin, time.monotonic()))
    return result

def pytest_sessionfinish():
    if BEGUN:
        told = {"begun": BEGUN[0], "tests": TESTS}
        (SAID / f"said-{os.getpid()}.json").write_text(json.dumps(told))
"""

_ISOLATION_TESTS = """
import pytest

@pytest.mark.kdriver("hello")
@pytest.mark.parametrize("number, isolation", [
    pytest.param(n, i, marks=pytest.mark.kdriver_isolation(i), id=f"by-{i}-{n}")
    for n in range(%d) for i in ("none", "test")
])
def test_starts(kdriver, number, isolation):
    with kdriver.running():
        kdriver.dbgprint.expect("Hello, world!")
"""

_WORKER_TESTS = """
import pytest

@pytest.mark.kdriver("hello")
@pytest.mark.kdriver_isolation("test")
@pytest.mark.parametrize("number", range(%d))
def test_starts(kdriver, number):
    with kdriver.running():
        kdriver.dbgprint.expect("Hello, world!")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    """What one worker tells: when all were up, and of each test when it began and ended."""

    begun: float
    tests: Sequence[tuple[str, float, float]]


def measure(uri: str) -> list[Figure]:
    return [_isolation(uri), _workers(uri)]


def _isolation(uri: str) -> Figure:
    """The first of each kind does not count: the guest boots before one of them."""
    (said,) = _run(uri, _ISOLATION_TESTS % (ISOLATED + 1))
    seconds: dict[str, list[float]] = {"test": [], "none": []}
    for name, begin, end in said.tests:
        kind = "test" if "by-test" in name else "none"
        seconds[kind].append(end - begin)
    return Figure(
        name="isolation by test",
        value=median(seconds["test"][1:]),
        unit="s",
        floor=median(seconds["none"][1:]),
        limit=1.5,
        limited=Limited.EXCESS,
        note=f"a test that starts and stops hello in a VM, over the serial link; median of {ISOLATED}. "
        "Floor: the same with isolation none, by turns in the same run",
    )


def _workers(uri: str) -> Figure:
    one = _work(_run(uri, _WORKER_TESTS % TESTS, "-n", "1"))
    two = _work(_run(uri, _WORKER_TESTS % TESTS, "-n", "2"))
    return Figure(
        name="two workers",
        value=two,
        unit="s",
        floor=one,
        limit=0.625,
        limited=Limited.RATIO,
        note=f"{TESTS} tests with isolation by test, in VMs of one virtual CPU, from when all guests are up "
        f"to the last test's end: a speed-up of {one / two:.2f}. Floor: one worker",
    )


def _work(said: Sequence[_Said]) -> float:
    """The seconds from when all guests were up to the end of the last test."""
    return max(end for worker in said for _, _, end in worker.tests) - max(w.begun for w in said)


def _run(uri: str, tests: str, *options: str) -> Sequence[_Said]:
    """Run the tests as a user does, in a process of their own; what each worker tells."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "conftest.py").write_text(_CONFTEST)
        (folder / "test_inner.py").write_text(tests)
        (folder / "pytest.ini").write_text("[pytest]\n")
        (folder / "kdriver.toml").write_text(
            f'manifest = "{MANIFEST}"\n[targets.{IMAGE}]\nuri = "{uri}"\ncpus = 1\n'
        )
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--kdriver-vm", IMAGE, *options],
            cwd=folder,
            env=plain_environment() | {"BENCH_FOLDER": name},
            stdout=sys.stderr,
            check=True,
        )
        return [_Said(**json.loads(path.read_text())) for path in folder.glob("said-*.json")]
