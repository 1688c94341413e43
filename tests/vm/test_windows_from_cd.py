"""The whole way of a Windows' image, from its CD to a run's clone, with a Linux in Windows' place.

The CD is GRUB's: it asks for a key, then starts an installer that puts winevm on the disk with what it finds
on the provisioning CD, and restarts. UEFI, a TPM and virtio's devices, as Windows 11 has them. Wine has not
all that Windows is set to: here only what is in a registry is.
"""

from __future__ import annotations

import gzip
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_kdriver.guest.executable import AGENT
from pytest_kdriver.targets import disk_images
from pytest_kdriver.targets.disk_images import DiskImage, Phase
from pytest_kdriver.targets.leftovers import REMOVERS
from pytest_kdriver.targets.libvirt.base_disk import describe_disk
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.recipe import Recipe, read_recipe
from pytest_kdriver.targets.runs import Run
from pytest_kdriver.targets.windows import settings
from pytest_kdriver.targets.windows.answer_file import Secrets, answer_file
from pytest_kdriver.targets.windows.images import Source, build_image, describe_target
from pytest_kdriver.targets.windows.installation import Limits
from pytest_kdriver.targets.windows.passwords import find_password, new_password
from tests.vm.grub_cd import make_cd
from tests.vm.standin import (
    DRIVE,
    IN_PLACE_OF_THE_DEBUGGER,
    count_on_disk,
    debugfs,
    in_the_registry,
    prepare_disk,
    start_again,
    write_virtio_cd,
)

BUSYBOX = Path("/bin/busybox")
MODULES = (
    *("virtio/virtio", "virtio/virtio_ring", "virtio/virtio_pci_legacy_dev"),
    *("virtio/virtio_pci_modern_dev", "virtio/virtio_pci", "block/virtio_blk"),
)
RECIPE = """[windows]
release = "w11"
index = 1
[target]
kernel_log = "kd"
firmware = "uefi"
tpm = true
memory = 2560
"""
ON_THE_DISK = """insmod ext2
if [ -f (hd0)/installed ]; then
    linux /vmlinuz {cmdline}
    initrd /initrd
    boot
fi"""
INSTALL = """insmod iso9660
insmod linux
insmod ahci
set root=ahci1
set prefix=(ahci1)/boot/grub
linux /vmlinuz console=ttyS0 rdinit=/installer panic=-1
initrd /small.cpio /disk.head /disk.gz /answer.head (ahci2)/autounattend.xml \\
    /agent.head (ahci2)/kdagent.exe /end.head
boot"""
"""UEFI shows GRUB the CD alone that was booted; its own driver shows all, and nothing else. What it loads is
one cpio archive in pieces, which it aligns as cpio does; what is on the provisioning CD has a known size."""

INSTALLER = f"""#!/busybox sh
for name in mkdir mount insmod zcat dd sync reboot cp touch umount sleep rm; do
    /busybox ln -s /busybox /$name
done
PATH=/
mkdir /dev /proc /disk
mount -t devtmpfs dev /dev
exec </dev/ttyS0 >/dev/ttyS0 2>&1
for module in {" ".join(name.partition("/")[2] for name in MODULES)}; do insmod /$module.ko; done
while [ ! -b /dev/vda ]; do sleep 1; done
echo installing
zcat /disk.gz | dd of=/dev/vda bs=1M conv=fsync
mount -t ext4 /dev/vda /disk
cp /autounattend.xml /disk{DRIVE}/windows/Panther/unattend.xml
cp /kdagent.exe /disk/opt/kdriver/kdagent.exe
cp /autounattend.xml /disk{DRIVE}/a-copy-that-setup-deleted
sync
rm /disk{DRIVE}/a-copy-that-setup-deleted
touch /disk/installed
umount /disk
echo installed
sync
reboot -f
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
def windows(winevm_image: DiskImage, recipe: Recipe, guest_folder: Path, tmp_path: Path) -> Path:
    """The CD."""
    if not BUSYBOX.exists() or b"/ld-linux" in BUSYBOX.read_bytes():
        pytest.skip("needs a static busybox (Debian: busybox-static)")
    raw = prepare_disk(winevm_image, tmp_path)
    with gzip.open(tmp_path / "disk.gz", "wb", compresslevel=1) as packed, raw.open("rb") as disk:
        shutil.copyfileobj(disk, packed, 1 << 20)
    (version,) = re.findall(r"/(\d[^/]*amd64)/", debugfs(raw, "ls -p /lib/modules"))
    small = {"installer": INSTALLER.encode(), "busybox": BUSYBOX.read_bytes()}
    for name in MODULES:
        path = tmp_path / f"{name.partition('/')[2]}.ko"
        debugfs(raw, f"dump /lib/modules/{version}/kernel/drivers/{name}.ko {path}")
        small[path.name] = path.read_bytes()
    raw.unlink()
    pieces = {
        "small.cpio": b"".join(
            cpio_head(name, len(content)) + content + bytes(-len(content) % 4)
            for name, content in small.items()
        ),
        "disk.head": cpio_head("disk.gz", (tmp_path / "disk.gz").stat().st_size),
        "answer.head": cpio_head("autounattend.xml", size_of_answer(recipe)),
        "agent.head": cpio_head("kdagent.exe", AGENT.executable().stat().st_size),
        "end.head": cpio_head("TRAILER!!!", 0),
    }
    for name, content in pieces.items():
        (tmp_path / name).write_bytes(content)
    shutil.copy(winevm_image.folder / "vmlinuz", tmp_path / "vmlinuz")
    shutil.copy(winevm_image.folder / "initrd.img", tmp_path / "initrd")
    names = (*pieces, "disk.gz", "vmlinuz", "initrd")
    return make_cd(
        guest_folder,
        INSTALL,
        first=ON_THE_DISK.format(cmdline=winevm_image.target["cmdline"]),
        files={name: tmp_path / name for name in names},
    )


def cpio_head(name: str, size: int) -> bytes:
    """What stands before a file's content in a cpio archive as Linux wants it ("newc")."""
    fields = (0, 0o100755, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4)


def size_of_answer(recipe: Recipe) -> int:
    """The answer file's: a password is as long as any other."""
    assert recipe.windows is not None
    _, machine = describe_target(recipe, virtio=True)
    return len(answer_file(recipe.windows, machine, Secrets(password=new_password())))


@pytest.fixture
def recipe(tmp_path: Path) -> Iterator[Recipe]:
    folder = tmp_path / "vm/images/standin11"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(RECIPE)
    yield read_recipe(folder)
    disk_images.remove("standin11")


@pytest.fixture
def source(windows: Path, guest_folder: Path, libvirt_uri: str) -> Source:
    return Source(iso=windows, virtio_win=write_virtio_cd(guest_folder, "w11"), uri=libvirt_uri)


@pytest.mark.soak
def test_what_is_on_the_cd_becomes_an_image_that_runs_start_from(  # noqa: PLR0917 -- fixtures
    recipe: Recipe,
    source: Source,
    run: Run,
    winevm_image: DiskImage,
    hypervisor: Hypervisor,
    guest_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settings, "settings", in_the_registry)
    monkeypatch.setattr(settings, "DEBUGGER", IN_PLACE_OF_THE_DEBUGGER)
    phases: list[str] = []
    consoles: list[str] = []

    def note(phase: Phase) -> None:
        phases.append(phase.name)
        print(f"{phase.elapsed:4.0f} s: {phase.name}")
        console = run.path / "installation/console.log"
        consoles.append(console.read_text(errors="replace") if console.exists() else "")

    try:
        image = build_image(recipe, source, run, note, limits=Limits(whole=840.0, stall=300.0))
    except BaseException:
        print(consoles[-1][-5000:])
        raise
    assert phases == [
        "hashing windows.iso",
        "starting from the CD",
        "loading Windows Setup",
        "copying Windows to the disk",
        "restart 1",
        "Windows answers",
        "setting it up",
        "restarting it",
        "restart 2",
        "Windows answers",
        "removing what Setup kept of the password",
        "switching its kernel's debugger on",
        "shutting it down",
        "looking through its disk for the password",
        "compressing its disk",
        "hashing its disk",
    ]
    assert disk_images.ensure(recipe, run, note) == image  # without the CD
    assert image.is_unchanged
    assert image.target["bus"] == "virtio"
    assert image.target["agent_port"] == "virtio:kdriver.agent"
    assert image.target["winrm_ca"] == image.folder / "winrm.pem"
    password = find_password(image.folder.name)
    assert password is not None
    assert Path(str(image.target["winrm_password_file"])).read_text() == password
    assert "'compression-type': 'zstd'" in str(describe_disk(image.disk)["format-specific"])
    assert count_on_disk(image.disk, Secrets(password=password)) == 0
    assert not [console for console in consoles if password in console]
    with start_again(image, winevm_image, hypervisor, guest_folder) as agent:
        wanted = settings.Wanted(agent_service="kdagent")
        assert [r for r in settings.read_settings(agent, wanted) if not r.in_force] == []
        assert agent.hash("C:\\Windows\\Panther\\unattend.xml") is None
        assert agent.get("Z:\\opt\\kdriver\\kdagent.exe") == AGENT.executable().read_bytes()
