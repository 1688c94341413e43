"""``kdriver build``: cargo packages to .sys files."""

from __future__ import annotations

import argparse
from pathlib import Path

from pytest_kdriver.config import find_root, load_config
from pytest_kdriver.errors import BuildError
from pytest_kdriver.image.cargo import Cargo


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "build",
        help="build drivers with cargo",
        description="Build cargo packages as drivers and print where their .sys files are.",
    )
    parser.add_argument("package", nargs="+", help="a package of the configured cargo workspace")
    parser.add_argument("--release", action="store_true", help="with cargo's release profile")
    parser.add_argument(
        "--features", default="", metavar="A,B", help="cargo features to build with"
    )
    parser.set_defaults(call=call)


def call(options: argparse.Namespace) -> int:
    """Build each package in turn."""
    config = load_config(find_root(Path.cwd()))
    if config.manifest is None:
        raise BuildError(
            f"no cargo workspace in {config.root}: set manifest in kdriver.toml or [tool.kdriver]"
        )
    cargo = Cargo(config.manifest, profile="release" if options.release else config.profile)
    features = [feature for feature in options.features.split(",") if feature]
    for package in options.package:
        print(cargo.build(package, features=features))
    return 0
