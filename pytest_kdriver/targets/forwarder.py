"""``kdtrace``, the forwarder of a guest's trace: the wheel's, or else built when it is first needed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from filelock import FileLock

from pytest_kdriver.errors import BuildError
from pytest_kdriver.paths import cache_directory
from pytest_kdriver.toolchain import Toolchain, find_toolchain

NAME: Final = "kdtrace"
GUEST: Final = "x86_64-unknown-linux-gnu"
PACKAGED: Final = Path(__file__).with_name(NAME)
SOURCE: Final = Path(__file__).parents[2] / "vm" / "forwarder"
FRAMES: Final = SOURCE.parent / "agent" / "frames"


def forwarder_executable() -> Path:
    """The forwarder for a guest with Linux: linked statically, so that its C library does not matter.

    In a source tree it is built by cargo, once for each state of its sources and of the toolchain, into the
    cache. ``BuildError`` with cargo's output if that fails, or if there is no source either.
    """
    if PACKAGED.exists():
        return PACKAGED
    if not (SOURCE / "Cargo.toml").exists():
        raise BuildError(f"this installation has neither {PACKAGED} nor its source in {SOURCE}")
    toolchain = find_toolchain()
    cache = cache_directory() / "forwarder"
    executable = cache / _key(toolchain) / NAME
    if executable.exists():
        return executable
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):
        if not executable.exists():
            built = build_forwarder(toolchain, cache / "target")
            executable.parent.mkdir(exist_ok=True)
            unfinished = executable.with_suffix(".new")
            shutil.copy(built, unfinished)
            unfinished.replace(executable)
    return executable


def build_forwarder(toolchain: Toolchain, target_directory: Path) -> Path:
    """Build it from the source tree; the path of what cargo made. ``BuildError`` as above."""
    command = [
        *(toolchain.cargo, "rustc", "--manifest-path", str(SOURCE / "Cargo.toml"), "--locked"),
        *("--release", f"--target={GUEST}", f"--target-dir={target_directory}"),
        *("--", "-Ctarget-feature=+crt-static"),
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
        raise BuildError(
            f"the guest's forwarder could not be built: {' '.join(command)}", output=done.stdout
        )
    return target_directory / GUEST / "release" / NAME


def _key(toolchain: Toolchain) -> str:
    """Changes whenever the executable would."""
    key = hashlib.sha256()
    for part in (toolchain.identity, os.environ.get("RUSTFLAGS", "")):
        key.update(part.encode() + b"\0")
    sources = [SOURCE / "Cargo.toml", SOURCE / "Cargo.lock", *(SOURCE / "src").rglob("*.rs")]
    for path in sorted([*sources, *(FRAMES / "src").rglob("*.rs")]):
        content = path.read_bytes()
        key.update(f"{path.relative_to(SOURCE.parent)}\0{len(content)}\0".encode() + content)
    return key.hexdigest()[:16]
