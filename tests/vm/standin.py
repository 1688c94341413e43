"""winevm in the place of a Windows that was just installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.guest.links.serial import SerialLink
from pytest_kdriver.targets.disk_images import DiskImage
from pytest_kdriver.targets.libvirt.base_disk import make_overlay
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.libvirt.domain import Domain
from pytest_kdriver.targets.libvirt.domain_xml import DomainSpec
from pytest_kdriver.targets.runs import remove_tree
from pytest_kdriver.targets.windows import settings
from pytest_kdriver.targets.windows.answer_file import Secrets
from pytest_kdriver.targets.windows.kinds import Boot, Setting, Value, Values
from pytest_kdriver.targets.windows.scrubbing import scrub_disk

PREFIX = "/var/lib/kdriver/prefix"
DRIVE = f"{PREFIX}/drive_c"
STATE = r"""
[Software\\Microsoft\\Windows\\CurrentVersion\\Setup\\State] 1700000000
"ImageState"="IMAGE_STATE_COMPLETE"
"""
SHUTDOWN = """#!/bin/sh
case $1 in /r) exec systemctl reboot ;; /s) exec systemctl poweroff ;; esac
"""

_all_settings = settings.settings


def in_the_registry(wanted: settings.Wanted) -> tuple[Setting, ...]:
    """Of what a Windows is set to, all that a Wine can be."""
    return tuple(setting for setting in _all_settings(wanted) if isinstance(setting, Values))


IN_PLACE_OF_THE_DEBUGGER = Values("kernel debugger", (Value("SOFTWARE\\kdriver", "debug", 1),))
"""What switches the debugger on is bcdedit, which Wine has not."""


def of_the_boot(wanted: settings.Wanted) -> tuple[Setting, ...]:
    """What bcdedit sets, which Wine has not."""
    return tuple(setting for setting in _all_settings(wanted) if isinstance(setting, Boot))


def prepare_disk(winevm: DiskImage, folder: Path) -> Path:
    """winevm's disk, raw, as Setup would leave a Windows': complete, with a folder for its logs."""
    if shutil.which("debugfs") is None:
        pytest.skip("needs debugfs (Debian: e2fsprogs)")
    raw = folder / "installed.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(winevm.disk), str(raw)], check=True)
    registry, shutdown = folder / "system.reg", folder / "shutdown.exe"
    debugfs(raw, f"dump {PREFIX}/system.reg {registry}")
    with registry.open("a") as file:
        file.write(STATE)
    shutdown.write_text(SHUTDOWN)
    debugfs(
        raw,
        f"rm {PREFIX}/system.reg",
        f"write {registry} {PREFIX}/system.reg",
        f"rm {DRIVE}/windows/system32/shutdown.exe",
        f"write {shutdown} {DRIVE}/windows/system32/shutdown.exe",
        f"set_inode_field {DRIVE}/windows/system32/shutdown.exe mode 0100755",
        f"mkdir {DRIVE}/windows/Panther",
    )
    return raw


def debugfs(disk: Path, *commands: str) -> str:
    """Change the file system on a disk, or look at it; what debugfs says."""
    with tempfile.NamedTemporaryFile("w") as script:
        script.write("\n".join(commands) + "\n")
        script.flush()
        done = subprocess.run(
            ["debugfs", "-w", "-f", script.name, str(disk)],
            capture_output=True,
            text=True,
            check=True,
        )
    assert "not found" not in done.stderr, done.stderr
    return done.stdout


def write_virtio_cd(folder: Path, release: str) -> Path:
    """A CD like virtio-win's, with drivers for one Windows."""
    if shutil.which("genisoimage") is None:
        pytest.skip("needs genisoimage (Debian: genisoimage)")
    for driver in ("viostor", "vioserial", "NetKVM"):
        place = folder / "virtio" / driver / release / "amd64"
        place.mkdir(parents=True)
        (place / f"{driver}.inf").write_text("a driver")
    iso = folder / "virtio-win.iso"
    command = ["genisoimage", "-quiet", "-J", "-r", "-o", str(iso), str(folder / "virtio")]
    subprocess.run(command, check=True)
    return iso


def count_on_disk(disk: Path, secrets: Secrets) -> int:
    """How many times a secret is on a disk, in whatever has it or had it."""
    with tempfile.TemporaryDirectory(dir=disk.parents[1]) as folder:
        raw = Path(folder, "disk.raw")
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(disk), str(raw)], check=True)
        return scrub_disk(raw, secrets)


@contextmanager
def start_again(
    image: DiskImage, winevm: DiskImage, hypervisor: Hypervisor, folder: Path
) -> Iterator[Agent]:
    """Start a clone of an image, by winevm's kernel: its agent, for a while."""
    base, overlay = folder / "base.qcow2", folder / "clone.qcow2"
    shutil.copyfile(image.disk, base)
    make_overlay(base, overlay)
    for file in (base, overlay):
        hypervisor.hand_over(file)
    sockets = hypervisor.make_socket_folder()
    spec = DomainSpec(
        name=f"kdriver-standin-{folder.name[-8:]}",
        run="tests",
        owner_pid=os.getpid(),
        accelerator="tcg",
        emulator=hypervisor.emulator,
        disk=overlay,
        kernel=Path(str(winevm.target["kernel"])),
        initrd=Path(str(winevm.target["initrd"])),
        cmdline=str(winevm.target["cmdline"]),
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
