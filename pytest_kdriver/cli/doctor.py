"""``kdriver doctor``: what is here, what is missing, and the command that mends it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from pytest_kdriver.config import Config, TargetConfig, find_root, load_config
from pytest_kdriver.errors import BuildError, ConfigError, KdriverError, TargetError
from pytest_kdriver.guest.executable import AGENT
from pytest_kdriver.image.cargo import Cargo
from pytest_kdriver.paths import cache_directory
from pytest_kdriver.session import make_target
from pytest_kdriver.targets.libvirt import require_libvirt
from pytest_kdriver.targets.machine_target import MachineTarget
from pytest_kdriver.targets.runs import abandoned_runs
from pytest_kdriver.targets.target import Target
from pytest_kdriver.targets.windows.in_force import NotInForce
from pytest_kdriver.targets.windows.self_test import Result
from pytest_kdriver.targets.windows.self_test import self_test as try_claims
from pytest_kdriver.toolchain import TARGET, find_toolchain
from pytest_kdriver.vm_config import DEFAULT_URI

_PROGRAMS: Final = {"qemu-system-x86_64": "qemu-system-x86", "qemu-img": "qemu-utils"}
"""What machines are run by, and Debian's and Ubuntu's package of each."""

ROOM: Final = 2 << 30
"""Bytes that Wine's template, the agent's build and a few runs take in the cache, with a margin."""


class State(Enum):
    """What a finding means for the tests of this project."""

    OK = "ok"
    NOTE = "note"
    MISSING = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found of one thing. ``remedy`` is a command, or what to do in words; "" for nothing."""

    name: str
    state: State
    detail: str
    remedy: str = ""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "doctor",
        help="tell what is here, what is missing, and what mends it",
        description="Look at all that the tests of this folder's project need, start its targets for a "
        "trial, and tell what is missing with the command that mends it. The exit code is 0 if nothing is.",
    )
    parser.add_argument(
        "--vm",
        action="append",
        default=[],
        metavar="NAME",
        help="the target to try, instead of the config's; may be repeated",
    )
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="go through what the documents say of Windows, also where the guest is none; with a Windows "
        "this is done by itself",
    )
    parser.add_argument("--json", action="store_true", help="as a JSON list, for programs")
    parser.set_defaults(call=call)


def call(options: argparse.Namespace) -> int:
    """Look, and tell."""
    told = []
    for found in examine(Path.cwd(), options.vm, self_test=options.self_test):
        told.append(found)
        if not options.json:
            print(_line(found), flush=True)  # a trial takes a while
    findings = [found for found in told if isinstance(found, Finding)]
    missing = [finding for finding in findings if finding.state is State.MISSING]
    if options.json:
        print(json.dumps([_as_json(found) for found in told], indent=2))
        return 1 if missing else 0
    if len(told) > len(findings):
        print("\nplease send us this table: it is what no Windows has shown us yet")
    if missing:
        print(f"\n{', '.join(finding.name for finding in missing)}: missing, see above")
    else:
        print("\nnothing is missing")
    return 1 if missing else 0


def examine(
    start: Path, targets: Sequence[str] = (), *, self_test: bool = False
) -> Iterator[Finding | Result]:
    """What there is for the project that the folder ``start`` belongs to, one thing after the other.

    ``targets`` are those to try; none: those of the config. What the documents say of Windows is tried where
    there is one, or ``self_test`` says so.
    """
    yield _machine()
    yield _packages()
    try:
        config = load_config(find_root(start))
    except ConfigError as error:
        yield Finding(
            name="config", state=State.MISSING, detail=str(error), remedy="mend that file"
        )
        return
    yield Finding(name="config", state=State.OK, detail=f"of {config.root}")
    cache = _cache()
    yield cache
    rust = _rust(config)
    yield rust
    if config.manifest is not None and rust.state is State.OK:
        yield _drivers(config.manifest, config.profile)
    if cache.state is State.MISSING:
        return  # nothing more can be tried
    yield _leftovers()
    chosen = [config.target(name) for name in targets or config.vm or ("wine",)]
    machines = [target for target in chosen if target.kind == "libvirt"]
    if machines:
        yield from _virtual_machines(
            {str(machine.vm.get("uri", DEFAULT_URI)) for machine in machines}
        )
    for target in chosen:
        yield from _target(target, config, self_test=self_test)


def _machine() -> Finding:
    detail = f"{platform.system()} on {platform.machine()}"
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        return Finding(name="machine", state=State.OK, detail=detail)
    return Finding(
        name="machine",
        state=State.MISSING,
        detail=detail,
        remedy="targets on this machine need Linux on x86-64",
    )


def _packages() -> Finding:
    packages = ("pytest-kdriver", "pytest", "symbolic")
    versions = [f"Python {platform.python_version()}"]
    try:
        versions += [f"{name} {importlib.metadata.version(name)}" for name in packages]
    except importlib.metadata.PackageNotFoundError as error:
        return Finding(
            name="Python",
            state=State.MISSING,
            detail=f"no package {error.name}",
            remedy="pip install --force-reinstall pytest-kdriver",
        )
    return Finding(name="Python", state=State.OK, detail=", ".join(versions))


def _cache() -> Finding:
    folder = cache_directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} can't be written")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(
            name="cache",
            state=State.MISSING,
            detail=str(error),
            remedy="make it writable, or set KDRIVER_CACHE to a folder that is",
        )
    detail = f"{folder}, {free / (1 << 30):.1f} GiB free"
    if free < ROOM:
        return Finding(
            name="cache",
            state=State.NOTE,
            detail=detail,
            remedy=f"some {ROOM >> 30} GiB are needed at first: free some, or set KDRIVER_CACHE",
        )
    return Finding(name="cache", state=State.OK, detail=detail)


def _rust(config: Config) -> Finding:
    try:
        toolchain = find_toolchain()
    except BuildError as error:
        needed = config.manifest is not None or not _agent_is_there()
        return Finding(
            name="Rust",
            state=State.MISSING if needed else State.NOTE,
            detail=str(error) if needed else f"{error}\nneeded for cargo packages only",
            remedy=f"{'' if shutil.which('rustup') else 'install rustup, then: '}rustup target add {TARGET}",
        )
    version = toolchain.identity.partition("\n")[0]
    return Finding(name="Rust", state=State.OK, detail=f"{version}, by {toolchain.cargo}")


def _agent_is_there() -> bool:
    try:
        AGENT.executable()
    except (BuildError, OSError):
        return False
    return True


def _drivers(manifest: Path, profile: str) -> Finding:
    try:
        packages = Cargo(manifest, profile=profile).packages()
    except KdriverError as error:
        return Finding(
            name="drivers", state=State.MISSING, detail=str(error), remedy=f"mend {manifest}"
        )
    names = ", ".join(sorted(packages))
    return Finding(name="drivers", state=State.OK, detail=f"{manifest}: {names}")


def _virtual_machines(uris: set[str]) -> Iterator[Finding]:
    """What machines under the libvirts ``uris`` need of this host."""
    missing = [package for program, package in _PROGRAMS.items() if shutil.which(program) is None]
    yield Finding(
        name="QEMU",
        state=State.MISSING if missing else State.OK,
        detail=f"lacking {', '.join(missing)}" if missing else "with its programs",
        remedy=f"apt-get install {' '.join(missing)}" if missing else "",
    )
    for uri in sorted(uris):
        yield _libvirt(uri)


def _libvirt(uri: str) -> Finding:
    try:
        require_libvirt()
        from pytest_kdriver.targets.libvirt.accelerator import find_accelerator
        from pytest_kdriver.targets.libvirt.connection import Hypervisor

        hypervisor = Hypervisor.open(uri)
        try:
            accelerator = find_accelerator(hypervisor.emulator, hypervisor.owner)
        finally:
            hypervisor.close()
    except (TargetError, OSError) as error:
        return Finding(name="libvirt", state=State.MISSING, detail=str(error))
    detail = f"{uri}, libvirt {hypervisor.version}, QEMU {hypervisor.qemu_version}"
    if accelerator.kind == "kvm":
        return Finding(name="libvirt", state=State.OK, detail=f"{detail}, KVM works")
    broken = accelerator.reason.startswith("KVM is there") or "failed a guest" in accelerator.reason
    return Finding(
        name="libvirt",
        state=State.NOTE,
        detail=f"{detail}\nguests run by TCG, which is slow: {accelerator.reason}",
        remedy="" if broken else f"KVM needs /dev/kvm: adduser {hypervisor.owner.name} kvm",
    )


def _target(
    config: TargetConfig, project: Config, *, self_test: bool
) -> Iterator[Finding | Result]:
    name = f"target {config.name}"
    begin = time.monotonic()
    try:
        target = make_target(config)
        try:
            yield started(target, name, begin)
            on_windows = target.agent.info.wine_version is None
            if isinstance(target, MachineTarget) and (self_test or on_windows):
                yield from try_claims(target, _samples(project))
        finally:
            target.close()
    except (KdriverError, OSError) as error:
        yield Finding(name=name, state=State.MISSING, detail=str(error))


def started(target: Target, name: str, begin: float) -> Finding:
    """Start it; also a Windows on which no test would be run, so that it can be looked at."""
    try:
        target.start()
    except NotInForce as error:
        assert isinstance(target, MachineTarget), "no other asserts anything"
        target.asserts = False
        target.start()
        return Finding(name=name, state=State.MISSING, detail=str(error))
    took = time.monotonic() - begin
    detail = f"{target.describe()}, started in {took:.1f} s"
    return Finding(name=name, state=State.OK, detail=detail)


def _samples(project: Config) -> Callable[[str], Path]:
    """Finds a sample driver of this package, where the project's drivers are these."""

    def find(name: str) -> Path:
        if project.manifest is None:
            raise BuildError("this project has no manifest of drivers")
        return Cargo(project.manifest, profile=project.profile).build(name)

    return find


def _leftovers() -> Finding:
    count = len(abandoned_runs())
    if not count:
        return Finding(name="leftovers", state=State.OK, detail="none")
    return Finding(
        name="leftovers",
        state=State.NOTE,
        detail=f"of {count} killed runs",
        remedy="kdriver gc, or any run",
    )


def _as_json(found: Finding | Result) -> dict[str, object]:
    if isinstance(found, Finding):
        return {**asdict(found), "state": found.state.value}
    return {
        "claim": found.claim.text,
        "where": found.claim.where,
        "how": found.claim.how,
        "outcome": found.outcome.verdict.value,
        "seen": found.outcome.seen,
    }


def _line(found: Finding | Result) -> str:
    if isinstance(found, Finding):
        return _finding_line(found)
    claim, outcome = found.claim, found.outcome
    how = f", by {claim.how}" if claim.how else ""
    seen = outcome.seen.replace("\n", "\n    ")
    return f"{outcome.verdict.value:14} {claim.text}\n    {seen}\n    [{claim.where}{how}]"


def _finding_line(finding: Finding) -> str:
    told = finding.detail.replace("\n", "\n    ")
    remedy = f"\n    -> {finding.remedy}" if finding.remedy else ""
    return f"{finding.state.value:8} {finding.name}: {told}{remedy}"
