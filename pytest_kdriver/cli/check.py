"""``kdriver check``: pre-flight of a driver's file, without loading it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pytest_kdriver.config import find_root, load_config
from pytest_kdriver.image.exports import KernelExports
from pytest_kdriver.image.finder import ImageFinder
from pytest_kdriver.image.preflight import Finding, preflight
from pytest_kdriver.targets import prefix
from pytest_kdriver.targets.leftovers import REMOVERS
from pytest_kdriver.targets.runs import Run


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "check",
        help="look at a driver's file for what would fail",
        description="Check a driver's file without loading it: its headers, and what it imports, against "
        "what the target's kernel has. One finding a line. The exit code is 1 if the load would fail, "
        "else 0.",
    )
    parser.add_argument(
        "driver", help="a .sys file, or a package of the configured cargo workspace"
    )
    guest = parser.add_mutually_exclusive_group()
    guest.add_argument("--vm", metavar="NAME", help="the target (default: the config's, else wine)")
    guest.add_argument(
        "--windows",
        action="store_true",
        help="check for Windows itself, of whose kernel's exports nothing is known here",
    )
    parser.set_defaults(call=call)


def call(options: argparse.Namespace) -> int:
    """Do it, and tell."""
    config = load_config(find_root(Path.cwd()))
    name = options.driver
    if "/" not in name and Path(name).is_file():
        name = f"./{name}"
    image = ImageFinder(config.root, config.manifest, profile=config.profile).find(
        name, beside=Path.cwd()
    )
    if options.windows:
        report, guest = preflight(image, None, guest="windows"), "Windows"
    else:
        target = config.target(options.vm or (config.vm[0] if config.vm else "wine"))
        kernel = _wine_kernel(target.wine)
        report, guest = preflight(image, kernel, guest="wine"), kernel.name
    for finding in report.findings:
        print(finding)
    told = f"{_count(report.errors, 'error')}, {_count(report.warnings, 'warning')}"
    print(f"kdriver: {image.name} for {guest}: {told}", file=sys.stderr)
    return 1 if report.errors else 0


def _count(findings: Sequence[Finding], what: str) -> str:
    return f"{len(findings)} {what}{'' if len(findings) == 1 else 's'}"


def _wine_kernel(wanted: str | None) -> KernelExports:
    """The kernel of a Wine as its drivers find it: in the prefix that targets are cloned from."""
    wine = prefix.find_wine(wanted)
    run = Run()
    try:
        template = prefix.template(wine, run)
    finally:
        run.close(REMOVERS)
    return KernelExports(template / "drive_c" / "windows", f"Wine {wine.version}")
