"""The repository in examples/ as its owner has it, and the jobs of its workflows, run step by step."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "driver-repository"
STEP_TIMEOUT = 600.0
"""Seconds; a job's own limit is minutes, and it is GitHub that keeps it."""


def lay_out(folder: Path) -> Path:
    """Make ``folder`` a copy of the example with this checkout in it, as its submodule; ``folder``."""
    made_there = shutil.ignore_patterns(
        "target", "__pycache__", ".venv", ".pytest_cache", "results"
    )
    shutil.copytree(EXAMPLE, folder, ignore=made_there)
    made_here = shutil.ignore_patterns(
        ".*", "target", "dist", "__pycache__", "*.egg-info", "tests", "bench"
    )
    shutil.copytree(ROOT, folder / "pytest-kdriver", ignore=made_here)
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One of a job: a shell ``command``, or an ``action`` (without its version) and its ``inputs``."""

    name: str
    command: str
    action: str
    inputs: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job of a workflow, for one place in its matrix."""

    environment: Mapping[str, str]
    steps: tuple[Step, ...]


def read_workflow(path: Path) -> dict[str, Any]:
    """The workflow as YAML has it."""
    workflow: dict[str, Any] = YAML(typ="safe").load(path)
    return workflow


def read_job(path: Path, name: str, values: Mapping[str, str]) -> Job:
    """The job ``name`` of the workflow at ``path``; ``values`` are those of the expressions in it.

    An expression without a value is a KeyError. One in a shell command is none: it would be pasted into
    the command before the shell sees it, so that whoever chooses the value writes the command.
    """
    job = read_workflow(path)["jobs"][name]

    def evaluate(texts: Mapping[str, object]) -> dict[str, str]:
        return {
            key: re.sub(r"\$\{\{ *(.+?) *\}\}", lambda match: values[match[1]], str(text))
            for key, text in texts.items()
        }

    steps = []
    for step in job["steps"]:
        action = step.get("uses", "").partition("@")[0]
        command = step.get("run", "")
        if "${{" in command:
            raise ValueError(f"{path.name}: an expression in a command: {command}")
        # Only of what leaves something: checkout and caches are GitHub's own affair.
        inputs = evaluate(step.get("with", {})) if action == "actions/upload-artifact" else {}
        steps.append(
            Step(name=step.get("name", action), command=command, action=action, inputs=inputs)
        )
    return Job(environment=evaluate(job.get("env", {})), steps=tuple(steps))


def run_commands(
    job: Job, repository: Path, environment: Mapping[str, str]
) -> Iterator[tuple[Step, str]]:
    """Run the job's commands in order, as a runner does; each step with what it printed.

    One that fails is an AssertionError with its output.
    """
    for step in job.steps:
        if not step.command:
            continue
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step.command],
            cwd=repository,
            env={**environment, **job.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            timeout=STEP_TIMEOUT,
        )
        assert done.returncode == 0, f"step {step.name!r} failed:\n{done.stdout}"
        yield step, done.stdout


def runner_environment(programs: Path, folder: Path) -> dict[str, str]:
    """The environment of a step on a runner: ``programs`` first on PATH, ``sudo`` for who has none.

    pip takes what this project needs from this interpreter, and nothing from elsewhere; it still builds
    and installs pytest-kdriver itself. As an ordinary user ``apt-get install`` is only simulated: that
    the packages exist is seen, too.
    """
    shims = folder / "shims"
    shims.mkdir(exist_ok=True)
    sudo = shims / "sudo"
    sudo.write_text(_SUDO)
    sudo.chmod(0o755)
    settings = folder / "apt.conf"
    settings.write_text('DPkg::Lock::Timeout "300";\nAcquire::Retries "3";\n')
    ours = ("PYTEST", "VIRTUAL_ENV", "PYTHON", "COV_", "KDRIVER_VM")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {
        **kept,
        "CI": "true",
        "GITHUB_ACTIONS": "true",
        "PATH": os.pathsep.join((str(shims), str(programs), os.environ["PATH"])),
        "APT_CONFIG": str(settings),
        "DEBIAN_FRONTEND": "noninteractive",
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "PIP_NO_INDEX": "1",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # which says: no isolation
    }


_SUDO = """\
#!/bin/sh
if [ "$(id -u)" = 0 ]; then exec "$@"; fi
case "$1 $2" in
    "apt-get update") ;;
    "apt-get install") exec "$@" --simulate ;;
    *) echo "sudo: not for $*" >&2; exit 1 ;;
esac
"""
