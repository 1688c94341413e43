"""The self-test's claims cover the documents, and what comes of a trial is told. The Windows is a fake."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_kdriver.cli import doctor
from pytest_kdriver.config import TargetConfig
from pytest_kdriver.errors import AgentError, BuildError, TargetError
from pytest_kdriver.image.signing import SigningError
from pytest_kdriver.remote_config import RemoteConfig
from pytest_kdriver.targets import machine_target
from pytest_kdriver.targets import remote as remote_module
from pytest_kdriver.targets.machine_target import MachineTarget
from pytest_kdriver.targets.remote import RemoteMachine
from pytest_kdriver.targets.windows import self_test as self_test_module
from pytest_kdriver.targets.windows.self_test import CLAIMS, Claim, Result, self_test
from pytest_kdriver.targets.windows.trials import Outcome, Trial, Verdict, Workbench, holds
from tests.unit.test_remote import FakeProgram, FakeWay, Windows

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"verified on windows", re.IGNORECASE)
DOCUMENTS = (
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "README.md",
    ROOT / "drivers" / "README.md",
    ROOT / "vm" / "images" / "README.md",
    *sorted(ROOT.glob("examples/**/*.toml")),
    *sorted(ROOT.glob("examples/**/*.md")),
)

TABLES = {
    "docs/kernel-log.md#not-verified-on-windows": ("| claim |", 0),
    "docs/remote.md#when-something-goes-wrong": ("| Windows says |", 0),
    "docs/signing.md#not-verified-on-windows": ("| | source |", 0),
    "docs/targets.md#wine": ("| | Wine | Windows |", 2),
    "docs/windows.md#in-force": ("| | asked |", 0),
    "docs/windows.md#settings": ("| setting |", 0),
}
"""The tables below a mark: how each begins, and which cell of a row says something of Windows."""


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def sections(document: Path) -> dict[str, list[str]]:
    """Its lines by the name and anchor of the heading above them."""
    name = str(document.relative_to(ROOT))
    if document.suffix != ".md":
        return {name: document.read_text().splitlines()}
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    fenced = False
    for line in document.read_text().splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("#") and not fenced:
            lines = found.setdefault(f"{name}#{slug(line.lstrip('# '))}", [])
        lines.append(line)
    return found


SECTIONS = {place: lines for path in DOCUMENTS for place, lines in sections(path).items()}


def rows(place: str) -> list[str]:
    """The first cells of the rows of a place's table that say something of Windows."""
    head, says = TABLES[place]
    lines = iter(SECTIONS[place])
    while not next(lines).startswith(head):
        pass
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not set(line) <= {"|", "-", " "} and cells[says]:
            found.append(cells[0])
    return found


class TestTheClaims:
    def test_stand_where_something_is_marked_as_not_verified(self) -> None:
        marks = Counter(
            place for place, lines in SECTIONS.items() for line in lines if MARK.search(line)
        )
        claims = Counter(claim.where for claim in CLAIMS)
        assert marks - claims == Counter(), "marked in the documents, and in no claim"
        assert claims.keys() - SECTIONS.keys() == set(), "claims that stand nowhere"

    @pytest.mark.parametrize("place", TABLES)
    def test_have_each_row_of_the_tables(self, place: str) -> None:
        claimed = {claim.row for claim in CLAIMS if claim.where == place and claim.row}
        told = rows(place)
        assert told
        unclaimed = [row for row in told if not any(row.startswith(one) for one in claimed)]
        assert unclaimed == []
        assert [one for one in claimed if not any(row.startswith(one) for row in told)] == []

    def test_say_how_they_are_tried_or_why_they_are_not(self) -> None:
        for claim in CLAIMS:
            assert bool(claim.how) is not isinstance(claim.trial, str), claim.text


@pytest.fixture
def machine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., MachineTarget]:
    """A target whose guests come one after the other; it is not started."""
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(remote_module, "AGENT", FakeProgram(tmp_path / "kdagent.exe"))
    monkeypatch.setattr(machine_target, "assert_exact_status", lambda target, folder: [])

    def machine(*guests: Windows | Exception) -> MachineTarget:
        remote = RemoteConfig(host="lab", user="tester", timeout=0.1)
        config = TargetConfig(name="lab", kind="remote", remote=remote)
        target = MachineTarget("lab", RemoteMachine(config, way=FakeWay(*guests)))
        request.addfinalizer(target.close)
        return target

    return machine


@pytest.fixture
def target(machine: Callable[..., MachineTarget]) -> MachineTarget:
    target = machine(Windows(), TargetError("nobody is there", target="lab"))
    target.start()
    return target


def no_samples(name: str) -> Path:
    raise BuildError("no Rust")


def claim(text: str, trial: Trial | str) -> Claim:
    return Claim(text=text, where="here", trial=trial)


def results(
    target: MachineTarget, monkeypatch: pytest.MonkeyPatch, *claims: Claim
) -> list[tuple[str, str, str]]:
    monkeypatch.setattr(self_test_module, "CLAIMS", claims)
    return [told(result) for result in self_test(target, no_samples)]


def told(result: Result) -> tuple[str, str, str]:
    return result.claim.text, result.outcome.verdict.value, result.outcome.seen


def raises(error: Exception) -> Trial:
    def trial(bench: Workbench) -> Outcome:
        raise error

    return trial


class TestATrial:
    def test_tells_what_it_saw(
        self, target: MachineTarget, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert results(
            target,
            monkeypatch,
            claim("a", lambda bench: holds(True, "yes")),
            claim("b", lambda bench: holds(False, "no")),
            claim("c", "too hot"),
        ) == [
            ("a", "holds", "yes"),
            ("b", "does not hold", "no"),
            ("c", "not tried", "too hot"),
        ]

    def test_that_goes_wrong_is_a_claim_that_does_not_hold_and_the_next_is_tried(
        self, target: MachineTarget, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert results(
            target,
            monkeypatch,
            claim("a", raises(AgentError("no such call"))),
            claim("b", raises(SigningError("no osslsigncode"))),
            claim("c", lambda bench: holds(True, "yes")),
        ) == [
            ("a", "does not hold", "AgentError: no such call"),
            ("b", "not tried", "nothing can be signed here: no osslsigncode"),
            ("c", "holds", "yes"),
        ]

    def test_that_loses_the_machine_is_the_last(
        self, target: MachineTarget, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def lose(bench: Workbench) -> Outcome:
            bench.agent.close()
            return holds(True, "gone")

        first, second = results(target, monkeypatch, claim("a", lose), claim("b", lose))
        assert first == ("a", "holds", "gone")
        assert second[:2] == ("b", "not tried")
        assert second[2].startswith("the target was lost in the trial of 'a': ")

    def test_of_a_sample_that_can_t_be_built_is_none(self, target: MachineTarget) -> None:
        found = {told(result)[0]: told(result)[1:] for result in self_test(target, no_samples)}
        assert found["the sample drivers load and unload; here: hello"] == (
            "not tried",
            "it can't be built here: no Rust",
        )


def test_a_windows_is_gone_through_from_the_first_claim_to_the_last(
    target: MachineTarget,
) -> None:
    """By a fake, which knows little: of most only that they are told, and that nothing is left there."""
    found = list(self_test(target, no_samples))
    assert [result.claim for result in found] == list(CLAIMS)
    by_text = {result.claim.text: result.outcome for result in found}
    assert by_text["DriverEntry's status is exact"].seen == "it came back as 0xC0DE1234"
    assert by_text["test signing: the Windows tells whether it is in force"].verdict is (
        Verdict.HOLDS
    )
    assert by_text["hypervisor: it is made, and read back"] == Outcome(
        Verdict.NOT_TRIED, "this machine is not set so: hypervisorlaunchtype absent"
    )


def test_a_windows_on_which_no_test_would_run_is_gone_through_all_the_same(
    machine: Callable[..., MachineTarget],
) -> None:
    guests = Windows(), Windows()
    for windows in guests:
        windows.information[103] = bytes.fromhex("08000000 01000000")
    target = machine(*guests)
    finding = doctor.started(target, "target lab", 0.0)
    assert finding.state is doctor.State.MISSING
    assert "test signing: off" in finding.detail
    by_text = {result.claim.text: result for result in self_test(target, no_samples)}
    told = by_text["test signing: the Windows tells whether it is in force"].outcome
    assert told == Outcome(Verdict.HOLDS, "off (code integrity 0x1)")
