"""What the tests on real guests share: a libvirt of their own, and a cache that its user can enter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.paths import cache_directory
from pytest_kdriver.targets.disk_images import DiskImage, Phase, ensure, read_image
from pytest_kdriver.targets.leftovers import REMOVERS, SOCKETS
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.libvirt.machine import LibvirtMachine
from pytest_kdriver.targets.machine_target import MachineTarget
from pytest_kdriver.targets.recipe import find_recipe
from pytest_kdriver.targets.runs import Run, collect_garbage, remove_tree
from tests.conftest import new_project
from tests.vm.daemon import PrivateLibvirt, daemon_user

MANIFEST = Path(__file__).parents[2] / "drivers" / "Cargo.toml"


@pytest.fixture(scope="session")
def private_libvirt() -> Iterator[PrivateLibvirt]:
    """A libvirt that ends, with all of its guests, when the tests do."""
    daemon = PrivateLibvirt()
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.stop()


@pytest.fixture(scope="session")
def libvirt_uri(private_libvirt: PrivateLibvirt) -> str:
    return private_libvirt.uri


@pytest.fixture
def hypervisor(libvirt_uri: str) -> Iterator[Hypervisor]:
    hypervisor = Hypervisor.open(libvirt_uri)
    yield hypervisor
    hypervisor.close()


@pytest.fixture(scope="session")
def vm_cache() -> Iterator[Path]:
    """A cache whose runs are these tests' alone, in a folder that the guests' user can enter.

    What takes long to make is the real cache's, or, for what guests read, the test user's.
    """
    real = cache_directory()
    home = real if os.geteuid() else Path(daemon_user().pw_dir)
    _remove_leftovers(home)
    own = home / f"tests-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    own.mkdir(parents=True)
    kept_where = dict.fromkeys(("wine", "programs", "hosts"), real)
    kept_where |= dict.fromkeys(("disks", "booted"), home)
    for name, kept in kept_where.items():
        (kept / name).mkdir(exist_ok=True, parents=True)
        (own / name).symlink_to(kept / name)
    yield own
    remove_tree(own)


def _remove_leftovers(home: Path) -> None:
    """Remove what killed test runs left; their libvirt is gone already, see ``PrivateLibvirt``."""
    for folder in home.glob("tests-[0-9]*"):
        pid = folder.name.split("-")[1]
        if pid != str(os.getpid()) and Path("/proc", pid).exists():
            continue
        for line in Path("/proc/self/mounts").read_text().splitlines():
            if (mounted := line.split()[1]).startswith(f"{folder}/"):
                subprocess.run(["umount", "--lazy", mounted], check=True)
        with pytest.MonkeyPatch.context() as patch, suppress(OSError):  # else the next does it
            patch.setenv("KDRIVER_CACHE", str(folder))
            collect_garbage(REMOVERS)
            remove_tree(folder)


@pytest.fixture(scope="session")
def winevm_image(vm_cache: Path) -> DiskImage:
    """The disk image, made in the real cache, and in ``vm_cache`` by hard links where that is another."""
    run = Run()
    try:
        image = ensure(find_recipe("winevm", Path(__file__).parents[2]), run, _tell)
    finally:
        run.close()
    shared = vm_cache / "disks" / image.folder.name
    with FileLock(shared.with_name("shared.lock")):  # this folder is every worker's
        if not shared.exists():
            unfinished = shared.with_name(f".{shared.name}-{os.getpid()}")
            shutil.copytree(image.folder, unfinished, copy_function=_link)
            unfinished.rename(shared)
    return read_image(shared)


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # another file system
        shutil.copy2(source, destination)


def _tell(phase: Phase) -> None:
    print(f"{phase.elapsed:4.0f} s: {phase.name}", file=sys.__stderr__, flush=True)


@pytest.fixture(scope="session")
def winevm_config(winevm_image: DiskImage, libvirt_uri: str) -> TargetConfig:
    return TargetConfig(name="winevm", kind="libvirt", vm={"image": "winevm", "uri": libvirt_uri})


@pytest.fixture(scope="session")
def shared_winevm(winevm_config: TargetConfig, vm_cache: Path) -> Iterator[MachineTarget]:
    """One guest for all tests that leave it as it was, or have it put back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDRIVER_CACHE", str(vm_cache))
        target = MachineTarget(winevm_config.name, LibvirtMachine(winevm_config))
        try:
            target.start()
            yield target
        finally:
            target.close()


@pytest.fixture
def winevm(shared_winevm: MachineTarget, own_cache: Path) -> MachineTarget:
    """It, as it was when it had started."""
    shared_winevm.revert()
    return shared_winevm


@pytest.fixture
def put_back(winevm: MachineTarget) -> Callable[[], None]:
    """Put it back, and see that it is the same guest: where that fails a target takes another."""

    def put_back() -> None:
        machine = winevm.machine
        assert isinstance(machine, LibvirtMachine)
        before = machine._running()
        winevm.revert()
        assert machine._running() is before

    return put_back


@pytest.fixture
def project(
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    own_cache: Path,
    winevm_image: DiskImage,
) -> pytest.Pytester:
    """An empty project of a user's."""
    return new_project(monkeypatch, request)


@pytest.fixture
def configure(project: pytest.Pytester, libvirt_uri: str) -> Callable[..., None]:
    """Write its config: this project's drivers, and winevm under the tests' libvirt, with more settings."""

    def configure(*settings: str) -> None:
        (project.path / "kdriver.toml").write_text(
            f'manifest = "{MANIFEST}"\n[targets.winevm]\nuri = "{libvirt_uri}"\n'
            + "\n".join(settings)
        )

    return configure


@pytest.fixture
def own_cache(vm_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, in the environment: what this test starts leaves its runs there, and nothing else does."""
    monkeypatch.setenv("KDRIVER_CACHE", str(vm_cache))
    return vm_cache


@pytest.fixture
def there(hypervisor: Hypervisor, vm_cache: Path) -> Callable[[], set[str]]:
    """What there is of machines: domains' names, folders of runs, and of sockets that they recorded."""
    sockets: set[str] = set()

    def there() -> set[str]:
        domains = {domain.name() for domain in hypervisor.connection.listAllDomains()}
        runs = set((vm_cache / "runs").glob("*"))
        for run in runs:
            with suppress(OSError):
                resources = (run / "resources").read_text().splitlines()
                sockets.update(
                    r["path"] for r in map(json.loads, resources) if r["kind"] == SOCKETS
                )
        return domains | set(map(str, runs)) | {path for path in sockets if Path(path).exists()}

    return there


@pytest.fixture
def guest_folder(vm_cache: Path) -> Iterator[Path]:
    """A folder for a guest's disks, which its user can enter."""
    folder = vm_cache / f"guest-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    folder.chmod(0o755)
    yield folder
    remove_tree(folder)
