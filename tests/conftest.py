"""What tests share that run pytest as a user does: in a project, as a process of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_kdriver import telling

_RESULT = re.compile(
    r"(?:\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED|XFAIL|RERUN) )?"
    r"\S+?\.py::(\S+)(?: (PASSED|FAILED|ERROR|SKIPPED|XFAIL|RERUN)\b.*)?"
)


Run = Callable[..., pytest.RunResult]
Verdicts = Callable[[pytest.RunResult], dict[str, str]]


def new_project(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> pytest.Pytester:
    """An empty folder of a user's, whose home is another from here on, but who has our Rust."""
    for name, folder in (("RUSTUP_HOME", ".rustup"), ("CARGO_HOME", ".cargo")):
        monkeypatch.setenv(name, os.environ.get(name) or str(Path.home() / folder))
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # many processes, the same modules
    pytester: pytest.Pytester = request.getfixturevalue("pytester")
    return pytester


def failure(result: pytest.RunResult, name: str) -> str:
    """What the report says of one test, up to the next one's."""
    text = result.stdout.str()
    begin = re.search(rf"^_+ (?:ERROR at \w+ of )?{re.escape(name)} _+$", text, re.MULTILINE)
    assert begin is not None, f"no report of {name}"
    rest = text[begin.end() :]
    end = re.search(r"^(?:_+ [^\n]* _+|=+ [^\n]* =+)$", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


@pytest.fixture(autouse=True)
def _told_where_tests_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the standard error get what is told, and not the terminal of the pytest that runs these tests."""
    monkeypatch.setattr(telling, "_show", telling._print)


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
