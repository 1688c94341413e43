"""The disk that clones are linked to, where no hypervisor is needed to see it."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pytest_kdriver.targets.libvirt.base_disk import BaseDisk

AT_ONCE = 16


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(1 << 20))
    return path


def test_several_may_hash_it_at_once(disk: Path) -> None:
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for _ in range(20):
            disk.write_bytes(os.urandom(1 << 20))
            hashes = {found.sha256 for found in threads.map(BaseDisk, [disk] * AT_ONCE)}
            assert hashes == {hashlib.sha256(disk.read_bytes()).hexdigest()}
    kept = disk.parent / "cache" / "disk-hashes"
    assert len(list(kept.iterdir())) == 1  # and nothing unfinished


def test_a_hash_is_not_taken_twice(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = BaseDisk(disk).sha256
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert BaseDisk(disk).sha256 == first
