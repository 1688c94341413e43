"""The Rust toolchain that builds drivers and the agent for Windows, and how it is called.

Two kinds are known. *rustup*: stable Rust with the target ``x86_64-pc-windows-msvc`` added and the
linker ``rust-lld`` that comes with it. *System*: a distribution's own cargo and rustc, which have no
prebuilt ``core`` for Windows; it is built from ``rust-src`` (``-Zbuild-std``) and linked by ``lld-link``.
No Windows SDK and no WDK in either. Where both are there, rustup's is taken.

The names of the packages stand in ``scripts/setup`` too, which installs them.
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
SYSTEM_PROGRAMS = Path("/usr/bin")
OLDEST_LLD = 15  # 14 looks for msvcrt.lib before it has read the driver's /NODEFAULTLIB:msvcrt


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
    packages = "apt-get install rustc-web cargo-web rust-web-src lld-16   (Debian 12)"
    rust = _system_rust()
    if rust is None:
        return (
            f"no Rust in {SYSTEM_PROGRAMS}: {packages}; or install rustup, and its target {TARGET}"
        )
    cargo, rustc = rust
    sysroot = _output(rustc, "--print", "sysroot")
    if not (Path(sysroot) / "lib/rustlib/src/rust/library/core/src/lib.rs").exists():
        return f"{rustc} has no source of core: {packages}"
    linker = _system_linker()
    if linker is None:
        return f"no lld-link of version {OLDEST_LLD} or newer: {packages}"
    return Toolchain(
        cargo=cargo,
        identity=_version(rustc),
        environment={
            f"CARGO_TARGET_{_upper(TARGET)}_LINKER": linker,
            "RUSTC": rustc,
            "RUSTC_BOOTSTRAP": "1",
            **_PANIC,
        },
        build_arguments=("-Zbuild-std=core,alloc", *_LIKE_PREBUILT),
    )


# Built as the prebuilt ones are. Unoptimised, compiler_builtins wants fma, which no kernel has.
_LIKE_PREBUILT = tuple(
    f"--config=profile.dev.package.{crate}.{setting}"
    for crate in ("core", "alloc", "compiler_builtins")
    for setting in ("opt-level=3", "debug-assertions=false", "overflow-checks=false")
)


def _system_rust() -> tuple[str, str] | None:
    """Paths of cargo and rustc: Ubuntu's newest of several side by side, else the plain ones."""
    # Not those in /usr/bin: some of Ubuntu's cargo-1.NN there call the plain cargo (LP: #2100266).
    versioned = sorted(
        Path("/usr/lib").glob("rust-1.*"),
        key=lambda folder: _number(folder, "rust-1."),
        reverse=True,
    )
    for programs in (*(folder / "bin" for folder in versioned), SYSTEM_PROGRAMS):
        cargo, rustc = programs / "cargo", programs / "rustc"
        if os.access(cargo, os.X_OK) and os.access(rustc, os.X_OK):
            return str(cargo), str(rustc)
    return None


def _system_linker() -> str | None:
    """The newest ``lld-link-NN``; the package ``lld`` brings one too."""
    linkers = {_number(path, "lld-link-"): path for path in SYSTEM_PROGRAMS.glob("lld-link-*")}
    newest = max(linkers, default=0)
    return str(linkers[newest]) if newest >= OLDEST_LLD else None


def _number(path: Path, prefix: str) -> int:
    digits = path.name.removeprefix(prefix)
    return int(digits) if digits.isdecimal() else 0
