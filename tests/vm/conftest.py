"""What the tests on real guests share: a libvirt of their own, and a cache that its user can enter."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_kdriver.paths import cache_directory
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.runs import remove_tree
from tests.vm.daemon import PrivateLibvirt, daemon_user


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
    own = home / f"tests-{os.getpid()}"
    own.mkdir(parents=True)
    for name, kept in (("wine", real), ("agent", real), ("hosts", real), ("disks", home)):
        (kept / name).mkdir(exist_ok=True, parents=True)
        (own / name).symlink_to(kept / name)
    yield own
    remove_tree(own)


@pytest.fixture
def own_cache(vm_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, in the environment: what this test starts leaves its runs there, and nothing else does."""
    monkeypatch.setenv("KDRIVER_CACHE", str(vm_cache))
    return vm_cache


@pytest.fixture
def guest_folder(vm_cache: Path) -> Iterator[Path]:
    """A folder for a guest's disks, which its user can enter."""
    folder = vm_cache / f"guest-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    folder.chmod(0o755)
    yield folder
    remove_tree(folder)
