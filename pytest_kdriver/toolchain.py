"""The Rust toolchain that builds drivers and the agent for Windows, and how it is called.

Two kinds are known. *rustup*: stable Rust with the target ``x86_64-pc-windows-msvc`` added and the
linker ``rust-lld`` that comes with it. *System*: a distribution's own cargo and rustc, which have no
prebuilt ``core`` for Windows; it is built from ``rust-src`` (``-Zbuild-std``) and linked by ``lld-link``.
No Windows SDK and no WDK in either.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from pytest_kdriver.errors import BuildError

TARGET = "x86_64-pc-windows-msvc"
SYSTEM_CARGO = "/usr/bin/cargo"
SYSTEM_RUSTC = "/usr/bin/rustc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """How to call cargo so that it builds for Windows.

    ``environment`` goes on top of the caller's, ``build_arguments`` behind ``cargo build`` or
    ``cargo rustc``. ``identity`` changes when the compiler does, for use in cache keys.
    """

    cargo: str
    identity: str
    environment: dict[str, str] = field(default_factory=dict)
    build_arguments: tuple[str, ...] = ()

    def full_environment(self) -> dict[str, str]:
        """The caller's environment with this toolchain's on top; what the user has set stays."""
        return {**self.environment, **os.environ}


@functools.cache
def find_toolchain() -> Toolchain:
    """The toolchain to use: rustup's where it has the target, else the system's.

    Raises ``BuildError`` with the commands that mend it where neither can build for Windows.
    """
    problems = []
    cargo = shutil.which("cargo")
    rustc = shutil.which("rustc")
    if cargo and rustc and _has_prebuilt_core(rustc):
        return Toolchain(
            cargo=cargo,
            identity=_version(rustc),
            environment={f"CARGO_TARGET_{_upper(TARGET)}_LINKER": "rust-lld", **_PANIC},
        )
    if shutil.which("rustup"):
        problems.append(f"rustup is here, but not its target: rustup target add {TARGET}")
    system = _system_toolchain()
    if isinstance(system, Toolchain):
        return system
    problems.append(system)
    raise BuildError(
        "no Rust toolchain here can build Windows drivers.\n  " + "\n  ".join(problems)
    )


_PANIC = {"CARGO_PROFILE_DEV_PANIC": "abort", "CARGO_PROFILE_RELEASE_PANIC": "abort"}


def _upper(name: str) -> str:
    return name.upper().replace("-", "_")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _version(rustc: str) -> str:
    return _output(rustc, "-vV")


def _has_prebuilt_core(rustc: str) -> bool:
    libraries = _output(rustc, "--print", "target-libdir", "--target", TARGET)
    return bool(libraries) and any(Path(libraries).glob("libcore-*.rlib"))


def _system_toolchain() -> Toolchain | str:
    """The distribution's toolchain, or the sentence that says what it lacks."""
    packages = "apt-get install rustc-web cargo-web rust-web-src lld   (Debian 12)"
    missing = [path for path in (SYSTEM_CARGO, SYSTEM_RUSTC) if not os.access(path, os.X_OK)]
    if missing:
        return f"no {' and no '.join(missing)}: {packages}, or rustup with the target {TARGET}"
    sysroot = _output(SYSTEM_RUSTC, "--print", "sysroot")
    if not (Path(sysroot) / "lib/rustlib/src/rust/library/core/src/lib.rs").exists():
        return f"{SYSTEM_RUSTC} has no source of core: {packages}"
    linker = shutil.which("lld-link")
    if linker is None:
        return "no lld-link: apt-get install lld"
    return Toolchain(
        cargo=SYSTEM_CARGO,
        identity=_version(SYSTEM_RUSTC),
        environment={
            f"CARGO_TARGET_{_upper(TARGET)}_LINKER": linker,
            "RUSTC": SYSTEM_RUSTC,
            "RUSTC_BOOTSTRAP": "1",
            **_PANIC,
        },
        build_arguments=("-Zbuild-std=core,alloc",),
    )
