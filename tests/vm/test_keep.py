"""``--kdriver-keep``: the machine of a failed test lives on, and the next test has another."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_kdriver.cli import main
from pytest_kdriver.targets.disk_images import DiskImage
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.libvirt.kept import KeptVm, find_kept, kept_vms

TESTS = """
import pytest

def leave(kdriver_target, name):
    kdriver_target.put(name.encode(), r"C:\\left.txt")

def left(kdriver_target):
    return kdriver_target.run(["cmd", "/c", r"type C:\\left.txt"]).stdout

def test_fails(kdriver_target):
    leave(kdriver_target, "the first")
    assert False

def test_fails_too(kdriver_target):
    assert left(kdriver_target) == b"", "the same guest"
    leave(kdriver_target, "the second")
    assert False

def test_passes_behind_them(kdriver_target):
    assert left(kdriver_target) == b"the second", "not the same guest"
"""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a run told that is over, and the machine that it kept."""

    lines: list[str]
    code: int
    machine: KeptVm


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    libvirt_uri: str,
    winevm_image: DiskImage,
    vm_cache: Path,
) -> Iterator[dict[str, Kept]]:
    """The same tests by pytest alone, with one failure only, and by pytest-xdist; at the same time."""
    chosen = {
        "alone": ["-k", "not too and not them", "test_it.py"],
        "xdist": ["-n1", "test_it.py"],
    }
    processes = {}
    for name, options in chosen.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "kdriver.toml").write_text(
            f'[targets.{name}]\nkind = "libvirt"\nimage = "winevm"\nuri = "{libvirt_uri}"\n'
        )
        (folder / "test_it.py").write_text(TESTS)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", "-v"]
        processes[name] = subprocess.Popen(
            [*command, f"--kdriver-vm={name}", "--kdriver-keep", *options],
            cwd=folder,
            env={**os.environ, "KDRIVER_CACHE": str(vm_cache)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDRIVER_CACHE", str(vm_cache))
        try:
            told = {
                name: process.communicate(timeout=600)[0] for name, process in processes.items()
            }
            assert sorted(vm.target for vm in kept_vms()) == sorted(chosen), "".join(told.values())
            yield {
                name: Kept(told[name].splitlines(), process.returncode, find_kept(name))
                for name, process in processes.items()
            }
        finally:
            for process in processes.values():
                process.kill()
                process.wait()
            for vm in kept_vms():
                vm.remove()


@pytest.fixture(params=["alone", "xdist"])
def kept(request: pytest.FixtureRequest, runs: dict[str, Kept], own_cache: Path) -> Kept:
    return runs[request.param]


def test_the_summary_says_how_to_reach_it(kept: Kept) -> None:
    begin = next(n for n, line in enumerate(kept.lines) if re.fullmatch(r"=+ kept =+", line))
    name = kept.machine.domain
    assert kept.lines[begin + 1] == f"{name} is kept:"
    told = [line.strip() for line in kept.lines[begin + 2 : begin + 7]]
    assert told == [
        f"kdriver vm shell {name}",
        f"kdriver vm screenshot {name}",
        f"virsh --connect '{kept.machine.uri}' dominfo {name}",
        f"tail -f {kept.machine.console}",
        f"kdriver vm stop {name}   ends it",
    ]
    assert sum("is kept:" in line for line in kept.lines) == 1


def test_only_the_first_failure_s_is_kept_and_the_next_test_has_another_guest(
    runs: dict[str, Kept],
) -> None:
    run = runs["xdist"]
    assert run.code == 1
    verdicts = [
        match[1] for line in run.lines if (match := re.search(r"\b(PASSED|FAILED) test_it", line))
    ]
    assert verdicts[:3] == ["FAILED", "FAILED", "PASSED"], "\n".join(run.lines)


def test_it_is_as_the_test_left_it(kept: Kept, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["vm", "run", kept.machine.target, "cmd", "/c", r"type C:\left.txt"]) == 0
    assert capfdbinary.readouterr().out == b"the first"


def test_another_run_and_gc_leave_it_alone(kept: Kept) -> None:
    assert main(["gc"]) == 0
    assert kept.machine.state() == "running"


def test_its_console_can_be_read(kept: Kept) -> None:
    says = ["Z:\\bin\\sh", "-c", "echo hello, console >/dev/ttyS0"]
    assert (
        main(["vm", "run", kept.machine.target, "--", *says]) == 1
    )  # of a Unix program nothing is told
    deadline = time.monotonic() + 30
    while "hello, console" not in Path(kept.machine.console).read_text(errors="replace"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_stop_removes_all_of_it(kept: Kept, hypervisor: Hypervisor) -> None:
    machine = kept.machine
    sockets = Path(machine.address.path).parent  # type: ignore[union-attr]
    assert sockets.stat().st_mode & 0o777 == 0o700
    assert (machine.folder / "vm.json").stat().st_mode & 0o777 == 0o600
    assert main(["vm", "stop", machine.domain]) == 0
    assert machine.domain not in {d.name() for d in hypervisor.connection.listAllDomains()}
    assert not machine.folder.exists()
    assert not sockets.exists()
