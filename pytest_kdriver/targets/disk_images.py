"""Disk images: made once from their recipes, kept in the cache, and never written to.

``<cache>/disks/NAME-KEY/`` has ``disk.qcow2``, what else the recipe's ``build`` left (a kernel, keys), and
``image.toml``: what it is, and what a target with it is like. KEY changes whenever the image would. It is
made in the folder of a run, and moved to its place when it is complete.

``build FOLDER`` is run with FOLDER, which is empty, for all that it makes; in the recipe's own folder; as
root of namespaces of its own where the recipe asks for that. Each line of its stdout names a phase that
begins; its stderr is the log. In its environment:

    KDRIVER_AGENT               kdagent.exe
    KDRIVER_FORWARDER           kdtrace, for guests with Wine
    KDRIVER_WINE_SETTINGS       a file for regedit: what a Wine prefix needs
    KDRIVER_WINE_ENVIRONMENT    a file, NAME=VALUE a line: what Wine's programs need

A Windows is made by ``targets/windows/images.py``, from a CD that a run need not have: its folder is
``NAME-KEY-MEDIA``, and a run takes the newest of its KEY.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Final, TypeAlias

from filelock import FileLock, Timeout

from pytest_kdriver.errors import ConfigError, TargetError
from pytest_kdriver.guest.executable import AGENT, FORWARDER
from pytest_kdriver.paths import cache_directory
from pytest_kdriver.targets.prefix import MORE_ROOM, SETTINGS
from pytest_kdriver.targets.recipe import BUILD, WINE_ENVIRONMENT, Recipe, parse_target
from pytest_kdriver.targets.runs import Run, remove_tree
from pytest_kdriver.targets.windows.passwords import forget_password, password_file
from pytest_kdriver.vm_config import VmSettings

RESOURCE: Final = "disk-image"
DISK: Final = "disk.qcow2"
IMAGE_FILE: Final = "image.toml"
_LOG: Final = "build.log"
_SHOWN: Final = 20
"""How many of the log's last lines an error shows."""

_PATIENCE: Final = 5.0
"""Seconds that a killed build has to be gone."""

OLD_ONES: Final = 2
"""How many older images of a recipe are left when a new one is made: other checkouts may use them."""

Build: TypeAlias = Callable[[Path, Callable[[str], None]], Mapping[str, object]]
"""Leaves ``DISK``, and what goes with it, in a folder, telling the phases that begin; what a target with it
is like, see ``Recipe.target_table``."""

BASE_DIGITS: Final = 16

_USER_NAMESPACE: Final = ("unshare", "--user", "--map-root-user", "--map-auto")


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of making an image begins, ``elapsed`` seconds after the beginning of it all."""

    name: str
    elapsed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskImage:
    """An image that is there. ``target`` is what a target with it is like, ``size`` the disk's bytes."""

    name: str
    folder: Path
    target: VmSettings
    sha256: str
    size: int
    mtime_ns: int
    made: str

    @property
    def disk(self) -> Path:
        """The disk."""
        return self.folder / DISK

    @property
    def is_unchanged(self) -> bool:
        """Whether the disk looks as it was made; its hash tells for sure."""
        try:
            status = self.disk.stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.size, self.mtime_ns)


def disks_directory() -> Path:
    """Where the images are."""
    return cache_directory() / "disks"


def booted_directory() -> Path:
    """Where guests are that have booted from disks: ``targets/libvirt/warm_start.py``.

    A file's name begins with ``BASE_DIGITS`` digits of its disk's SHA-256.
    """
    return cache_directory() / "booted"


def ensure(recipe: Recipe, run: Run, progress: Callable[[Phase], None]) -> DiskImage:
    """The image that ``recipe`` makes; made if it is not there, unless it takes a CD.

    One process makes it, others wait. ``progress`` is told of each phase. Raises ``TargetError``.
    """
    if recipe.windows is not None:
        return _find_installed(recipe)
    return make_once(
        recipe,
        f"{recipe.name}-{recipe.key()}",
        run,
        progress,
        lambda making, phase: _build(recipe, making, run.path, phase),
    )


def make_once(
    recipe: Recipe, folder: str, run: Run, progress: Callable[[Phase], None], build: Build
) -> DiskImage:
    """The image in the folder of this name; made by ``build`` if it is not there."""
    place = disks_directory() / folder
    image = _find(place)
    if image is None:
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place, progress):
            image = _find(place) or _make(recipe, place, run, progress, build)
            _remove_old_ones(image)
    return image


def is_current(image: DiskImage, recipe: Recipe) -> bool:
    """Whether an image is of the recipe as it is now."""
    folder = f"{recipe.name}-{recipe.key()}"
    return image.folder.name == folder or image.folder.name.startswith(f"{folder}-")


def _find_installed(recipe: Recipe) -> DiskImage:
    """The newest image of a recipe that takes a CD. Raises ``TargetError``, which says how to make it."""
    images = [image for image in list_images() if image.name == recipe.name]
    current = [image for image in images if is_current(image, recipe)]
    if not current:
        others = f", only of another state of it ({images[0].folder.name})" if images else ""
        raise TargetError(
            f"there is no disk image of the recipe {recipe.folder}{others}; it is made once, from a "
            f"Windows ISO of yours: kdriver image build {recipe.name} --iso FILE"
        )
    newest = max(current, key=lambda image: image.made)
    return _find(newest.folder) or newest


def _find(place: Path) -> DiskImage | None:
    try:
        image = read_image(place)
    except TargetError:
        return None
    with suppress(OSError):  # another user's, root's say: only its owner notes it
        os.utime(place / IMAGE_FILE)  # when it was last used
    return image


@contextmanager
def locked(place: Path, progress: Callable[[Phase], None]) -> Iterator[None]:
    """Have an image's place for oneself; ``progress`` is told if that has to be waited for."""
    lock = FileLock(f"{place}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(Phase(f"waiting for who makes {place.name} already", 0.0))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(
    recipe: Recipe, place: Path, run: Run, progress: Callable[[Phase], None], build: Build
) -> DiskImage:
    begin = time.monotonic()
    _need_programs(recipe)
    _need_room(recipe, run.path)
    making = run.path / f"disk-{recipe.name}"
    run.record(RESOURCE, making)
    try:
        making.mkdir(mode=0o700)
        target = build(making, lambda name: progress(Phase(name, time.monotonic() - begin)))
        progress(Phase("hashing its disk", time.monotonic() - begin))
        _describe(recipe, making, target)
        if place.exists():
            remove_tree(place)  # one without its description
        making.chmod(0o755)
        making.rename(place)
    finally:
        remove_unfinished(making)
    return read_image(place)


def _need_programs(recipe: Recipe) -> None:
    path = _path()
    missing = [name for name in recipe.programs if shutil.which(name, path=path) is None]
    if missing:
        raise TargetError(
            f"to make the disk image {recipe.name}, {', '.join(missing)} must be installed; on Debian or "
            f"Ubuntu: apt-get install {' '.join(recipe.packages)}"
        )
    if recipe.as_root and os.geteuid() != 0:
        tried = subprocess.run(
            [*_USER_NAMESPACE, "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        if tried.returncode:
            told = tried.stderr.decode(errors="replace").strip()
            raise TargetError(
                f"to make the disk image {recipe.name} as this user, user namespaces are needed ({told}): "
                "install the package uidmap, and have this user named in /etc/subuid and /etc/subgid; or "
                f"make it once as root, with the same KDRIVER_CACHE (kdriver image build {recipe.name}), and "
                f"give it to this user: chown --recursive {os.getuid()} {disks_directory()}"
            )


def _need_room(recipe: Recipe, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < recipe.room:
        raise TargetError(
            f"making the disk image {recipe.name} takes {recipe.room >> 20} MiB, and {free >> 20} MiB are "
            f"free in {folder}: {MORE_ROOM}"
        )


def _path() -> str:
    """Where programs are; also those that are not in an ordinary user's PATH."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"


def _build(
    recipe: Recipe, making: Path, scratch: Path, phase: Callable[[str], None]
) -> Mapping[str, object]:
    settings = scratch / "settings.reg"
    settings.write_text(SETTINGS, encoding="utf-8")
    environment = scratch / "wine-environment"
    lines = [f"{name}={value}\n" for name, value in WINE_ENVIRONMENT.items()]
    environment.write_text("".join(lines), encoding="utf-8")
    log = making / _LOG
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*_wrapping(recipe), str(recipe.folder / BUILD), str(making)],
            cwd=recipe.folder,
            env={
                **os.environ,
                "PATH": _path(),
                "LC_ALL": "C.UTF-8",
                "KDRIVER_AGENT": str(AGENT.executable()),
                "KDRIVER_FORWARDER": str(FORWARDER.executable()),
                "KDRIVER_WINE_SETTINGS": str(settings),
                "KDRIVER_WINE_ENVIRONMENT": str(environment),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            start_new_session=True,  # a Ctrl-C is ours alone
        )
        assert process.stdout is not None
        name = _follow(process, process.stdout, phase)
    if process.returncode or not (making / DISK).is_file():
        raise _failure(recipe, name, process.returncode, log)
    log.unlink()
    return recipe.target_table


def _wrapping(recipe: Recipe) -> list[str]:
    """What ends the build with us, and makes it root where it has to be.

    The first process of a pid namespace takes all others of it with it.
    """
    end_with_us = ["setpriv", "--pdeathsig", "KILL"]
    if not recipe.as_root:
        return end_with_us
    user = ["unshare"] if os.geteuid() == 0 else list(_USER_NAMESPACE)
    return [*end_with_us, *user, "--mount", "--pid", "--fork", "--kill-child"]


def _follow(
    process: subprocess.Popen[bytes], output: IO[bytes], phase: Callable[[str], None]
) -> str:
    """Pass on which phases begin, until the build is over; the last one's name."""
    name = "its beginning"
    try:
        for line in output:
            name = line.decode(errors="replace").strip()
            phase(name)
        process.wait()
    finally:
        _end(process)
        output.close()
    return name


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a build, and return when it is gone.

    The first process of a pid namespace is not gone before all others of it are, and its parent waits for it.
    """
    if process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        with suppress(OSError):
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _failure(recipe: Recipe, phase: str, code: int, log: Path) -> TargetError:
    """What to say of a build that failed. The log is kept."""
    kept = disks_directory() / f"{recipe.name}.log"
    with suppress(OSError):  # a full disk, say
        shutil.copyfile(log, kept)
    text = log.read_text(encoding="utf-8", errors="replace")
    last = "\n".join(f"    {line}" for line in text.splitlines()[-_SHOWN:])
    full = os.strerror(errno.ENOSPC) in text
    how = f"ended with exit code {code}" if code else f"made no {DISK}"
    return TargetError(
        f"the disk image {recipe.name} could not be made: {recipe.folder / BUILD} {how}, in the phase "
        f"{phase!r}{f'; {MORE_ROOM}' if full else ''}; its log is {kept}, which ends with\n{last}"
    )


def _describe(recipe: Recipe, folder: Path, target: Mapping[str, object]) -> None:
    """Write down what was made. From here on the disk stays as it is."""
    disk = folder / DISK
    disk.chmod(0o400)  # the guest's passwords are in it
    with disk.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    status = disk.stat()
    table: dict[str, object] = {
        "name": recipe.name,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "sha256": sha256,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }
    text = f"{_toml(table)}\n[target]\n{_toml(target)}"
    (folder / IMAGE_FILE).write_text(text, encoding="utf-8")


def _toml(table: Mapping[str, object]) -> str:
    # A string, a number or a truth value is written in TOML as it is in JSON.
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())


def read_image(folder: Path) -> DiskImage:
    """The image in ``folder``. Raises ``TargetError`` where there is none, or none that is whole."""
    path = folder / IMAGE_FILE
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        return DiskImage(
            name=str(table["name"]),
            folder=folder,
            target=parse_target(table["target"], f"{path}: target", folder) | _password(folder),
            sha256=str(table["sha256"]),
            size=int(table["size"]),
            mtime_ns=int(table["mtime_ns"]),
            made=str(table["made"]),
        )
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise TargetError(f"{folder} has no whole disk image: {error}") from error


def _password(folder: Path) -> dict[str, object]:
    """Where the password of a Windows is that was installed here."""
    path = password_file(folder.name)
    return {"winrm_password_file": path} if path.exists() else {}


def list_images() -> list[DiskImage]:
    """The images that are there, by name, the one used last first."""
    images = []
    for path in disks_directory().glob(f"*/{IMAGE_FILE}"):
        with suppress(TargetError):
            images.append(read_image(path.parent))
    return sorted(images, key=lambda image: (image.name, -_last_used(image), image.folder))


def _last_used(image: DiskImage) -> float:
    with suppress(OSError):
        return (image.folder / IMAGE_FILE).stat().st_mtime
    return 0.0


def remove(name: str) -> list[Path]:
    """Remove the images called ``name``, or the one in the folder of that name; the folders that are gone.

    Guests that run go on: what they have open stays for them.
    """
    removed = []
    for image in list_images():
        if name in {image.name, image.folder.name}:
            _remove(image)
            removed.append(image.folder)
    return removed


def _remove_old_ones(newest: DiskImage) -> None:
    others = [i for i in list_images() if i.name == newest.name and i.folder != newest.folder]
    for image in others[OLD_ONES:]:
        with suppress(OSError):
            _remove(image)


def _remove(image: DiskImage) -> None:
    # Without its description it is none any more, however far the rest comes.
    (image.folder / IMAGE_FILE).unlink(missing_ok=True)
    remove_tree(image.folder)
    with suppress(OSError):
        forget_password(image.folder.name)
    for guest in booted_directory().glob(f"{image.sha256[:BASE_DIGITS]}-*"):
        with suppress(OSError):
            guest.unlink()


def remove_unfinished(making: Path) -> None:
    """Remove what a build left, if it is there. Raises OSError if it stays.

    An ordinary user's build leaves files of other users, which are its own in a user namespace.
    """
    if not making.exists():
        return
    try:
        remove_tree(making)
    except OSError:
        if os.geteuid() == 0:
            raise
        command = [*_USER_NAMESPACE, "rm", "-rf", "--one-file-system", "--", str(making)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode:
            raise OSError(done.stderr.decode(errors="replace").strip()) from None
