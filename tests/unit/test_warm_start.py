"""Which guests are kept, and for which machines."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.targets.libvirt import warm_start
from pytest_kdriver.targets.libvirt.domain_xml import DomainSpec
from pytest_kdriver.targets.libvirt.machine import LibvirtMachine
from pytest_kdriver.targets.libvirt.warm_start import KEPT, WarmStart


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "booted"


@pytest.fixture
def spec(tmp_path: Path) -> DomainSpec:
    for name in ("qemu", "kernel", "another"):
        (tmp_path / name).write_text(name)
    return DomainSpec(
        name="one",
        run="run",
        owner_pid=1,
        accelerator="tcg",
        emulator=tmp_path / "qemu",
        disk=tmp_path / "disk",
        kernel=tmp_path / "kernel",
        ports=(("virtio:kdriver.agent", tmp_path / "agent"),),
        console=tmp_path / "console",
    )


def test_a_run_of_its_own_makes_no_other_machine(spec: DomainSpec) -> None:
    other = replace(
        spec,
        name="two",
        run="another",
        owner_pid=2,
        disk=Path("/elsewhere/disk"),
        ports=(("virtio:kdriver.agent", Path("/elsewhere/agent")),),
        console=Path("/elsewhere/console"),
        forwards=(22,),
    )
    assert WarmStart(other, "a", "7.2").path == WarmStart(spec, "a", "7.2").path


@pytest.mark.parametrize(
    "change",
    [
        {"memory": 512},
        {"cpus": 2},
        {"cmdline": "quiet"},
        {"kernel": "another"},
        {"accelerator": "kvm"},
        {"ports": (("com2", Path("/agent")),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_machine_is_another(
    spec: DomainSpec, tmp_path: Path, change: dict[str, Any]
) -> None:
    if "kernel" in change:
        change = {"kernel": tmp_path / change["kernel"]}
    assert WarmStart(replace(spec, **change), "a", "7.2").path != WarmStart(spec, "a", "7.2").path


def test_another_disk_or_emulator_is_another(spec: DomainSpec) -> None:
    paths = [WarmStart(spec, "a", "7.2").path, WarmStart(spec, "b", "7.2").path]
    paths.append(WarmStart(spec, "a", "8.0").path)
    spec.emulator.write_text("a newer one")
    paths.append(WarmStart(spec, "a", "7.2").path)
    assert len(set(paths)) == len(paths)


def test_those_used_last_are_kept_for_nobody_else_to_read(
    spec: DomainSpec, tmp_path: Path, cache: Path
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"memory")
    starts = [WarmStart(spec, str(number), "7.2") for number in range(KEPT + 1)]
    for number, start in enumerate(starts):
        start.keep(disk, tmp_path)
        os.utime(start.path, (number, number))
    starts[-1].keep(disk, tmp_path)
    assert {path.name for path in cache.iterdir()} == {start.path.name for start in starts[1:]}
    assert {path.stat().st_mode & 0o777 for path in cache.iterdir()} == {0o600}
    assert cache.stat().st_mode & 0o777 == 0o700


def test_one_is_not_kept_where_there_is_little_room(
    spec: DomainSpec, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"memory")
    monkeypatch.setattr(warm_start, "ROOM", 1 << 50)
    WarmStart(spec, "a", "7.2").keep(disk, tmp_path)
    assert list(cache.iterdir()) == []


def test_a_copy_that_fails_leaves_nothing(spec: DomainSpec, tmp_path: Path, cache: Path) -> None:
    start = WarmStart(spec, "a", "7.2")
    disk, scratch = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()  # what cp does not copy
    scratch.mkdir()
    with pytest.raises(OSError, match="omitting directory"):
        start.keep(disk, scratch)
    assert [*cache.iterdir(), *scratch.iterdir()] == []
    assert not start.take(tmp_path / "overlay", tmp_path / "base")
    assert not (tmp_path / "overlay").exists()


@pytest.mark.parametrize(
    ("settings", "can"),
    [
        ({}, True),
        ({"warm_start": False}, False),
        ({"firmware": "uefi"}, False),
        ({"tpm": True}, False),
        ({"cdrom": Path("/cd.iso")}, False),
    ],
    ids=str,
)
def test_what_has_state_elsewhere_boots(settings: dict[str, object], can: bool) -> None:
    config = TargetConfig(name="x", kind="libvirt", vm={"disk": Path("/disk"), **settings})
    assert LibvirtMachine(config)._can_start_warm() is can


def test_a_machine_without_snapshots_boots() -> None:
    config = TargetConfig(
        name="x", kind="libvirt", vm={"disk": Path("/disk")}, without=frozenset({"snapshots"})
    )
    assert not LibvirtMachine(config)._can_start_warm()


def test_one_whose_process_is_killed_while_it_is_kept_is_left_to_its_run(
    spec: DomainSpec, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the run's folder goes with it; in the cache nobody would look for half a guest."""
    disk, scratch = tmp_path / "disk", tmp_path / "run"
    disk.write_bytes(b"memory")
    scratch.mkdir()
    seen: list[list[Path]] = []
    copy = warm_start._copy

    def look(source: Path, destination: Path) -> None:
        copy(source, destination)
        seen.append([*cache.iterdir(), *scratch.iterdir()])

    monkeypatch.setattr(warm_start, "_copy", look)
    WarmStart(spec, "a", "7.2").keep(disk, scratch)
    ((unfinished,),) = seen
    assert unfinished.parent == scratch
    assert list(scratch.iterdir()) == []
