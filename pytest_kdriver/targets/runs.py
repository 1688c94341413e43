"""What a run makes outside of itself, written down before it is made, so that it can be removed.

Each target of each process has a run folder below ``<cache>/runs``. The owner holds a lock on the
file ``lock`` in it for as long as it lives, so that a folder whose lock can be had belongs to nobody
any more: the next run, or ``kdriver gc``, removes what its ``resources`` file names, and then the folder.
A folder with a file ``kept`` in it is somebody's who wants to look at what is there: it stays until
it is removed by name.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Final

from pytest_kdriver.paths import cache_directory

Remover = Callable[[Path], None]
"""Removes a resource, given its path; never raises for what is gone already, OSError for what must stay."""

IN_USE_PATIENCE: Final = 1.0
"""Seconds that ``remove_kept`` waits for another kdriver, which may only look whose the run is."""

_IN_USE_INTERVAL: Final = 0.05
_LOCK: Final = "lock"
_RESOURCES: Final = "resources"
_KEPT: Final = "kept"


def runs_directory() -> Path:
    """Where the run folders are; on the file system of the cache, so that clones can be hard links."""
    return cache_directory() / "runs"


class Run:
    """A run folder that this process owns."""

    def __init__(self) -> None:
        self.path = runs_directory() / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        # The lock is made, and taken, under another name: a folder in sight is never unlocked.
        hidden = self.path.with_name(f".{self.path.name}")
        hidden.mkdir(parents=True, mode=0o700)
        self._lock = os.open(hidden / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        hidden.rename(self.path)

    def record(self, kind: str, path: Path) -> None:
        """Write down that ``path``, a resource of this kind, is about to be made."""
        self._write_down({"kind": kind, "path": str(path)})

    def forget(self, kind: str, path: Path) -> None:
        """Write down that what was recorded is gone for sure; it spares its remover a look."""
        with suppress(OSError):
            self._write_down({"kind": kind, "path": str(path), "gone": True})

    def _write_down(self, entry: dict[str, object]) -> None:
        resources = self.path / _RESOURCES
        resources.touch(mode=0o600)
        with resources.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def keep(self) -> None:
        """Leave the folder, and all that it names, to whoever removes it by ``remove_kept``."""
        (self.path / _KEPT).touch(mode=0o600)
        os.close(self._lock)
        self._lock = -1

    def close(self, removers: Mapping[str, Remover] = MappingProxyType({})) -> None:
        """Remove what is recorded and was not forgotten, by ``removers``, then the folder.

        Where something stays the folder does too, as nobody's: the next run, or ``kdriver gc``, tries again.
        """
        if self._lock < 0:
            return
        try:
            with suppress(OSError):
                _remove(self.path, removers)
        finally:
            os.close(self._lock)
            self._lock = -1


def collect_garbage(removers: Mapping[str, Remover]) -> list[Path]:
    """Remove what dead runs left behind; the folders that were removed.

    What can't be removed, since it is another user's, say, stays, and is no obstacle to the rest.
    """
    removed = []
    for folder in _folders():
        with suppress(OSError), _orphaned(folder) as orphan:
            if orphan and not is_kept(folder):
                _remove(folder, removers)
                removed.append(folder)
    return removed


def kept_runs() -> list[Path]:
    """The folders of runs that were kept."""
    return [folder for folder in _folders() if is_kept(folder)]


def is_kept(folder: Path) -> bool:
    """Whether a run was kept."""
    return (folder / _KEPT).exists()


def remove_kept(folder: Path, removers: Mapping[str, Remover]) -> None:
    """Remove a run that was kept, and all that it names.

    Raises OSError for what must stay, and where another kdriver has the run.
    """
    deadline = time.monotonic() + IN_USE_PATIENCE
    while True:
        with _orphaned(folder) as orphan:
            if orphan:
                _remove(folder, removers)
                return
        if time.monotonic() >= deadline:
            raise OSError(f"{folder} is in use by another kdriver")
        time.sleep(_IN_USE_INTERVAL)


def _remove(folder: Path, removers: Mapping[str, Remover]) -> None:
    """Remove what a run made, the last first; its record goes when all is gone. Raises OSError."""
    for kind, path in _resources(folder):
        if kind in removers:
            removers[kind](path)
    with suppress(FileNotFoundError):
        _remove_trees(path for path in folder.iterdir() if path.name not in {_LOCK, _RESOURCES})
    remove_tree(folder)


def abandoned_runs() -> list[Path]:
    """The folders of runs whose owner is gone."""
    abandoned = []
    for folder in _folders():
        with suppress(OSError), _orphaned(folder) as orphan:
            if orphan and not is_kept(folder):
                abandoned.append(folder)
    return abandoned


def remove_tree(path: Path) -> None:
    """Remove a folder that a guest may have filled. Raises OSError if it stays.

    By ``rm``, since ``shutil.rmtree`` before Python 3.13 fails at trees some thousand folders deep.
    """
    _remove_trees([path])


def _remove_trees(paths: Iterable[Path]) -> None:
    command = ["rm", "-rf", "--one-file-system", "--", *map(str, paths)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.decode(errors="replace").strip())


def _folders() -> list[Path]:
    try:
        return sorted(path for path in runs_directory().iterdir() if path.is_dir())
    except FileNotFoundError:
        return []


@contextmanager
def _orphaned(folder: Path) -> Iterator[bool]:
    """Whether nobody owns ``folder``; if so, we do for the while."""
    if folder.name.startswith(".") and _alive(folder):
        yield False
        return
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(lock)


def _alive(folder: Path) -> bool:
    """Whether the process that began to make this hidden folder still runs."""
    pid = folder.name.lstrip(".").partition("-")[0]
    return pid.isdigit() and Path("/proc", pid).exists()


def _resources(folder: Path) -> list[tuple[str, Path]]:
    """What a run recorded and did not forget, the last first."""
    try:
        lines = (folder / _RESOURCES).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found: dict[tuple[str, Path], None] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            resource = str(entry["kind"]), Path(entry["path"])
            gone = entry.get("gone") is True
        except (ValueError, KeyError, TypeError):
            continue  # the owner died while it wrote this line: nothing was made yet
        found.pop(resource, None)
        if not gone:
            found[resource] = None
    return list(reversed(found))
