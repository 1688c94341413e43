"""Wine prefixes: found, made once as a template, cloned cheaply, ended and removed for good."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from filelock import FileLock

from pytest_kdriver.errors import TargetError
from pytest_kdriver.kernel.sources.wine import RELAYED
from pytest_kdriver.paths import cache_directory
from pytest_kdriver.targets.runs import Run, remove_tree

RESOURCE: Final = "wine-prefix"
_TEMPLATE_TIMEOUT: Final = 600.0
TEMPLATE_ROOM: Final = 1 << 30
"""Bytes; Wine 8's template takes 695 MB, Wine 10's 772."""

MORE_ROOM: Final = "free some, or set KDRIVER_CACHE to a folder elsewhere"
_CANDIDATES: Final = ("wine64", "/usr/lib/wine/wine64", "wine")
_OLDEST: Final = (8, 0)
"""The oldest Wine that the trace and the service control manager's answers were looked at on."""

_VERSION: Final = re.compile(r"wine-((\d+)\.(\d+)\S*)")
"""Then may follow whose it is: ``wine-8.0 (Debian 8.0~repack-4)``."""

_SERVER_NOTE: Final = "wineserver"
"""The file in which Debian's Wine keeps the name of the folder of a prefix's socket."""

_NOT_INHERITED: Final = frozenset({"DISPLAY", "WAYLAND_DISPLAY", "TMPDIR"})
"""No windows; and Debian's Wine 10 dies of a TMPDIR (it frees what getenv gave it)."""

SETTINGS: Final = f"""Windows Registry Editor Version 5.00

[HKEY_CURRENT_USER\\Software\\Wine\\Debug]
"RelayInclude"="{RELAYED}"

[HKEY_LOCAL_MACHINE\\Software\\Microsoft\\Windows NT\\CurrentVersion\\AeDebug]
"Auto"="1"
"Debugger"="none"

[HKEY_LOCAL_MACHINE\\System\\CurrentControlSet\\Control]
"ServicesPipeTimeout"="86400000"
"""
"""The trace's list; no debugger at a crash (winedbg costs a second); and a day, in milliseconds, until
services.exe gives a start or stop up by itself: deadlines are ours, and much nearer."""


@dataclass(frozen=True, slots=True)
class Wine:
    """A Wine on this host."""

    loader: str
    server: str
    version: str

    def environment(self, prefix: Path, channels: str) -> dict[str, str]:
        """The environment of a program of ``prefix`` that traces ``channels``."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("WINE") and name not in _NOT_INHERITED
        }
        return inherited | {
            "WINEPREFIX": str(prefix),
            "WINEDEBUG": channels,
            "WINEARCH": "win64",
            "WINEDLLOVERRIDES": "mscoree,mshtml=",  # no offer to install Mono or Gecko
            "WINESERVER": self.server,
        }


@functools.cache
def find_wine(wanted: str | None = None) -> Wine:
    """The Wine called ``wanted``, else the first that is found and new enough. Raises ``TargetError``."""
    too_old = None
    for candidate in (wanted,) if wanted else _CANDIDATES:
        loader = shutil.which(candidate)
        told = _VERSION.match(_ask_version(loader)) if loader else None
        if loader is None or told is None:
            continue
        if (int(told[2]), int(told[3])) >= _OLDEST:
            return Wine(loader, _server_of(loader), told.string.removeprefix("wine-"))
        too_old = too_old or f"Wine {told[1]} ({loader}) is too old"
    if too_old:
        oldest = ".".join(map(str, _OLDEST))
        raise TargetError(
            f"{too_old}: {oldest} or newer is needed; install one, or name it as wine in the target's config"
        )
    what = (
        f"there is no Wine {wanted!r} that runs" if wanted else "there is no Wine on this machine"
    )
    raise TargetError(f"{what}; on Debian or Ubuntu: apt-get install wine64 wine")


def _ask_version(loader: str) -> str:
    """What ``wine --version`` says; "" where it says nothing, or can't be run."""
    try:
        done = subprocess.run(
            [loader, "--version"],
            capture_output=True,
            text=True,
            env={**os.environ, "WINEDEBUG": "-all"},
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _server_of(loader: str) -> str:
    """The wineserver that goes with a loader: beside it, else the one on PATH."""
    for name in ("wineserver64", "wineserver"):
        beside = Path(loader).with_name(name)
        if os.access(beside, os.X_OK):
            return str(beside)
    found = shutil.which("wineserver")
    if found is None:
        raise TargetError(f"{loader} is here, but no wineserver; reinstall Wine")
    return found


def template(wine: Wine, run: Run) -> Path:
    """The prefix that all others are cloned from; made if there is none for this Wine and settings.

    One process makes it, others wait. It is made in ``run``, and moved to its place when complete.
    """
    key = hashlib.sha256(f"{wine.version}\0{SETTINGS}".encode()).hexdigest()[:16]
    place = cache_directory() / "wine" / key
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.is_dir():
            _need_room(place.parent)
            making = run.path / "template"
            run.record(RESOURCE, making)
            try:
                _make(wine, making)
                _remove_server(making)
                making.rename(place)
            finally:
                end(making)
                _remove(making)
    return place


def _need_room(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < TEMPLATE_ROOM:
        raise TargetError(
            f"a new Wine prefix takes up to {TEMPLATE_ROOM >> 20} MiB, and {free >> 20} MiB are free in "
            f"{folder}: {MORE_ROOM}"
        )


def _make(wine: Wine, prefix: Path) -> None:
    prefix.mkdir()
    _place_server(prefix)
    environment = wine.environment(prefix, "-all")
    settings = prefix.with_name("settings.reg")
    settings.write_text(SETTINGS, encoding="utf-8")
    for command in (["wineboot", "--init"], ["regedit", "/S", f"Z:{settings}"]):
        _run([wine.loader, *command], environment)
    _run([wine.server, "--wait"], environment)
    registry = (prefix / "user.reg").read_text(encoding="utf-8", errors="replace")
    if "RelayInclude" not in registry:
        raise TargetError(f"Wine {wine.version} did not take the settings for a new prefix")


def _run(command: list[str], environment: Mapping[str, str]) -> None:
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            start_new_session=True,
            timeout=_TEMPLATE_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TargetError(
            f"{' '.join(command)} was not done after {_TEMPLATE_TIMEOUT:g} s"
        ) from error
    if done.returncode:
        raise TargetError(
            f"{' '.join(command)} failed with exit code {done.returncode}:\n{done.stderr}"
        )


def clone(source: Path, destination: Path) -> None:
    """Clone an idle prefix: hard links for what programs only read, copies for what they write."""
    destination.mkdir()
    for folder, folders, files in os.walk(source):
        there = destination / os.path.relpath(folder, source)
        for name in folders:
            path = Path(folder, name)
            if path.is_symlink():
                (there / name).symlink_to(path.readlink())
            else:
                (there / name).mkdir()
        for name in files:
            path = Path(folder, name)
            if path.is_symlink():
                (there / name).symlink_to(path.readlink())
            elif name == _SERVER_NOTE:
                continue
            elif path.suffix in (".dll", ".exe", ".sys", ".drv", ".ocx", ".nls", ".cpl", ".acm"):
                (there / name).hardlink_to(path)
            else:
                shutil.copy2(path, there / name)
    _place_server(destination)


def end(prefix: Path, *, patience: float = 10.0) -> None:
    """End every process of ``prefix``, and return when they are gone. Raises ``TargetError`` if they stay."""
    deadline = time.monotonic() + patience
    while pids := processes(prefix):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TargetError(f"processes {pids} of {prefix} can't be ended")
        time.sleep(0.01)


def processes(prefix: Path) -> list[int]:
    """The pids of the programs of ``prefix``, its wineserver among them."""
    wanted = b"WINEPREFIX=" + os.fsencode(prefix)
    return [
        int(entry.name)
        for entry in os.scandir("/proc")
        if entry.name.isdigit() and wanted in _environment(Path(entry.path)).split(b"\0")
    ]


def _environment(process: Path) -> bytes:
    """A process's environment; b"" for another user's, and for one that is dead.

    Where the first thread has ended the process still lives in the others, and only they know it: so ends
    a winedevice.exe that uses libusb when its wineserver dies.
    """
    for path in _environments(process):
        try:
            if environment := path.read_bytes():
                return environment
        except PermissionError:
            break
        except OSError:
            continue
    return b""


def _environments(process: Path) -> Iterator[Path]:
    yield process / "environ"
    with contextlib.suppress(OSError):
        if not (process / "exe").exists():  # dead, or the kernel's own
            yield from process.glob("task/*/environ")


def remove(prefix: Path) -> None:
    """End ``prefix`` and remove it with its server's folder."""
    end(prefix)
    _remove(prefix)


def _remove(prefix: Path) -> None:
    _remove_server(prefix)
    with contextlib.suppress(
        OSError
    ):  # what stays goes with the run's folder, or with the next run
        remove_tree(prefix)


def _remove_server(prefix: Path) -> None:
    """Remove what the wineserver of an ended prefix left outside of it."""
    with contextlib.suppress(OSError):
        for folder in _server_folders(prefix):
            remove_tree(folder)


def _place_server(prefix: Path) -> None:
    """Have Debian's wineserver make its socket beside ``prefix``, so that it goes with the run.

    The note names the folder as seen from /tmp, and has to be of mode 0400: Debian's patch
    temporary-directory, the same in Wine 8 and 10. Other Wines do not look at it.
    """
    note = prefix / _SERVER_NOTE
    note.write_text(os.path.relpath(_own_server_folder(prefix), Path("/tmp").resolve()))  # noqa: S108
    note.chmod(0o400)


def _own_server_folder(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}-server")


def _server_folders(prefix: Path) -> tuple[Path, ...]:
    """Where the prefix's wineserver may have its socket: as Wine does it, and as Debian's does.

    Debian's takes the user's folder in /run where there is one, and the one that it was told else.
    """
    status = prefix.stat()
    server = f"server-{status.st_dev:x}-{status.st_ino:x}"
    return (
        Path(f"/tmp/.wine-{os.getuid()}", server),  # noqa: S108
        Path(f"/run/user/{os.getuid()}/wine", server),
        _own_server_folder(prefix),
    )
