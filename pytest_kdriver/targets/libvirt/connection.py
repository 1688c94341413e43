"""A connection to a local libvirt, and whom its guests run as."""

from __future__ import annotations

import os
import pwd
import queue
import re
import subprocess
import threading
import time
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import parse_qs, urlsplit

import libvirt

from pytest_kdriver.errors import TargetError

Result = TypeVar("Result")

SOCKET_PATH_LIMIT: Final = 107
"""The longest path that a Unix socket can have, in bytes (``sun_path``, less its end)."""

_CALL_TIMEOUT: Final = 30.0
_INTERRUPT_PATIENCE: Final = 10.0
"""Seconds that a call has to come to its end where the caller was interrupted, and is to undo what it did."""

_QEMU_STAMP: Final = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z (?:\S*qemu\S*: )?")
_REOPEN_TIMEOUT: Final = 10.0
_REOPEN_INTERVAL: Final = 0.1


@dataclass(frozen=True, slots=True)
class Owner:
    """Whom the guests' processes run as."""

    uid: int
    gid: int

    @property
    def name(self) -> str:
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return f"uid {self.uid}"


class Hypervisor:
    """A connection to a libvirt on this machine. Any thread may use it.

    If libvirt's daemon ends, and comes back within some seconds, the connection does too; whoever has
    called ``watch`` hears of it.
    """

    def __init__(self, uri: str, connection: libvirt.virConnect) -> None:
        self.uri = uri
        self._connection = connection
        self._lock = threading.RLock()
        self._closed = False
        self._lost = False
        self._watchers: list[Callable[[bool], None]] = []
        xml = call(connection.getDomainCapabilities, None, "x86_64", None, "qemu")
        capabilities = ET.fromstring(xml)  # noqa: S314 -- from libvirt itself
        self.version = _dotted(call(connection.getLibVersion))
        self.qemu_version = _dotted(call(connection.getVersion))
        self.emulator = Path(capabilities.findtext("path", ""))
        self.owner = self._find_owner()
        if os.geteuid() not in {0, self.owner.uid}:
            raise TargetError(
                f"guests of {uri} run as {self.owner.name}, who can't use {_me()}'s files and sockets. "
                "Use qemu:///session, or run as root"
            )
        self._listen()
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=f"libvirt {uri}", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, uri: str) -> Hypervisor:
        """Connect. Raises ``TargetError``."""
        check_uri(uri)
        _start_events()
        try:
            connection = call(libvirt.open, uri)
        except TargetError as e:
            raise TargetError(f"libvirt at {uri} can't be reached: {e}. {_how_to_mend(uri)}") from e
        return cls(uri, connection)

    @property
    def connection(self) -> libvirt.virConnect:
        """The connection; made anew where the daemon was. Raises ``TargetError``."""
        with self._lock:
            if self._closed:
                raise TargetError(f"the connection to {self.uri} was closed")
            if not self._connection.isAlive():
                self._reopen()
            return self._connection

    def close(self) -> None:
        """Close the connection; guests go on."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with suppress(libvirt.libvirtError):
                self._connection.unregisterCloseCallback()
            with suppress(libvirt.libvirtError):
                self._connection.close()
        self._work.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(_CALL_TIMEOUT)

    def defer(self, work: Callable[[], None]) -> None:
        """Have this done soon, in a thread of the connection's: libvirt's own, which must not wait, can't."""
        self._work.put(work)

    def watch(self, watcher: Callable[[bool], None]) -> None:
        """Call this when the connection broke and is back (True), or stays broken (False)."""
        with self._lock:
            self._watchers.append(watcher)

    def unwatch(self, watcher: Callable[[bool], None]) -> None:
        with self._lock, suppress(ValueError):
            self._watchers.remove(watcher)

    def hand_over(self, path: Path) -> None:
        """Give a file or a folder to whom the guests run as, and make sure that they reach it.

        Raises ``TargetError`` where a folder above keeps them out.
        """
        self.give(path)
        self.require_access(path)

    def give(self, path: Path) -> None:
        """Give a file or a folder to whom the guests run as, who need not reach it yet."""
        if self.owner.uid != os.geteuid():
            os.chown(path, self.owner.uid, self.owner.gid, follow_symlinks=False)

    def let_through(self, folder: Path) -> None:
        """Let those whom the guests run as pass through a folder that stays ours."""
        if self.owner.uid != os.geteuid():
            os.chown(folder, -1, self.owner.gid, follow_symlinks=False)
            folder.chmod(0o710)

    def let_read(self, file: Path) -> None:
        """Let those whom the guests run as read a file that stays ours, and nobody else."""
        if self.owner.uid != os.geteuid():
            os.chown(file, -1, self.owner.gid, follow_symlinks=False)
            file.chmod(0o440)

    def require_access(self, path: Path) -> None:
        """Make sure that guests can read this file or folder. Raises ``TargetError``."""
        if self.owner.uid == os.geteuid():
            readable = os.access(path, os.R_OK)
        else:
            command = ["test", "-r", os.fspath(path.absolute())]
            done = subprocess.run(
                command,
                check=False,
                cwd="/",
                user=self.owner.uid,
                group=self.owner.gid,
                extra_groups=[],
            )
            readable = done.returncode == 0
        if not readable:
            raise TargetError(
                f"guests of {self.uri} run as {self.owner.name}, who can't read {path}. "
                "Move it, or set KDRIVER_CACHE to a folder that this user can enter"
            )

    def make_socket_folder(self, announce: Callable[[Path], None] = lambda _: None) -> Path:
        """Make a folder for a guest's sockets, which nobody else can enter; its path is short.

        ``announce`` is called with its path before it is made.
        """
        runtime = os.environ.get("XDG_RUNTIME_DIR", "")
        own = self.owner.uid == os.geteuid() and os.access(runtime, os.W_OK) and len(runtime) < 40
        folder = Path(runtime if own else "/tmp", f"kdriver-{uuid.uuid4().hex[:12]}")  # noqa: S108
        announce(folder)
        folder.mkdir(mode=0o700)
        self.hand_over(folder)
        return folder

    def log_of(self, domain: str) -> Path:
        """Where libvirt writes what QEMU says of a domain."""
        if urlsplit(self.uri).path == "/system":
            return Path("/var/log/libvirt/qemu", f"{domain}.log")
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(cache, "libvirt", "qemu", "log", f"{domain}.log")

    def _find_owner(self) -> Owner:
        """The daemon's own user; the privileged daemon runs guests as another, and says as whom."""
        tree = ET.fromstring(call(self._connection.getCapabilities))  # noqa: S314 -- from libvirt itself
        for model in tree.findall("./host/secmodel"):
            label = re.fullmatch(r"\+(\d+):\+(\d+)", model.findtext("baselabel[@type='kvm']", ""))
            if model.findtext("model") == "dac" and label is not None:
                return Owner(int(label[1]), int(label[2]))
        socket = parse_qs(urlsplit(self.uri).query).get("socket")
        if socket is None:
            return Owner(os.geteuid(), os.getegid())
        status = Path(socket[0]).stat()
        return Owner(status.st_uid, status.st_gid)

    def _listen(self) -> None:
        call(self._connection.registerCloseCallback, self._on_close, None)
        call(self._connection.setKeepAlive, 5, 3)

    def _on_close(self, _connection: libvirt.virConnect, _reason: int, _opaque: object) -> None:
        self.defer(self._come_back)

    def _come_back(self) -> None:
        with self._lock:
            if self._closed:
                return
            try:
                back = bool(self.connection.isAlive())
            except TargetError:
                back = False
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher(back)

    def _reopen(self) -> None:
        deadline = time.monotonic() + (0.0 if self._lost else _REOPEN_TIMEOUT)
        while True:
            try:
                self._connection = call(libvirt.open, self.uri)
                self._listen()
                self._lost = False
                return
            except TargetError as e:
                if time.monotonic() > deadline:
                    self._lost = True  # who asks again is not to wait again
                    raise TargetError(
                        f"libvirt's daemon at {self.uri} is gone, and did not come back within "
                        f"{_REOPEN_TIMEOUT:g} s: {e}. {_how_to_mend(self.uri)}"
                    ) from e
            time.sleep(_REOPEN_INTERVAL)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            with suppress(
                TargetError, libvirt.libvirtError
            ):  # the guest or the daemon went meanwhile
                work()


def check_uri(uri: str) -> None:
    """Refuse what is no libvirt of this machine's. Raises ``TargetError``."""
    parts = urlsplit(uri)
    socket = parse_qs(parts.query).get("socket")
    if parts.scheme not in {"qemu", "qemu+unix"} and parts.scheme.partition("+")[0] == "qemu":
        raise TargetError(f"{uri} is a libvirt on another machine; only local ones can be used")
    if parts.netloc:
        raise TargetError(
            f"{uri} names the host {parts.netloc!r}; only a local libvirt can be used: "
            "qemu:///session or qemu:///system, with three slashes"
        )
    if parts.scheme not in {"qemu", "qemu+unix"} or parts.path not in {"/session", "/system"}:
        raise TargetError(
            f"{uri} is none of qemu:///session, qemu:///session?socket=PATH and qemu:///system"
        )
    if os.geteuid() == 0 and parts.path == "/session" and not socket:
        raise TargetError(
            "qemu:///session as root is the system's own libvirt. Run as an ordinary user, or say "
            'uri = "qemu:///system", or name an ordinary user\'s: uri = "qemu:///session?socket=PATH"'
        )


def call(
    function: Callable[..., Result], *arguments: object, timeout: float = _CALL_TIMEOUT
) -> Result:
    """Call libvirt, but not for longer than ``timeout`` seconds: it has no deadlines of its own.

    Raises ``TargetError`` with libvirt's own sentence. What takes too long is left to itself. Where the
    caller is interrupted the call may end first, so that what undoes it does not overtake it.
    """
    outcome: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((function(*arguments), None))
        except BaseException as e:
            outcome.put((None, e))

    name = getattr(function, "__name__", "call")
    thread = threading.Thread(target=work, name=f"libvirt {name}", daemon=True)
    try:
        thread.start()
        result, error = outcome.get(timeout=timeout)
    except queue.Empty:
        raise TargetError(f"libvirt's {name} did not return within {timeout:g} s") from None
    except BaseException:
        if thread.is_alive():
            thread.join(_INTERRUPT_PATIENCE)
        raise
    if isinstance(error, libvirt.libvirtError):
        raise TargetError(said(error)) from error
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # there was no error, so it is one


def said(error: libvirt.libvirtError) -> str:
    """The message of an error of libvirt's, as a part of a sentence."""
    text = (error.get_error_message() or str(error)).strip().rstrip(".")
    return "; ".join(_QEMU_STAMP.sub("", line) for line in text.splitlines())


_events = threading.Lock()
_listening = False


def _start_events() -> None:
    """Start the one thread of this process that listens to libvirt."""
    global _listening  # noqa: PLW0603 -- libvirt's event loop is one for each process
    with _events:
        if _listening:
            return
        libvirt.registerErrorHandler(
            _ignore, None
        )  # errors are raised; libvirt would print them, too
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_events, name="libvirt events", daemon=True).start()
        _listening = True


def _run_events() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


def _ignore(_opaque: object, _error: Any) -> None:
    return


def _dotted(version: int) -> str:
    """A version as people write it: to libvirt 9.0.0 is 9000000."""
    return f"{version // 1_000_000}.{version // 1000 % 1000}.{version % 1000}"


def _me() -> str:
    return Owner(os.geteuid(), os.getegid()).name


def _how_to_mend(uri: str) -> str:
    if "socket=" in uri:
        return "Is the daemon that owns this socket running?"
    if uri.endswith("/system"):
        return "Is libvirtd running, and are you in the group libvirt?"
    return "Is libvirt's daemon installed (Debian: libvirt-daemon-system)?"
