"""The self-test on a real Wine: as a person asks for it, and its trials, which are meant for a Windows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.errors import KdriverError, NotImplementedByGuest, TargetError
from pytest_kdriver.image.cargo import Cargo
from pytest_kdriver.targets.machine import FOLDER
from pytest_kdriver.targets.target import NoUnload
from pytest_kdriver.targets.windows import trials
from pytest_kdriver.targets.windows.self_test import CLAIMS, self_test
from pytest_kdriver.targets.windows.trials import (
    IMPORTS,
    LOADS,
    SERVICE,
    Outcome,
    Trial,
    Verdict,
    Workbench,
)
from pytest_kdriver.targets.wine import WineTarget
from tests.pe_builder import build

KDRIVER = str(Path(sys.executable).with_name("kdriver"))


@pytest.fixture(scope="module")
def wine(cache: Path) -> Iterator[WineTarget]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDRIVER_CACHE", str(cache))
        patch.setenv("XDG_STATE_HOME", str(cache / "state"))
        try:
            target = WineTarget(TargetConfig(name="wine", kind="wine"))
        except TargetError as error:
            pytest.skip(str(error))
        try:
            target.start()
            yield target
        finally:
            target.close()


@pytest.fixture
def bench(wine: WineTarget, cargo: Cargo, tmp_path: Path) -> Workbench:
    wine.repair()
    return Workbench(wine, tmp_path, cargo.build)


def left_there(wine: WineTarget) -> list[str]:
    folder = wine.prefix / "drive_c" / FOLDER.removeprefix("C:\\")
    found = [path.name for path in folder.glob("self-test*/*")]
    if wine.agent.query_service(SERVICE) is not None:
        found.append(SERVICE)
    return found


def test_the_driver_with_an_import_is_what_its_docstring_says() -> None:
    made = build(code=LOADS, imports={"ntoskrnl.exe": ["ExAllocatePool2"]}, pointers=1)
    assert IMPORTS.read_bytes() == made


def test_what_a_wine_can_show_holds_and_the_rest_says_that_it_takes_a_windows(
    wine: WineTarget, cargo: Cargo
) -> None:
    shown = [claim for claim in CLAIMS if claim.on_wine]
    for result in self_test(wine, cargo.build):
        if result.claim in shown:
            assert result.outcome.verdict is Verdict.HOLDS, result
        else:
            assert result.outcome.verdict is Verdict.NOT_TRIED, result
    assert len(shown) >= 5
    assert left_there(wine) == []


@pytest.mark.parametrize(
    ("trial", "verdict", "seen"),
    [
        (trials.a_driver_loads_and_unloads, Verdict.HOLDS, "STATUS_SUCCESS"),
        (trials.a_success_code_is_success, Verdict.FAILS, "0x40000000"),
        (trials.a_missing_import_is_refused, Verdict.FAILS, "STATUS_SUCCESS"),
        (trials.no_unload_is_told, Verdict.HOLDS, "STATUS_INVALID_DEVICE_REQUEST"),
        (trials.the_boot_setting_is_in_force, Verdict.HOLDS, "code integrity 0x1"),
        (trials.secure_boot_forbids_test_signing, Verdict.NOT_TRIED, "Secure Boot is off"),
        (trials.certutil_takes_the_certificate, Verdict.HOLDS, "ended with 0"),
        (trials.winrm_has_its_quotas, Verdict.NOT_TRIED, "winrm tells nothing"),
        (trials.kdriver_installed_it, Verdict.NOT_TRIED, "has not installed this machine"),
        (trials.a_clone_boots_by_uefi, Verdict.NOT_TRIED, "has not installed this machine"),
        (trials.the_placed_agent_runs, Verdict.NOT_TRIED, "no remote machine"),
        (trials.the_agent_is_started_by("sshd.exe"), Verdict.NOT_TRIED, "not started by sshd"),
        (trials.told_of("memory integrity"), Verdict.HOLDS, "does not run"),
        (trials.reads_back("test signing"), Verdict.NOT_TRIED, "testsigning absent"),
    ],
)
def test_what_a_wine_does_otherwise_is_seen(
    bench: Workbench, wine: WineTarget, trial: Trial, verdict: Verdict, seen: str
) -> None:
    """Wine's certutil does nothing, and its kernel takes for a driver what a Windows would not."""
    outcome = trial(bench)
    assert outcome.verdict is verdict
    assert seen in outcome.seen
    assert left_there(wine) == []


@pytest.mark.parametrize(
    "trial",
    [
        trials.an_unsigned_driver_is_refused,
        trials.a_changed_driver_is_refused,
        trials.a_wrong_checksum_is_refused,
        trials.a_loaded_image_is_in_use,
        trials.a_second_load_is_told,
        trials.a_service_is_marked_for_deletion,
    ],
)
def test_what_takes_the_call_of_a_windows_leaves_nothing_where_there_is_none(
    bench: Workbench, wine: WineTarget, trial: Trial
) -> None:
    with pytest.raises(NotImplementedByGuest):
        trial(bench)
    assert left_there(wine) == []


def test_the_manager_starts_on_wine_what_nobody_signed(bench: Workbench, wine: WineTarget) -> None:
    outcome = trials.the_manager_says_577(bench)
    assert outcome == Outcome(Verdict.FAILS, "ERROR_SUCCESS (0)")
    assert left_there(wine) == []


def test_every_trial_comes_to_an_end_on_a_guest_that_it_was_not_made_for(
    bench: Workbench, wine: WineTarget
) -> None:
    """As on a Windows that is otherwise than the documents have it: an outcome, or an error of ours."""
    for claim in CLAIMS:
        if isinstance(claim.trial, str):
            continue
        try:
            assert claim.trial(bench).seen, claim.text
        except (KdriverError, NoUnload):
            wine.repair()
    assert left_there(wine) == []
    assert trials.a_status_is_exact(bench).verdict is Verdict.HOLDS


class TestTheCommand:
    def test_tells_a_table_for_people(self, project: pytest.Pytester) -> None:
        done = self.doctor(project, "--vm", "wine", "--self-test")
        assert done.returncode == 0, done.stdout
        assert (
            "holds          DriverEntry's status is exact\n"
            "    it came back as 0xC0DE1234\n"
            "    [docs/targets.md#wine, by loading a driver that returns 0xC0DE1234]\n"
        ) in done.stdout
        assert "please send us this table" in done.stdout
        assert "nothing is missing" in done.stdout

    def test_tells_objects_to_programs(self, project: pytest.Pytester) -> None:
        told = json.loads(self.doctor(project, "--vm", "wine", "--self-test", "--json").stdout)
        claims = [one for one in told if "claim" in one]
        assert [one["claim"] for one in claims] == [claim.text for claim in CLAIMS]
        assert {one["outcome"] for one in claims} == {"holds", "not tried"}
        assert all(set(one) == {"claim", "where", "how", "outcome", "seen"} for one in claims)
        assert told[0]["name"] == "machine"

    def test_says_nothing_of_windows_where_nobody_asks(self, project: pytest.Pytester) -> None:
        assert "not tried" not in self.doctor(project, "--vm", "wine").stdout

    def doctor(self, project: pytest.Pytester, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [KDRIVER, "doctor", *arguments],
            cwd=project.path,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )


def test_claims_are_told_apart_by_their_words() -> None:
    texts = [claim.text for claim in CLAIMS]
    assert len(texts) == len(set(texts))
