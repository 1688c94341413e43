"""Drivers that cargo builds: found by package name, built once a run, and found again as a .sys file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pytest_kdriver.errors import BuildError, ImageError
from pytest_kdriver.toolchain import TARGET, Toolchain, find_toolchain

CAPTURE_STACKS: Final = "capture-stacks"
"""The feature by which the framework's allocator tells who called it; a package hands it on by this name."""


@dataclass(frozen=True, slots=True)
class Package:
    """A cargo package that can become a driver. ``root`` is its manifest's folder."""

    name: str
    root: Path
    has_library: bool
    captures_stacks: bool


class Cargo:
    """A cargo workspace with drivers in it.

    ``profile`` is cargo's: "dev", "release" or one of the workspace's own. Builds are kept for the
    life of the object, failed ones too; cargo's own lock keeps processes apart.
    """

    def __init__(
        self, manifest: Path, *, profile: str = "dev", toolchain: Toolchain | None = None
    ) -> None:
        self.manifest = manifest
        self.profile = profile
        self._toolchain = toolchain
        self._packages: dict[str, Package] | None = None
        self._target_directory = Path()
        self._built: dict[tuple[str, tuple[str, ...]], Path | BuildError] = {}

    def packages(self) -> dict[str, Package]:
        """The workspace's packages by name. Raises ``BuildError``."""
        if self._packages is None:
            command = ["metadata", "--no-deps", "--format-version=1"]
            done = self._cargo([*command, "--manifest-path", str(self.manifest)])
            if done.returncode:
                raise BuildError(f"cargo can't read {self.manifest}", output=done.stderr)
            metadata = json.loads(done.stdout)
            self._target_directory = Path(metadata["target_directory"])
            self._packages = {p["name"]: _package(p) for p in metadata["packages"]}
        return self._packages

    def build(self, name: str, *, features: Sequence[str] = ()) -> Path:
        """Build package ``name`` as a driver; its .sys file. Raises ``BuildError`` with cargo's output.

        Whatever the package leaves open is given: target, linker, ``panic = "abort"``, crate type. The
        feature ``capture-stacks`` is switched on where the package has it.
        """
        key = (name, tuple(sorted(features)))
        if key not in self._built:
            try:
                self._built[key] = self._build(name, key[1])
            except BuildError as error:
                self._built[key] = error
        built = self._built[key]
        if isinstance(built, BuildError):
            raise built.with_traceback(None)
        return built

    def _build(self, name: str, features: Sequence[str]) -> Path:
        package = self.packages().get(name)
        if package is None:
            known = ", ".join(sorted(self.packages()))
            raise BuildError(f"no package {name!r} in {self.manifest}; there are: {known}")
        if not package.has_library:
            raise BuildError(f"package {name!r} has no library, so it can't become a driver")
        command = ["rustc", "--manifest-path", str(self.manifest), "--package", name, "--lib"]
        command += ["--crate-type", "cdylib", "--target", TARGET, "--profile", self.profile]
        command += ["--message-format", "json-render-diagnostics"]
        switched_on = [*features, *([CAPTURE_STACKS] if package.captures_stacks else [])]
        command += [f"--features={','.join(switched_on)}"] if switched_on else []
        done = self._cargo([*command, *self._known_toolchain().build_arguments])
        if done.returncode:
            raise BuildError(f"package {name!r} does not build", output=done.stderr)
        library = _artifact(done.stdout, package)
        if library is None:
            raise BuildError(f"cargo built {name!r}, but no .dll came of it", output=done.stderr)
        return self._as_driver(library, name, features)

    def _as_driver(self, library: Path, name: str, features: Sequence[str]) -> Path:
        """A copy of ``library`` that is called as the driver is, with its symbols beside it."""
        flavour = "-".join(["kdriver", *features])
        folder = self._target_directory / TARGET / library.parent.name / flavour
        folder.mkdir(parents=True, exist_ok=True)
        for source, copy in (
            (library, folder / f"{name}.sys"),
            (library.with_suffix(".pdb"), folder / f"{name}.pdb"),
        ):
            if source.exists():
                _copy(source, copy)
        return folder / f"{name}.sys"

    def _known_toolchain(self) -> Toolchain:
        if self._toolchain is None:
            self._toolchain = find_toolchain()
        return self._toolchain

    def _cargo(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        toolchain = self._known_toolchain()
        return subprocess.run(
            [toolchain.cargo, *arguments],
            env=toolchain.full_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )


def find_image(path: Path) -> Path:
    """The driver's file that ``path`` means.

    A .sys or .dll file means itself; a folder, such as the ``*_package`` of cargo-wdk, the only .sys
    file in it. Raises ``ImageError``.
    """
    if path.is_dir():
        drivers = sorted(path.glob("*.sys"))
        if len(drivers) != 1:
            found = ", ".join(driver.name for driver in drivers) or "none"
            raise ImageError(f"{path} should have one .sys file in it; it has: {found}")
        return drivers[0]
    if not path.is_file():
        raise ImageError(f"there is no {path}")
    return path


def _package(metadata: dict[str, Any]) -> Package:
    kinds = {kind for target in metadata["targets"] for kind in target["kind"]}
    return Package(
        name=metadata["name"],
        root=Path(metadata["manifest_path"]).parent,
        has_library=bool(kinds & {"lib", "rlib", "dylib", "cdylib", "staticlib"}),
        captures_stacks=CAPTURE_STACKS in metadata["features"],
    )


def _artifact(messages: str, package: Package) -> Path | None:
    """The .dll that cargo says it made of the package's library."""
    manifest = str(package.root / "Cargo.toml")
    for line in messages.splitlines():
        message = json.loads(line)
        if message["reason"] != "compiler-artifact" or message["manifest_path"] != manifest:
            continue
        for name in message["filenames"]:
            if name.endswith(".dll"):
                return Path(name)
    return None


def _copy(source: Path, copy: Path) -> None:
    """Copy, unless the same is there already; whoever reads the copy meanwhile sees a whole file."""
    before = source.stat()
    try:
        after = copy.stat()
    except FileNotFoundError:
        pass
    else:
        if (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns):
            return
    temporary = copy.with_name(f".{copy.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        shutil.copy2(source, temporary)
        temporary.replace(copy)
    finally:
        temporary.unlink(missing_ok=True)
