"""The repository in examples/, used as its owner would: from an installed wheel, and by its workflows."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pytest_kdriver.config import load_config
from pytest_kdriver.toolchain import find_toolchain
from tests.example_repository import (
    EXAMPLE,
    lay_out,
    read_job,
    read_workflow,
    run_commands,
    runner_environment,
)

WORKFLOWS = sorted((EXAMPLE / ".github" / "workflows").glob("*.yml"))
TESTS = 12
PYTEST = ("python", "-m", "pytest")

Shell = Callable[..., subprocess.CompletedProcess[str]]


def new_python(folder: Path) -> Path:
    """The programs' folder of a new Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder / "bin"


def run(*command: str, cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("example") / "repository")


@pytest.fixture(scope="module")
def environment(
    repository: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """One in which pip has built pytest-kdriver's wheel and installed it."""
    folder = tmp_path_factory.mktemp("installed")
    environment = runner_environment(new_python(folder / "python"), folder)
    environment["KDRIVER_CACHE"] = str(cache)
    install = ("python", "-m", "pip", "install", "--requirement", "requirements.txt")
    done = run(*install, cwd=repository, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    where = "import pytest_kdriver; print(pytest_kdriver.__file__)"
    found = run("python", "-c", where, cwd=repository, environment=environment)
    assert Path(found.stdout).is_relative_to(folder)
    return environment


@pytest.fixture
def shell(repository: Path, environment: dict[str, str]) -> Shell:
    """What the repository's owner types in it."""

    def shell(*command: str) -> subprocess.CompletedProcess[str]:
        return run(*command, cwd=repository, environment=environment)

    return shell


def test_its_tests_pass(shell: Shell) -> None:
    done = shell(*PYTEST)
    assert done.stdout.splitlines()[-1].strip("= ").startswith(f"{TESTS} passed in"), done.stdout


def test_its_lock_file_is_up_to_date(shell: Shell) -> None:
    cargo = find_toolchain().cargo
    done = shell(cargo, "metadata", "--locked", "--offline", "--format-version=1")
    assert done.returncode == 0, done.stderr


def test_its_targets_are_such_as_the_config_takes(tmp_path: Path) -> None:
    settings = (EXAMPLE / "kdriver.toml").read_text()
    commented_out = re.compile(r"(?m)^# (?=\[|\w+ = )")
    (tmp_path / "kdriver.toml").write_text(commented_out.sub("", settings))
    (tmp_path / "Cargo.toml").touch()
    assert {"nightly", "win10"} <= set(load_config(tmp_path).targets)


def test_a_drivers_tests_are_selected_by_its_marker(shell: Shell) -> None:
    collect = (*PYTEST, "--collect-only", "--quiet", "-m")
    done = shell(*collect, "kdriver(name='mailbox')")
    assert f"{TESTS} tests collected" in done.stdout
    done = shell(*collect, "kdriver(name='another')")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def test_the_leak_that_it_shows_fails_its_test(repository: Path, shell: Shell) -> None:
    done = shell(*PYTEST, "demo", "--kdriver-artifacts", "results/demo")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    allocates = "message.try_reserve_exact"
    source = (repository / "mailbox/src/lib.rs").read_text().splitlines()
    line = next(number for number, text in enumerate(source, 1) if allocates in text)
    assert "mailbox on wine: 3 blocks, 300 bytes leaked:" in done.stdout
    leak = (
        rf" 3 blocks +300 bytes +tag 'Mail' .* from mailbox/src/lib\.rs:{line} in mailbox::copy_of"
    )
    assert re.search(leak, done.stdout)
    assert "1 failed in" in done.stdout.splitlines()[-1]
    (kept,) = (repository / "results/demo").glob("*.txt")
    assert re.search(leak, kept.read_text())


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_its_workflows_are_such_as_github_takes(workflow: Path) -> None:
    schema = ("--builtin-schema", "vendor.github-workflows")
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", *schema, workflow],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_its_workflows_test_each_driver(workflow: Path) -> None:
    members = tomllib.loads((EXAMPLE / "Cargo.toml").read_text())["workspace"]["members"]
    for job in read_workflow(workflow)["jobs"].values():
        assert job["strategy"]["matrix"]["driver"] == members


def test_each_step_for_a_push_works(repository: Path, cache: Path, tmp_path: Path) -> None:
    if shutil.which("apt-get") is None:
        pytest.skip("the workflow is for a machine with apt-get")
    if find_toolchain().build_arguments:
        pytest.skip("the workflow is for rustup's Rust, and here it is the distribution's")
    job = read_job(repository / ".github/workflows/wine.yml", "wine", {"matrix.driver": "mailbox"})
    environment = runner_environment(new_python(tmp_path / "python"), tmp_path)
    environment["KDRIVER_CACHE"] = str(cache)

    printed = {step.name: text for step, text in run_commands(job, repository, environment)}

    assert "Successfully installed pytest-kdriver" in printed["Install pytest-kdriver"]
    assert "nothing is missing" in printed["Tell what is here"]
    assert f"{TESTS} passed" in printed["Test"]
    (upload,) = [step for step in job.steps if step.action == "actions/upload-artifact"]
    results = repository / upload.inputs["path"]
    (suite,) = ElementTree.parse(results / "mailbox.xml").getroot().iter("testsuite")
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == (
        str(TESTS),
        "0",
        "0",
    )
