"""Guests that were booted once: their disk with the snapshot that was taken then, kept in the cache.

A guest of the same machine goes on from there in a second, where booting takes many. It is a clone like all
others, with a past. All that go on from one boot draw the same random numbers, as one that is put back does
again, until their kernel has stirred in new ones (Linux: a minute).

``<cache>/booted/BASE-KEY.qcow2``; the key is of all that the snapshot depends on: the base disk, the machine,
the emulator, and, where the processor is the host's, of that. Memory is in it, so nobody else may read it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets.disk_images import BASE_DIGITS, booted_directory
from pytest_kdriver.targets.libvirt.base_disk import point_to_base
from pytest_kdriver.targets.libvirt.domain_xml import DomainSpec, domain_xml

KEPT: Final = 6
"""How many are kept at most: those used last."""

ROOM: Final = 4
"""A guest is not kept where its disk, so many times, would not be free afterwards."""

_COPY_TIMEOUT: Final = 120.0


class WarmStart:
    """Where the guest of a machine like ``spec`` over the disk with ``sha256`` is kept, if it is."""

    def __init__(self, spec: DomainSpec, sha256: str, qemu_version: str) -> None:
        key = _key(spec, sha256, qemu_version)
        self.path = booted_directory() / f"{sha256[:BASE_DIGITS]}-{key}.qcow2"

    def take(self, overlay: Path, base: Path) -> bool:
        """Make ``overlay`` a clone of the guest over ``base``; False where there is none to be had."""
        try:
            os.utime(self.path)
            _copy(self.path, overlay)
            point_to_base(overlay, base)
        except (OSError, TargetError) as error:
            overlay.unlink(missing_ok=True)
            if isinstance(error, TargetError):
                self.drop()
            return False
        return True

    def keep(self, overlay: Path, scratch: Path) -> None:
        """Keep the guest whose disk this is, and that stands still. Raises OSError.

        ``scratch`` is a folder of a run, on the same file system: there it is copied to, and moved from.
        """
        size = overlay.stat().st_blocks * 512
        folder = self.path.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        room = os.statvfs(folder)
        if room.f_bavail * room.f_frsize < ROOM * size:
            return
        unfinished = scratch / f"booted-{uuid.uuid4().hex[:8]}"
        try:
            _copy(overlay, unfinished)
            unfinished.replace(self.path)
        finally:
            unfinished.unlink(missing_ok=True)
        _remove_old_ones()

    def drop(self) -> None:
        """Keep it no longer: it does not come up."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def _key(spec: DomainSpec, sha256: str, qemu_version: str) -> str:
    place = Path("/")
    like = replace(
        spec,
        name="guest",
        run="",
        owner_pid=0,
        disk=place,
        console=place,
        forwards=(),
        ports=tuple((port, place) for port, _ in spec.ports),
        kernel=place if spec.kernel else None,
        initrd=place if spec.initrd else None,
    )
    emulator = spec.emulator.stat()
    said = [
        domain_xml(like),
        sha256,
        qemu_version,
        str(emulator.st_size),
        str(emulator.st_mtime_ns),
    ]
    booted = [file for file in (spec.kernel, spec.initrd) if file is not None]
    said += [hashlib.sha256(file.read_bytes()).hexdigest() for file in booted]
    if spec.accelerator == "kvm":
        said += [os.uname().release, _processor()]
    return hashlib.sha256("\0".join(said).encode()).hexdigest()[:24]


def _processor() -> str:
    """What this host's processor is and can, as Linux tells it."""
    wanted = ("vendor_id", "model name", "stepping", "microcode", "flags")
    with Path("/proc/cpuinfo").open() as lines:
        of_first = []
        for line in lines:
            if not line.strip():
                break
            if line.startswith(wanted):
                of_first.append(line)
    return "".join(of_first)


def _copy(source: Path, destination: Path) -> None:
    """Copy a disk that may be large, its blocks shared where the file system can. Raises OSError."""
    descriptor = os.open(destination, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.close(descriptor)
    command = ["cp", "--reflink=auto", "--sparse=always", "--", str(source), str(destination)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_COPY_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"{source} was not copied after {_COPY_TIMEOUT:g} s") from None
    if done.returncode:
        raise OSError(done.stderr.decode(errors="replace").strip())


def _remove_old_ones() -> None:
    used: list[tuple[float, Path]] = []
    for path in booted_directory().glob("*.qcow2"):
        with suppress(OSError):
            used.append((path.stat().st_mtime, path))
    for _, path in sorted(used, reverse=True)[KEPT:]:
        with suppress(OSError):
            path.unlink()
