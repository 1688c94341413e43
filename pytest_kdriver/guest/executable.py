"""The programs that run in guests: those that a wheel brings, or else built when they are first needed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from filelock import FileLock

from pytest_kdriver.errors import BuildError
from pytest_kdriver.paths import cache_directory
from pytest_kdriver.toolchain import TARGET, Toolchain, find_toolchain

PACKAGED: Final = Path(__file__).parent
SOURCE: Final = Path(__file__).parents[2] / "vm"


@dataclass(frozen=True, slots=True)
class Program:
    """A program of the workspace ``vm/``: its cargo ``package``, and for which ``target`` it is built."""

    name: str
    package: str
    target: str
    rustc_arguments: tuple[str, ...]

    def executable(self) -> Path:
        """The program for the guest.

        In a source tree it is built by cargo, once for each state of the sources and of the toolchain, into
        the cache. ``BuildError`` with cargo's output if that fails, or if there is no source either.
        """
        packaged = PACKAGED / self.name
        if packaged.exists():
            return packaged
        if not (SOURCE / "Cargo.toml").exists():
            raise BuildError(f"this installation has neither {packaged} nor its source in {SOURCE}")
        toolchain = find_toolchain()
        cache = cache_directory() / "programs"
        executable = cache / _key(toolchain) / self.name
        if executable.exists():
            return executable
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "lock"):
            if not executable.exists():
                for left in cache.glob("building-*"):
                    shutil.rmtree(left, ignore_errors=True)
                # In a folder of its own: cargo goes by times, and another checkout's may be older.
                with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as folder:
                    built = self.build(toolchain, Path(folder))
                    executable.parent.mkdir(exist_ok=True)
                    unfinished = executable.with_suffix(".new")
                    shutil.copy(built, unfinished)
                    unfinished.replace(executable)
        return executable

    def build(self, toolchain: Toolchain, target_directory: Path) -> Path:
        """Build it from the source tree; the path of what cargo made. ``BuildError`` as above."""
        command = [
            *(toolchain.cargo, "rustc", "--manifest-path", str(SOURCE / "Cargo.toml"), "--locked"),
            *(f"--package={self.package}", f"--bin={self.package}", "--release"),
            *(f"--target={self.target}", f"--target-dir={target_directory}"),
            *(toolchain.build_arguments if self.target == TARGET else ()),
            *("--", *self.rustc_arguments),
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
                f"{self.name} could not be built: {' '.join(command)}", output=done.stdout
            )
        return target_directory / self.target / "release" / self.name


AGENT: Final = Program(
    "kdagent.exe", "kdagent", TARGET, ("-Clink-arg=/Brepro", "-Clink-arg=/DEBUG:NONE")
)
"""Its time stamp is a hash, and there are no paths in it: the same sources make the same bytes."""

FORWARDER: Final = Program(
    "kdtrace", "kdtrace", "x86_64-unknown-linux-gnu", ("-Ctarget-feature=+crt-static",)
)
"""For a guest with Linux: linked statically, so that its C library does not matter."""


def _key(toolchain: Toolchain) -> str:
    """Changes whenever a program would."""
    key = hashlib.sha256()
    for part in (toolchain.identity, *toolchain.build_arguments, os.environ.get("RUSTFLAGS", "")):
        key.update(part.encode() + b"\0")
    for path in sorted(SOURCE.rglob("*")):
        name = path.relative_to(SOURCE)
        if path.suffix in {".rs", ".toml", ".lock"} and "target" not in name.parts:
            content = path.read_bytes()
            key.update(f"{name}\0{len(content)}\0".encode() + content)
    return key.hexdigest()[:16]
