"""An installed Windows from its agent's first answer to its disk image, with winevm in Windows' place.

What is Windows' own is stood in for: Setup, by what it would leave on the disk, put there beforehand; the
CD, which no Linux kernel is loaded from here; ``shutdown.exe``; and of the settings only those are made that
are in a registry. All else is what a user's build does.
"""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets import disk_images
from pytest_kdriver.targets.disk_images import DiskImage, Phase
from pytest_kdriver.targets.leftovers import REMOVERS
from pytest_kdriver.targets.libvirt.base_disk import describe_disk
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.libvirt.domain_xml import DomainSpec
from pytest_kdriver.targets.recipe import Recipe, read_recipe
from pytest_kdriver.targets.runs import Run
from pytest_kdriver.targets.windows import images, installation, settings
from pytest_kdriver.targets.windows.answer_file import Secrets
from pytest_kdriver.targets.windows.images import Source, build_image
from pytest_kdriver.targets.windows.installation import Installation, Limits
from pytest_kdriver.targets.windows.passwords import find_password, passwords_directory
from tests.vm.standin import (
    DRIVE,
    IN_PLACE_OF_THE_DEBUGGER,
    count_on_disk,
    debugfs,
    in_the_registry,
    of_the_boot,
    prepare_disk,
    start_again,
    write_virtio_cd,
)

Build = Callable[[Recipe, list[str]], DiskImage]

PASSWORD = "Pw-1.unheard_of=24+chars"
RECIPE = """[windows]
release = "w10"
index = 1
[target]
kernel_log = "kd"
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
    windows = guest_folder / "windows.iso"
    windows.write_bytes(bytes(1 << 20))
    return Source(iso=windows, virtio_win=write_virtio_cd(guest_folder, "w10"), uri=libvirt_uri)


@pytest.fixture
def installed(winevm_image: DiskImage, tmp_path: Path) -> Path:
    """winevm's disk, as Setup would have left a Windows': with the password where it keeps it."""
    raw = prepare_disk(winevm_image, tmp_path)
    answer = tmp_path / "unattend.xml"
    answer.write_text(f"<Value>{PASSWORD}</Value>" * 100)
    log = tmp_path / "setupact.log"
    log.write_bytes(b"a line\r\n" + PASSWORD.encode("utf-16-le"))
    debugfs(
        raw,
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


def test_what_answers_becomes_an_image_that_runs_start_from(  # noqa: PLR0917 -- fixtures
    recipe: Recipe,
    build: Build,
    winevm_image: DiskImage,
    hypervisor: Hypervisor,
    guest_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settings, "settings", in_the_registry)
    monkeypatch.setattr(settings, "DEBUGGER", IN_PLACE_OF_THE_DEBUGGER)
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
        "switching its kernel's debugger on",
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
    assert count_on_disk(image.disk, Secrets(password=PASSWORD)) == 0

    with start_again(image, winevm_image, hypervisor, guest_folder) as agent:
        wanted = settings.Wanted(agent_service="kdagent")
        assert [r for r in settings.read_settings(agent, wanted) if not r.in_force] == []
        assert agent.hash("C:\\Windows\\Panther\\unattend.xml") is None
        assert agent.hash("C:\\Windows\\Panther\\setupact.log") is None


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
