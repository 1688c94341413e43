"""A libvirt of the tests' own: never the system's, and never run as root.

Where the tests run as root, a system user is made for it, once for each machine.
"""

from __future__ import annotations

import fcntl
import grp
import os
import pwd
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from pytest_kdriver.targets.runs import remove_tree

USER: Final = "kdriver-test"

_REAPER: Final = Path(__file__).with_name("reaper.py")
_PREFIX: Final = "kdv-"  # short: libvirt puts sockets some 60 bytes below, and 107 is all there is
_START_TIMEOUT: Final = 30.0  # the first start on a machine asks QEMU for its capabilities
_POLITE: Final = 2.0
_END_TIMEOUT: Final = 10.0


def daemon_user() -> pwd.struct_passwd:
    """Who runs the daemons: we, or, where we are root, a system user."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        pass
    home = f"/var/lib/{USER}"
    groups = [f"--groups={group.gr_name}" for group in grp.getgrall() if group.gr_name == "kvm"]
    options = [*groups, "--system", "--user-group", "--create-home", f"--home-dir={home}"]
    subprocess.run(["useradd", *options, "--shell=/usr/sbin/nologin", USER], check=True)
    return pwd.getpwnam(USER)


class PrivateLibvirt:
    """libvirtd and virtlogd below one folder; ``stop`` ends them, and any QEMU they started."""

    def __init__(self) -> None:
        remove_leftovers()
        self._user = daemon_user()
        making = Path(tempfile.mkdtemp(prefix=f"new-{_PREFIX}", dir="/tmp"))
        self._lock = os.open(making / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.folder = making.rename(making.with_name(making.name.removeprefix("new-")))  # locked
        self.folder.chmod(0o755)
        self._environment = {
            "HOME": str(self.folder),
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C",
        }
        for variable, short in (
            ("XDG_RUNTIME_DIR", "r"),
            ("XDG_CONFIG_HOME", "c"),
            ("XDG_DATA_HOME", "d"),
            ("XDG_CACHE_HOME", "k"),
        ):
            self._environment[variable] = str(self._make(self.folder / short))
        self._share_capabilities()
        self.socket = self.folder / "r" / "libvirt" / "libvirt-sock"
        self.uri = f"qemu:///session?socket={self.socket}"
        self._reapers: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start libvirtd, which starts virtlogd, and return once it answers."""
        user = self._user
        groups = ",".join(map(str, os.getgrouplist(user.pw_name, user.pw_gid)))
        identity = [str(user.pw_uid), str(user.pw_gid), groups]
        with (self.folder / "log").open("ab") as log:
            reaper = subprocess.Popen(
                [sys.executable, "-ESs", _REAPER, *identity, "libvirtd"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self._environment,
                start_new_session=True,  # a Ctrl-C at the terminal is ours
            )
        self._reapers.append(reaper)
        ready = ["virsh", "-c", self.uri, "version"]
        deadline = time.monotonic() + _START_TIMEOUT
        while subprocess.run(ready, capture_output=True, check=False).returncode:
            if reaper.poll() is not None or time.monotonic() > deadline:
                said = (self.folder / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"libvirtd did not come up:\n{said}")
            time.sleep(0.02)

    def kill(self) -> None:
        """Kill libvirtd alone: no goodbyes, and QEMU goes on."""
        pid_file = self.socket.with_name("libvirtd.pid")
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGKILL)
        while Path("/proc", str(pid)).exists():
            time.sleep(0.005)

    def processes(self) -> list[int]:
        """The daemons, and the emulators."""
        return _processes(self.folder)

    def stop(self) -> None:
        """End all of it, and remove the folder."""
        _end(self.folder)
        for reaper in self._reapers:
            reaper.wait()
        remove_tree(self.folder)
        os.close(self._lock)

    def _make(self, folder: Path) -> Path:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.geteuid() == 0:
            os.chown(folder, self._user.pw_uid, self._user.pw_gid)
        return folder

    def _share_capabilities(self) -> None:
        """Keep what libvirt learnt of QEMU for the next run: asking takes it four seconds."""
        below = self.folder / "k"
        for part in ("libvirt", "qemu"):
            below = self._make(below / part)
        kept = Path(self._user.pw_dir) / ".cache"
        for part in ("kdriver-test-libvirt", "capabilities"):
            kept = self._make(kept / part)
        (below / "cache").symlink_to(kept)


def emulators(mark: str) -> list[int]:
    """The QEMU processes that have ``mark`` in the argument that names their guest."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # gone meanwhile
            arguments = entry.read_bytes().split(b"\0")
            if any(a.startswith(b"guest=kdriver-") and mark.encode() in a for a in arguments):
                found.append(int(entry.parent.name))
    return found


def remove_leftovers() -> None:
    """End what killed test runs left behind."""
    for folder in Path("/tmp").glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if folder.stat().st_uid != os.geteuid():
                continue
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _end(folder)
                remove_tree(folder)
            finally:
                os.close(lock)


def _end(folder: Path) -> None:
    """End every process that lives below ``folder``: politely, then not."""
    began = time.monotonic()
    asked: set[int] = set()
    while alive := _processes(folder):
        waited = time.monotonic() - began
        if waited > _END_TIMEOUT:
            raise RuntimeError(f"processes of {folder} do not end: {alive}")
        for pid in alive:
            with suppress(ProcessLookupError):
                if waited > _POLITE:
                    os.kill(pid, signal.SIGKILL)
                elif pid not in asked:
                    os.kill(pid, signal.SIGTERM)
        asked.update(alive)
        time.sleep(0.02)


def _processes(folder: Path) -> list[int]:
    """Whose XDG folders are below ``folder``; libvirt sees to that for QEMU and swtpm, too."""
    mark = f"={folder}/".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found
