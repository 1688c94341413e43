"""The disk that clones are linked to: never written to, and noticed if somebody else does."""

from __future__ import annotations

import hashlib
import json
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Final, cast

from pytest_kdriver.errors import TargetError
from pytest_kdriver.paths import cache_directory

_QEMU_IMG_TIMEOUT: Final = 60.0


class BaseDisk:
    """A disk image on this host. ``sha256`` is what it has to have, "" for whatever it has now.

    Raises ``TargetError`` where there is none, or another than that.
    """

    def __init__(self, path: Path, sha256: str = "") -> None:
        self.path = path
        self._fingerprint = _fingerprint(path)
        self.sha256 = file_sha256(path)
        if sha256 and self.sha256 != sha256:
            raise TargetError(
                f"the disk {path} is not what it was: its SHA-256 is {self.sha256}, and should be {sha256}"
            )

    def check(self) -> None:
        """See that nobody wrote to it. Raises ``TargetError``."""
        if _fingerprint(self.path) != self._fingerprint:
            raise TargetError(
                f"the disk {self.path} was changed while clones of it were in use, and these are void: "
                "shut down whatever uses it, and run again"
            )


def make_overlay(base: Path, overlay: Path) -> None:
    """Make a linked clone: an empty qcow2 file that has ``base`` behind it. Raises ``TargetError``."""
    qemu_img("create", "-q", "-f", "qcow2", *_behind(base), str(overlay))


def point_to_base(overlay: Path, base: Path) -> None:
    """Tell a linked clone where the disk behind it lies now. Raises ``TargetError``."""
    qemu_img("rebase", "-u", "-f", "qcow2", *_behind(base), str(overlay))


def _behind(base: Path) -> list[str]:
    return ["-F", str(describe_disk(base)["format"]), "-b", str(base.absolute())]


def describe_disk(path: Path, kind: str | None = None) -> dict[str, object]:
    """What qemu-img says of a disk's file, which is of this ``kind``, or as it looks. ``TargetError``."""
    options = ["-f", kind] if kind is not None else []
    told = qemu_img("info", "--output=json", *options, "--", str(path))
    return cast("dict[str, object]", json.loads(told))


def qemu_img(*arguments: str) -> str:
    """What qemu-img says, which is to be done soon. Raises ``TargetError``."""
    try:
        done = subprocess.run(
            ["qemu-img", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_QEMU_IMG_TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        raise TargetError(
            "there is no qemu-img; on Debian or Ubuntu: apt-get install qemu-utils"
        ) from None
    except subprocess.TimeoutExpired:
        raise TargetError(
            f"qemu-img {arguments[0]} was not done after {_QEMU_IMG_TIMEOUT:g} s"
        ) from None
    if done.returncode:
        raise TargetError(f"qemu-img {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout


def _fingerprint(path: Path) -> list[int]:
    """What changes when a file does."""
    try:
        status = path.stat()
    except OSError as error:
        raise TargetError(f"{path} can't be used: {error.strerror}") from error
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]


def file_sha256(path: Path) -> str:
    """The SHA-256 of a large file; known from before, where it did not change since. ``TargetError``."""
    fingerprint = _fingerprint(path)
    known_file = cache_directory() / "disk-hashes" / hashlib.sha256(bytes(path)).hexdigest()[:16]
    try:
        known = cast("Mapping[str, object]", json.loads(known_file.read_text(encoding="utf-8")))
        if known["fingerprint"] == fingerprint:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    known_file.parent.mkdir(parents=True, exist_ok=True)
    # Two may hash it at once.
    unfinished = known_file.with_name(f".{known_file.name}-{uuid.uuid4().hex}")
    unfinished.write_text(json.dumps({"fingerprint": fingerprint, "sha256": sha256}))
    unfinished.replace(known_file)
    return sha256
