"""winevm over WinRM: tests/drivers as a user runs them, sealed by NTLM and by TLS, both at the same time.

What servers may do to a link is in tests/unit/test_winrm_link.py.
"""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pytest_kdriver.cli import main
from pytest_kdriver.guest.links.winrm import WinrmConfig, WinrmLink
from pytest_kdriver.targets.disk_images import DiskImage
from pytest_kdriver.targets.libvirt.address import WinrmAddress
from pytest_kdriver.targets.libvirt.kept import KeptVm, find_kept, kept_vms
from pytest_kdriver.targets.machine_target import MachineTarget
from tests.vm.conftest import MANIFEST
from tests.vm.daemon import PrivateLibvirt

DRIVERS = Path(__file__).parents[1] / "drivers"
TIMEOUT = 60.0
WAYS = {"sealed": "winrm_https = false", "tls": "winrm_https = true"}

MORE_TESTS = {
    "test_a.py": """
def test_leaves_a_file(kdriver_target):
    kdriver_target.put(b"left", r"C:\\left.txt")
""",
    "test_b.py": """
import pytest
from pytest_kdriver import KdriverError

def test_is_put_back(kdriver_target):
    assert kdriver_target.run(["cmd", "/c", r"type C:\\left.txt"]).stdout == b""

def test_hears_that_the_server_ended(kdriver_target):
    kill = "systemctl kill --signal=KILL --kill-who=main kdwsman.service"
    with pytest.raises(KdriverError, match="lost"):
        kdriver_target.run([r"Z:\\bin\\sh", "-c", kill])
        while True:
            kdriver_target.run(["cmd", "/c", "ver"])

def test_has_a_guest_behind_that(kdriver_target):
    assert kdriver_target.run(["cmd", "/c", "echo there"]).stdout.strip() == b"there"
""",
    "test_z.py": """
import time
from pathlib import Path

def test_fails(kdriver_target):
    kdriver_target.put(b"left", r"C:\\left.txt")
    Path("asked").touch()
    while not Path("looked").exists():
        time.sleep(0.1)
    assert False
""",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run that is over. ``exposed`` is where the password was found while it went on."""

    folder: Path
    machine: KeptVm
    exposed: dict[str, bool]

    def failed(self) -> tuple[int, list[str]]:
        """How many tests were run, and which of them failed."""
        cases = list(ElementTree.parse(self.folder / "junit.xml").iter("testcase"))
        bad = [case for case in cases if {child.tag for child in case} & {"failure", "error"}]
        return len(cases), [str(case.get("name")).partition("[")[0] for case in bad]


def password_of(image: DiskImage) -> bytes:
    return (image.folder / "winrm_password").read_bytes().strip()


def others_can_read(path: Path) -> bool:
    return bool(path.stat().st_mode & 0o004) and all(
        parent.stat().st_mode & 0o001 for parent in path.resolve().parents
    )


def files_with(word: bytes, *folders: Path) -> dict[str, bool]:
    """The files below that have ``word`` in them, and whether other users can read each."""
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {str(path): others_can_read(path) for path in paths if _has(path, word)}


def _has(path: Path, word: bytes) -> bool:
    try:
        if not path.is_file() or not path.stat().st_size:
            return False
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return text.find(word) >= 0
    except FileNotFoundError:  # it was removed meanwhile
        return False


def processes_with(word: bytes) -> list[str]:
    """What shows ``word`` in its command line or its environment."""
    shown = [
        process / name
        for process in Path("/proc").glob("[0-9]*")
        for name in ("cmdline", "environ")
    ]
    return [str(path) for path in shown if word in _read(path)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended meanwhile
        return b""


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    private_libvirt: PrivateLibvirt,
    winevm_image: DiskImage,
    vm_cache: Path,
) -> Iterator[dict[str, Run]]:
    folders = {way: tmp_path_factory.mktemp(way) for way in WAYS}
    processes = {}
    for way, folder in folders.items():
        (folder / "kdriver.toml").write_text(
            f'manifest = "{MANIFEST}"\n[targets.{way}]\nkind = "libvirt"\nimage = "winevm"\n'
            f'uri = "{private_libvirt.uri}"\nagent = "winrm"\n{WAYS[way]}\n'
        )
        for path in DRIVERS.glob("test_*.py"):
            shutil.copy(path, folder)
        for name, text in MORE_TESTS.items():
            (folder / name).write_text(text)
        with (folder / "output").open("wb") as output:
            processes[way] = subprocess.Popen(
                [
                    *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error"),
                    *("--showlocals", "--junitxml=junit.xml", "--kdriver-artifacts=artifacts"),
                    *(f"--kdriver-vm={way}", "--kdriver-isolation=module", "--kdriver-keep"),
                ],
                cwd=folder,
                env={**os.environ, "KDRIVER_CACHE": str(vm_cache)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDRIVER_CACHE", str(vm_cache))
        try:
            for way, folder in folders.items():
                while not (folder / "asked").exists():
                    assert processes[way].poll() is None, (folder / "output").read_text()
                    time.sleep(0.1)
            password = password_of(winevm_image)
            exposed = dict.fromkeys(processes_with(password), True)
            exposed |= files_with(
                password,
                *(winevm_image.folder, vm_cache, private_libvirt.folder, *folders.values()),
            )
            for way, folder in folders.items():
                (folder / "looked").touch()
                processes[way].wait(TIMEOUT)
            yield {
                way: Run(folder=folder, machine=find_kept(way), exposed=exposed)
                for way, folder in folders.items()
            }
        finally:
            for process in processes.values():
                process.kill()
                process.wait()
            for vm in kept_vms():
                vm.remove()


@pytest.fixture(params=WAYS)
def run(request: pytest.FixtureRequest, runs: dict[str, Run], own_cache: Path) -> Run:
    return runs[request.param]


def test_all_pass_but_the_one_that_fails(run: Run) -> None:
    count, failed = run.failed()
    assert failed == ["test_fails"], (run.folder / "output").read_text()
    assert count >= 25


def test_what_there_is_of_the_one_that_fails_is_kept(run: Run) -> None:
    kept = list((run.folder / "artifacts").glob("*test_fails*"))
    of = {path.suffix: path.read_bytes() for path in kept}
    assert of.keys() == {".png", ".xml"}
    assert of[".png"].startswith(b"\x89PNG\r\n")
    assert ElementTree.fromstring(of[".xml"]).findtext("name", "").startswith("kdriver-")


def test_it_is_put_back_in_the_same_guest(run: Run) -> None:
    assert run.machine.domain.endswith("-1")
    assert "put back by QEMU's snapshot-load" in (run.folder / "output").read_text()


def test_a_machine_that_was_kept_is_reached(
    run: Run, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main(["vm", "run", run.machine.domain, "cmd", "/c", r"type C:\left.txt"]) == 0
    assert capfdbinary.readouterr().out == b"left"


class TestThePassword:
    def test_is_where_only_its_owner_reads_it(
        self, runs: dict[str, Run], winevm_image: DiskImage, private_libvirt: PrivateLibvirt
    ) -> None:
        """And in the memory of guests, which is saved to their disks."""
        exposed = runs["tls"].exposed
        assert str(winevm_image.folder / "winrm_password") in exposed, "it was not looked for"
        assert processes_with(os.fsencode(private_libvirt.folder)), "processes were not looked at"
        assert {Path(path).name for path in exposed} == {"winrm_password", "disk.qcow2"}, exposed
        assert [path for path, by_others in exposed.items() if by_others] == []

    def test_is_not_in_what_a_run_leaves(self, run: Run, winevm_image: DiskImage) -> None:
        assert {"output", "junit.xml", "artifacts"} <= {path.name for path in run.folder.iterdir()}
        found = files_with(password_of(winevm_image), run.folder, run.machine.folder)
        assert {Path(path).name for path in found} <= {"disk.qcow2"}

    def test_is_in_one_file_of_the_guest_which_is_root_s(
        self, run: Run, winevm_image: DiskImage
    ) -> None:
        users = "/opt/kdriver/wsman/users"
        places = "/etc /opt /root /run /tmp /usr/local /var/log /proc/[0-9]*/cmdline /proc/[0-9]*/environ"
        search = f"cut -d: -f2 {users} | grep -rlsF -f - {places}; stat -c %a:%U {users}"
        assert said(run, winevm_image, search).split() == [users, "600:root"]


def test_how_the_host_reaches_its_packages_is_not_told_to_the_guest(
    runs: dict[str, Run], winevm_image: DiskImage, own_cache: Path
) -> None:
    search = "grep -rlsE 'PIP_|index-url|find-links' /etc /opt /root /usr/local"
    notes = "find /opt -name '*.dist-info' -o -name pip.conf"
    assert said(runs["tls"], winevm_image, f"{search}; {notes}; echo looked") == "looked\n"


def said(run: Run, image: DiskImage, command: str) -> str:
    """What a shell of the guest says."""
    address = run.machine.address
    assert isinstance(address, WinrmAddress)
    assert address.ca is not None
    config = WinrmConfig(
        host="127.0.0.1",
        port=address.port,
        user=address.user,
        password=password_of(image).decode(),
        https=address.https,
        ca=Path(address.ca),
    )
    link = WinrmLink(config, command, timeout=TIMEOUT)
    try:
        return b"".join(iter(link.receive, b"")).decode()
    finally:
        link.close()


def test_who_goes_another_way_does_not_wait_for_the_server(winevm: MachineTarget) -> None:
    ask = "systemctl is-active kdwsman.socket kdwsman.service"
    script = f"{ask} >/tmp/states.new; mv /tmp/states.new /tmp/states"
    winevm.agent.run([r"Z:\bin\sh", "-c", script])
    while winevm.agent.hash(r"Z:\tmp\states") is None:  # Wine tells no end of Unix programs
        time.sleep(0.05)
    assert winevm.agent.get(r"Z:\tmp\states").split() == [b"active", b"inactive"]
