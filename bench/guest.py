"""What the measurements run on: the project's own drivers, on Wine, in a cache that is warm."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.image.cargo import Cargo
from pytest_kdriver.targets import prefix
from pytest_kdriver.targets.prefix import Wine
from pytest_kdriver.targets.runs import Run
from pytest_kdriver.targets.wine import WineTarget

ROOT = Path(__file__).parents[1]
MANIFEST = ROOT / "drivers" / "Cargo.toml"


def driver_image(name: str) -> Path:
    """The image of one of the sample drivers, built if it has to be."""
    return Cargo(MANIFEST).build(name)


@contextmanager
def wine_target() -> Iterator[WineTarget]:
    """A started target of the built-in kind."""
    target = WineTarget(TargetConfig(name="wine", kind="wine"))
    try:
        target.start()
        yield target
    finally:
        target.close()


@dataclass(frozen=True, slots=True)
class BarePrefix:
    """A clone of the template in which nothing runs yet."""

    wine: Wine
    path: Path

    def command(self, program: Path, *arguments: str) -> Sequence[str]:
        """The command line of one of its programs."""
        return [self.wine.loader, str(program), *arguments]

    def run(self, program: Path, *arguments: str) -> None:
        """Run a program to its end, silently, with no input."""
        subprocess.run(
            self.command(program, *arguments),
            env=self.wine.environment(self.path, "-all"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            check=True,
        )


@contextmanager
def bare_prefix() -> Iterator[BarePrefix]:
    """A fresh clone, ended and removed in the end."""
    wine = prefix.find_wine()
    run = Run()
    try:
        path = run.path / "prefix-bench"
        run.record(prefix.RESOURCE, path)
        prefix.clone(prefix.template(wine, run), path)
        try:
            yield BarePrefix(wine, path)
        finally:
            prefix.remove(path)
    finally:
        run.close()


def plain_environment() -> dict[str, str]:
    """Our environment without what would make a child pytest another one; bytecode is cached."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "PYTHONDONTWRITEBYTECODE"))
    }
