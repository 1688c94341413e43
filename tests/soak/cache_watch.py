"""A cache of one's own, and a look at everything that runs with it may leave behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from pytest_kdriver.paths import cache_directory
from pytest_kdriver.targets import prefix

ROOT = Path(__file__).parents[2]
SETTLED = 2.0
"""Seconds that a folder in /tmp must have been there to count: others use Wine meanwhile."""

_PYTEST = (sys.executable, "-W", "error", "-m", "pytest", "-q", "--kdriver-vm", "wine")
_GC = "import sys; from pytest_kdriver.cli import main; sys.exit(main(['gc']))"
_TEMPORARY = Path("/tmp")


class CacheWatch:
    """A private cache folder, what is done in it, and what is left of that."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path / "tmp"  # the TMPDIR of all that is started here
        self.temporary.mkdir()
        self._servers: set[str] = set()
        self._folders_before = _server_homes()

    def environment(self) -> Mapping[str, str]:
        """The environment of a program that uses this cache."""
        plain = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTEST_", "PYTHONDONTWRITEBYTECODE"))
        }
        return plain | {"KDRIVER_CACHE": str(self.path), "TMPDIR": str(self.temporary)}

    def start_pytest(self, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """``pytest`` on Wine, in a process group of its own, as a terminal has it."""
        with (folder / "output").open("wb") as output:
            return subprocess.Popen(
                [*_PYTEST, *arguments],
                cwd=folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def wait(self, process: subprocess.Popen[bytes], seconds: float) -> int | None:
        """Wait for ``process`` and note what its prefixes use; its exit code, None: it still runs."""
        deadline = time.monotonic() + seconds
        while True:
            self._note_servers()
            left = deadline - time.monotonic()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(max(0.0, min(left, 0.05)))
            if left <= 0:
                return None

    def collect_garbage(self) -> str:
        """``kdriver gc``; what it says."""
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", _GC],
            env=self.environment(),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return done.stdout

    def left_behind(self) -> list[str]:
        """Processes of the cache's prefixes, run folders, sockets' folders, temporary files."""
        self._note_servers()
        left = [f"process {pid}: {name}" for pid, name in self.processes()]
        runs = self.path / "runs"
        if runs.exists():
            left += [f"run {path.name}" for path in runs.iterdir()]
        left += [f"server {folder}" for folder in self._server_folders()]
        left += [f"temporary {path.name}" for path in self.temporary.iterdir()]
        return left

    def processes(self) -> list[tuple[int, str]]:
        """The programs of this cache's prefixes."""
        mark = b"WINEPREFIX=" + os.fsencode(self.path) + b"/"
        found = []
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if mark in Path(entry.path, "environ").read_bytes():
                        found.append(
                            (int(entry.name), Path(entry.path, "comm").read_text().strip())
                        )
        return found

    def _note_servers(self) -> None:
        """Remember what the folders of the servers of the present prefixes are called."""
        for path in self.path.glob("runs/*/*"):
            with contextlib.suppress(OSError):
                if path.is_dir():
                    status = path.stat()
                    self._servers.add(f"server-{status.st_dev:x}-{status.st_ino:x}")

    def _server_folders(self) -> list[Path]:
        """The folders of our servers; and new ones, empty for long, that could be."""
        found = []
        for home in _server_homes() | {_TEMPORARY / f".wine-{os.getuid()}"}:
            with contextlib.suppress(OSError):
                inside = {path.name for path in home.iterdir()}
                age = time.time() - home.stat().st_mtime
                if inside & self._servers or (
                    home not in self._folders_before
                    and home.name.startswith("wine-")
                    and not inside
                    and age > SETTLED
                ):
                    found.append(home)
        return found


def _server_homes() -> set[Path]:
    """Debian's Wine makes a folder for each prefix; its note of the name is in the prefix."""
    return {path for path in _TEMPORARY.glob("wine-*") if path.is_dir()}


@contextlib.contextmanager
def private_cache(*, shared: tuple[str, ...] = ("wine", "programs")) -> Iterator[CacheWatch]:
    """A cache folder on the file system of the real one, whose ``shared`` parts are the real ones."""
    real = cache_directory()
    real.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="soak-", dir=real))
    for name in shared:
        (real / name).mkdir(exist_ok=True)
        (path / name).symlink_to(real / name)
    watch = CacheWatch(path)
    try:
        yield watch
    finally:
        for folder in path.glob("runs/*/*"):
            if folder.is_dir():
                prefix.remove(folder)
        shutil.rmtree(path)


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C at the terminal: SIGINT for the whole process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)


def kill(process: subprocess.Popen[bytes]) -> None:
    """``kill -9`` of the one process; what it started lives on."""
    process.kill()
