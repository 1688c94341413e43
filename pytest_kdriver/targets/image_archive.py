"""Disk images as one file each, to be carried to another machine.

A tar archive, not compressed, as the disk is: the image's folder with its files, and at the end
``SHA256SUMS``, as sha256sum writes it. A password is not in it. What is taken in may be anybody's: a file is
a plain file of the image's folder or nothing, and nothing in it leads to another of this machine.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets.disk_images import (
    DISK,
    RESOURCE,
    DiskImage,
    disks_directory,
    locked,
    read_image,
    remove_unfinished,
)
from pytest_kdriver.targets.libvirt.base_disk import describe_disk
from pytest_kdriver.targets.prefix import MORE_ROOM
from pytest_kdriver.targets.runs import Run
from pytest_kdriver.vm_config import USER_NETWORK

SUMS: Final = "SHA256SUMS"
MOST_FILES: Final = 64
_PIECE: Final = 1 << 20
_MOST_SUMS: Final = 200 * MOST_FILES
_FOLDER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}-[0-9a-f]{16}(-[0-9a-f]{8})?")
_FILE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,100}")


def export_image(image: DiskImage, file: Path) -> None:
    """Write an image to ``file``, for its owner only; it is there as a whole, or not at all.

    Raises ``TargetError``, also where the disk is not what it was; OSError.
    """
    unfinished = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with (
            open(descriptor, "wb") as output,  # noqa: PTH123 -- a descriptor
            tarfile.open(fileobj=output, mode="w|", format=tarfile.GNU_FORMAT) as archive,
        ):
            sums = [_add(archive, image, path) for path in sorted(image.folder.iterdir())]
            _add_text(archive, f"{image.folder.name}/{SUMS}", "".join(sums))
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _add(archive: tarfile.TarFile, image: DiskImage, path: Path) -> str:
    """Add a file of an image's; its line of ``SHA256SUMS``."""
    if path.is_symlink() or not path.is_file() or not _FILE.fullmatch(path.name):
        raise TargetError(f"{path} is no file that an image has")
    info = archive.gettarinfo(str(path), f"{image.folder.name}/{path.name}")
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    with path.open("rb") as content:
        reader = _Hashing(content)
        archive.addfile(info, reader)
    found = reader.sha256.hexdigest()
    if path.name == DISK and found != image.sha256:
        raise TargetError(
            f"{path} is not what it was: its SHA-256 is {found}, and should be {image.sha256}"
        )
    return f"{found}  {path.name}\n"


class _Hashing:
    """A file that is hashed while it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        return data


def _add_text(archive: tarfile.TarFile, name: str, text: str) -> None:
    content = text.encode()
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    archive.addfile(info, io.BytesIO(content))


def import_image(file: Path, run: Run) -> DiskImage:
    """Take an image in that ``export_image`` wrote; the one that is there, where it is.

    Raises ``TargetError`` for what is no such file, and for what should not be let in.
    """
    making = run.path / "disk-imported"
    run.record(RESOURCE, making)
    try:
        making.mkdir(mode=0o700)
        folder, sums = _extract(file, making)
        _check(making, folder, sums[DISK])
        place = disks_directory() / folder
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place, lambda _: None):
            if place.exists():
                raise TargetError(
                    f"there is {place} already: kdriver image remove {place.name}, then import again"
                )
            making.chmod(0o755)
            making.rename(place)
        return read_image(place)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise TargetError(f"{file} does not fit: {MORE_ROOM}") from error
        raise
    finally:
        remove_unfinished(making)


def _extract(file: Path, making: Path) -> tuple[str, dict[str, str]]:
    """Write an archive's files into ``making``, each as its sum says; its folder's name, and the sums.

    Headers are read one by one: tarfile's own reader follows what they say to wherever it leads.
    """
    free = shutil.disk_usage(making).free
    sums: dict[str, str] = {}
    promised: dict[str, str] | None = None
    folders: set[str] = set()
    with file.open("rb") as archive:
        while (member := _next(archive, file)) is not None:
            folder, _, name = member.name.partition("/")
            folders.add(folder)
            if promised is not None or len(sums) >= MOST_FILES or len(folders) > 1:
                raise _refusal(file, "has more in it than an image")
            if not _FOLDER.fullmatch(folder) or not _FILE.fullmatch(name):
                raise _refusal(file, f"has {member.name!r} in it")
            if member.type != tarfile.REGTYPE or member.size < 0:
                raise _refusal(file, f"has {member.name!r} in it, which is no plain file")
            free -= member.size
            if free < 0:
                raise TargetError(f"{file} does not fit into {making}: {MORE_ROOM}")
            if name == SUMS:
                promised = _read_sums(archive.read(min(member.size, _MOST_SUMS)), file)
                archive.seek(_padding(member.size), os.SEEK_CUR)
            elif name in sums:
                raise _refusal(file, f"has {name!r} twice")
            else:
                sums[name] = _copy(archive, making / name, member)
    if sums != promised or DISK not in sums:
        raise _refusal(file, f"is not whole: its files are not what its {SUMS} says")
    return folders.pop(), sums


def _next(archive: IO[bytes], file: Path) -> tarfile.TarInfo | None:
    """The next file's header; None at the archive's end."""
    block = archive.read(tarfile.BLOCKSIZE)
    if block == bytes(tarfile.BLOCKSIZE):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.TarError, ValueError) as error:
        raise _refusal(file, f"can't be read ({error})") from error


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE


def _copy(archive: IO[bytes], path: Path, member: tarfile.TarInfo) -> str:
    """Write a file, for others to read where they could; its SHA-256."""
    sha256 = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as output:  # noqa: PTH123 -- a descriptor
        left = member.size
        while left and (piece := archive.read(min(_PIECE, left))):
            sha256.update(piece)
            output.write(piece)
            left -= len(piece)
        os.fchmod(output.fileno(), 0o600 | member.mode & 0o044)
    archive.seek(_padding(member.size), os.SEEK_CUR)
    return sha256.hexdigest()


def _read_sums(text: bytes, file: Path) -> dict[str, str]:
    found = {}
    for line in text.decode("ascii", "replace").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64})  (\S+)", line)
        if match is None:
            raise _refusal(file, f"has a {SUMS} that can't be read")
        found[match[2]] = match[1]
    return found


def _check(making: Path, folder: str, sha256: str) -> None:
    """See that an image is one, and that nothing in it leads out of its folder. Raises ``TargetError``."""
    image = read_image(making)
    if not folder.startswith(f"{image.name}-") or image.sha256 != sha256:
        raise TargetError(f"the image {folder} says of itself that it is another one")
    for key, value in image.target.items():
        if isinstance(value, Path) and not (value.parent == making and value.is_file()):
            raise TargetError(
                f"the image's {key} is {str(value)!r}, which is no file of its folder"
            )
    network = image.target.get("network", USER_NETWORK)
    if network != USER_NETWORK:
        raise TargetError(f"the image asks for {network!r}, a network of this machine")
    described = describe_disk(image.disk, "qcow2")
    if any("backing" in key for key in described) or "data-file" in str(
        described.get("format-specific")
    ):
        raise TargetError("the image's disk leads to another file")
    with suppress(OSError, OverflowError):
        os.utime(image.disk, ns=(image.mtime_ns, image.mtime_ns))
    image.disk.chmod(0o400)


def _refusal(file: Path, why: str) -> TargetError:
    return TargetError(f"{file} is no image that kdriver image export wrote: it {why}")
