"""``kdagent.exe``: the one that a wheel brings, or else one that is built when it is first needed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

from pytest_kdriver.errors import BuildError
from pytest_kdriver.paths import cache_directory
from pytest_kdriver.toolchain import TARGET, Toolchain, find_toolchain

NAME = "kdagent.exe"
PACKAGED = Path(__file__).with_name(NAME)
SOURCE = Path(__file__).parents[2] / "vm" / "agent"


def agent_executable() -> Path:
    """The agent for the guest.

    In a source tree it is built by cargo, once for each state of its sources and of the toolchain, into the
    cache. ``BuildError`` with cargo's output if that fails, or if there is no source either.
    """
    if PACKAGED.exists():
        return PACKAGED
    if not (SOURCE / "Cargo.toml").exists():
        raise BuildError(f"this installation has neither {PACKAGED} nor its source in {SOURCE}")
    toolchain = find_toolchain()
    cache = cache_directory() / "agent"
    executable = cache / _key(toolchain) / NAME
    if executable.exists():
        return executable
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):
        if not executable.exists():
            built = build_agent(toolchain, cache / "target")
            executable.parent.mkdir(exist_ok=True)
            unfinished = executable.with_suffix(".new")
            shutil.copyfile(built, unfinished)
            unfinished.replace(executable)
    return executable


def build_agent(toolchain: Toolchain, target_directory: Path) -> Path:
    """Build the agent from the source tree; the path of what cargo made. ``BuildError`` as above."""
    command = [
        toolchain.cargo,
        "rustc",
        "--manifest-path",
        str(SOURCE / "Cargo.toml"),
        "--locked",
        "--package=kdagent",
        "--bin=kdagent",
        "--release",
        f"--target={TARGET}",
        f"--target-dir={target_directory}",
        *toolchain.build_arguments,
    ]
    done = subprocess.run(
        command,
        env=toolchain.full_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise BuildError(f"the agent could not be built: {' '.join(command)}", output=done.stdout)
    return target_directory / TARGET / "release" / NAME


def _key(toolchain: Toolchain) -> str:
    """Changes whenever the executable would."""
    key = hashlib.sha256()
    for part in (toolchain.identity, *toolchain.build_arguments, os.environ.get("RUSTFLAGS", "")):
        key.update(part.encode() + b"\0")
    for path in sorted(SOURCE.rglob("*")):
        name = path.relative_to(SOURCE)
        if path.suffix in {".rs", ".toml", ".lock"} and name.parts[0] != "target":
            content = path.read_bytes()
            key.update(f"{name}\0{len(content)}\0".encode() + content)
    return key.hexdigest()[:16]
