"""An installed Windows from its agent's first answer to its disk image, with winevm in Windows' place.

What is Windows' own is stood in for: Setup, by what it would leave on the disk, put there beforehand; the
CD, which no Linux kernel is loaded from here; ``shutdown.exe``; and of the settings only those are made that
are in a registry. All else is what a user's build does.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from pytest_kdriver.errors import TargetError
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.guest.links.serial import SerialLink
from pytest_kdriver.targets import disk_images
from pytest_kdriver.targets.disk_images import DiskImage, Phase
from pytest_kdriver.targets.leftovers import REMOVERS
from pytest_kdriver.targets.libvirt.base_disk import describe_disk, make_overlay
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.libvirt.domain import Domain
from pytest_kdriver.targets.libvirt.domain_xml import DomainSpec
from pytest_kdriver.targets.recipe import Recipe, read_recipe
from pytest_kdriver.targets.runs import Run, remove_tree
from pytest_kdriver.targets.windows import images, installation, settings
from pytest_kdriver.targets.windows.answer_file import Secrets
from pytest_kdriver.targets.windows.images import Source, build_image
from pytest_kdriver.targets.windows.installation import Installation, Limits
from pytest_kdriver.targets.windows.kinds import Boot, Setting, Values
from pytest_kdriver.targets.windows.passwords import find_password, passwords_directory
from pytest_kdriver.targets.windows.scrubbing import patterns

Build = Callable[[Recipe, list[str]], DiskImage]

PASSWORD = "Pw-1.unheard_of=24+chars"
DRIVE = "/var/lib/kdriver/prefix/drive_c"
STATE = r"""
[Software\\Microsoft\\Windows\\CurrentVersion\\Setup\\State] 1700000000
"ImageState"="IMAGE_STATE_COMPLETE"
"""
SHUTDOWN = """#!/bin/sh
case $1 in /r) exec systemctl reboot ;; /s) exec systemctl poweroff ;; esac
"""
ALL_SETTINGS = settings.settings
RECIPE = """[windows]
release = "w10"
index = 1
[target]
memory = 1024
"""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def run(own_cache: Path) -> Iterator[Run]:
    run = Run()
    yield run
    run.close(REMOVERS)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    folder = tmp_path / "vm/images/standin"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(RECIPE)
    return read_recipe(folder)


@pytest.fixture
def source(guest_folder: Path, libvirt_uri: str) -> Source:
    """A CD that is not read, and one like virtio-win's."""
    if shutil.which("genisoimage") is None or shutil.which("debugfs") is None:
        pytest.skip("needs genisoimage and debugfs (Debian: genisoimage, e2fsprogs)")
    for driver in ("viostor", "vioserial", "NetKVM"):
        place = guest_folder / "virtio" / driver / "w10/amd64"
        place.mkdir(parents=True)
        (place / f"{driver}.inf").write_text("a driver")
    iso = guest_folder / "virtio-win.iso"
    command = ["genisoimage", "-quiet", "-J", "-r", "-o", str(iso), str(guest_folder / "virtio")]
    subprocess.run(command, check=True)
    windows = guest_folder / "windows.iso"
    windows.write_bytes(bytes(1 << 20))
    return Source(iso=windows, virtio_win=iso, uri=libvirt_uri)


@pytest.fixture
def installed(winevm_image: DiskImage, tmp_path: Path) -> Path:
    """winevm's disk, as Setup would have left a Windows': with the password where it keeps it."""
    raw = tmp_path / "installed.raw"
    convert = ["qemu-img", "convert", "-O", "raw"]
    subprocess.run([*convert, str(winevm_image.disk), str(raw)], check=True)

    def debugfs(*commands: str) -> None:
        script = tmp_path / "commands"
        script.write_text("\n".join(commands) + "\n")
        done = subprocess.run(
            ["debugfs", "-w", "-f", str(script), str(raw)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "not found" not in done.stderr, done.stderr

    registry = tmp_path / "system.reg"
    debugfs(f"dump /var/lib/kdriver/prefix/system.reg {registry}")
    with registry.open("a") as file:
        file.write(STATE)
    answer = tmp_path / "unattend.xml"
    answer.write_text(f"<Value>{PASSWORD}</Value>" * 100)
    log = tmp_path / "setupact.log"
    log.write_bytes(b"a line\r\n" + PASSWORD.encode("utf-16-le"))
    shutdown = tmp_path / "shutdown.exe"
    shutdown.write_text(SHUTDOWN)
    debugfs(
        "rm /var/lib/kdriver/prefix/system.reg",
        f"write {registry} /var/lib/kdriver/prefix/system.reg",
        f"rm {DRIVE}/windows/system32/shutdown.exe",
        f"write {shutdown} {DRIVE}/windows/system32/shutdown.exe",
        f"set_inode_field {DRIVE}/windows/system32/shutdown.exe mode 0100755",
        f"mkdir {DRIVE}/windows/Panther",
        f"write {answer} {DRIVE}/windows/Panther/unattend.xml",
        f"write {log} {DRIVE}/windows/Panther/setupact.log",
        f"write {answer} {DRIVE}/deleted.xml",
        f"rm {DRIVE}/deleted.xml",
    )
    assert raw.read_bytes().count(PASSWORD.encode()) >= 200
    return raw


@pytest.fixture
def build(
    monkeypatch: pytest.MonkeyPatch,
    winevm_image: DiskImage,
    installed: Path,
    source: Source,
    run: Run,
) -> Iterator[Build]:
    """Builds an image of a recipe, telling the phases."""
    specify = Installation._specify

    def with_kernel(self: Installation, iso: Path, sockets: Path) -> DomainSpec:
        target = winevm_image.target
        return dataclasses.replace(
            specify(self, iso, sockets),
            kernel=Path(str(target["kernel"])),
            initrd=Path(str(target["initrd"])),
            cmdline=str(target["cmdline"]),
        )

    def with_disk(command: str, *arguments: str) -> str:
        assert command == "create"
        *_, disk, _ = arguments
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(installed), disk], check=True)
        return ""

    monkeypatch.setattr(Installation, "_specify", with_kernel)
    monkeypatch.setattr(installation, "qemu_img", with_disk)
    monkeypatch.setattr(installation, "LOADED", 0)
    monkeypatch.setattr(images, "new_password", lambda: PASSWORD)

    def build(recipe: Recipe, phases: list[str]) -> DiskImage:
        def note(phase: Phase) -> None:
            phases.append(phase.name)

        return build_image(recipe, source, run, note, limits=Limits(whole=600.0))

    yield build
    disk_images.remove("standin")


def in_the_registry(wanted: settings.Wanted) -> tuple[Setting, ...]:
    return tuple(setting for setting in ALL_SETTINGS(wanted) if isinstance(setting, Values))


def of_the_boot(wanted: settings.Wanted) -> tuple[Setting, ...]:
    return tuple(setting for setting in ALL_SETTINGS(wanted) if isinstance(setting, Boot))


def test_what_answers_becomes_an_image_that_runs_start_from(
    recipe: Recipe,
    build: Build,
    winevm_image: DiskImage,
    start_again: Callable[[DiskImage], AbstractContextManager[Agent]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settings, "settings", in_the_registry)
    phases: list[str] = []
    image = build(recipe, phases)
    assert phases == [
        "hashing windows.iso",
        "starting from the CD",
        "loading Windows Setup",
        "Windows answers",
        "setting it up",
        "restarting it",
        "restart 1",
        "Windows answers",
        "removing what Setup kept of the password",
        "shutting it down",
        "looking through its disk for the password",
        "compressing its disk",
        "hashing its disk",
    ]
    (found,) = [i for i in disk_images.list_images() if i.name == recipe.name]
    assert found == image
    assert image.is_unchanged
    assert image.target["agent_port"] == "virtio:kdriver.agent"
    assert image.target["bus"] == "virtio"
    assert image.target["winrm_user"] == "kdriver"
    assert image.target["winrm_ca"] == image.folder / "winrm.pem"
    assert find_password(image.folder.name) == PASSWORD
    assert (
        find_password(image.folder.name)
        == Path(str(image.target["winrm_password_file"])).read_text()
    )

    described = describe_disk(image.disk)
    assert "'compression-type': 'zstd'" in str(described["format-specific"])
    assert image.size < winevm_image.size
    content = raw_content(image.disk)
    assert [p for p in patterns(Secrets(password=PASSWORD)) if p in content] == []

    with start_again(image) as agent:
        wanted = settings.Wanted(agent_service="kdagent")
        assert [r for r in settings.read_settings(agent, wanted) if not r.in_force] == []
        assert agent.hash("C:\\Windows\\Panther\\unattend.xml") is None
        assert agent.hash("C:\\Windows\\Panther\\setupact.log") is None


def raw_content(disk: Path) -> bytes:
    with tempfile.TemporaryDirectory(dir=disk.parents[1]) as folder:
        raw = Path(folder, "disk.raw")
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(disk), str(raw)], check=True)
        return raw.read_bytes()


@pytest.fixture
def start_again(
    winevm_image: DiskImage, hypervisor: Hypervisor, guest_folder: Path
) -> Callable[[DiskImage], AbstractContextManager[Agent]]:
    """Starts a clone of an image: its agent, for a while."""

    @contextmanager
    def start(image: DiskImage) -> Iterator[Agent]:
        base, overlay = guest_folder / "base.qcow2", guest_folder / "clone.qcow2"
        shutil.copyfile(image.disk, base)
        make_overlay(base, overlay)
        for file in (base, overlay):
            hypervisor.hand_over(file)
        sockets = hypervisor.make_socket_folder()
        spec = DomainSpec(
            name=f"kdriver-standin-{guest_folder.name[-8:]}",
            run="tests",
            owner_pid=os.getpid(),
            accelerator="tcg",
            emulator=hypervisor.emulator,
            disk=overlay,
            kernel=Path(str(winevm_image.target["kernel"])),
            initrd=Path(str(winevm_image.target["initrd"])),
            cmdline=str(winevm_image.target["cmdline"]),
            nic="none",
            ports=(("virtio:kdriver.agent", sockets / "agent"),),
        )
        domain = Domain(hypervisor, spec)
        domain.define()
        try:
            domain.start()
            with Agent.connect(SerialLink(sockets / "agent", timeout=120), timeout=120) as agent:
                yield agent
        finally:
            domain.destroy()
            domain.undefine()
            remove_tree(sockets)

    return start


def test_a_setting_that_can_t_be_made_fails_the_build_by_its_name(
    recipe: Recipe, build: Build, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wine has no bcdedit."""
    monkeypatch.setattr(settings, "settings", of_the_boot)
    with pytest.raises(TargetError, match=r"test signing can't be set: .*bcdedit") as failure:
        build(recipe, [])
    assert PASSWORD not in str(failure.value)
    assert recipe.name not in {image.name for image in disk_images.list_images()}
    assert not list(run.path.glob("installation*"))
    assert not list(passwords_directory().iterdir())
