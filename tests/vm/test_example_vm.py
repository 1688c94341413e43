"""The nightly of the repository in examples/: each of its steps, on winevm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.example_repository import lay_out, read_job, run_commands, runner_environment


@pytest.mark.usefixtures("winevm_image")  # pip has no index in these steps
def test_each_step_of_the_nightly_works(tmp_path: Path, vm_cache: Path, libvirt_uri: str) -> None:
    repository = lay_out(tmp_path / "repository")
    # The one difference from what is there: the tests' own libvirt, for the session's is the user's.
    settings = repository / "kdriver.toml"
    image = 'image = "winevm"\n'
    assert settings.read_text().count(image) == 1
    settings.write_text(settings.read_text().replace(image, f'{image}uri = "{libvirt_uri}"\n'))
    job = read_job(
        repository / ".github/workflows/nightly.yml",
        "vm",
        {"matrix.driver": "mailbox", "inputs.target || 'nightly'": "nightly"},
    )
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "python"], check=True)
    environment = runner_environment(tmp_path / "python/bin", tmp_path)
    environment["KDRIVER_CACHE"] = str(vm_cache)

    printed = {step.name: text for step, text in run_commands(job, repository, environment)}

    assert list(printed) == ["Install pytest-kdriver", "Tell what is here", "Test", "Clean up"]
    assert "nothing is missing" in printed["Tell what is here"]
    assert "12 passed" in printed["Test"]
    (upload,) = [step for step in job.steps if step.action == "actions/upload-artifact"]
    results = repository / upload.inputs["path"]
    (suite,) = ElementTree.parse(results / "mailbox.xml").getroot().iter("testsuite")
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("12", "0", "0")
