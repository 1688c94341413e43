"""An agent that an SSH server starts for us, over its standard input and output. SFTP brings its file."""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final, TypeVar

from pytest_kdriver.errors import LinkError
from pytest_kdriver.guest.links.outbox import Outbox
from pytest_kdriver.guest.words import words

if TYPE_CHECKING:
    import paramiko

CLOSE_TIMEOUT: Final = 5.0
"""How long, in seconds, the agent may take to end after its input did, before the connection is cut."""

KEEPALIVE: Final = 10.0
"""How often, in seconds, something is sent over a connection that is silent."""

PEER_TIMEOUT: Final = 30.0
"""How long, in seconds, the other machine may not confirm what was sent, before it counts as dead."""

_CHUNK = 1 << 16
_TICK = 0.2
"""How often, in seconds, who waits looks at what wakes nobody: the agent's exit code, a deadline."""

_LAST_WORDS = 2000
"""How many bytes of what the agent writes to its standard error are kept."""

_LOST = (EOFError, OSError)
"""What a channel raises where the connection ends while it tells the other side how much it has read."""

STANDARD_PORT: Final = 22

_Keys = Mapping[str, "paramiko.PKey"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SshConfig:
    """Where to, and who we are.

    ``key`` is a private key's file. What is given is tried in this order: ``key``, the keys of ssh-agent if
    ``agent``, ``password`` (which also opens ``key``). ``known_hosts`` None is the user's own file;
    ``host_key_alias`` is how it calls the server, if not by host and port.
    """

    host: str
    port: int = STANDARD_PORT
    user: str
    key: Path | None = None
    password: str | None = field(default=None, repr=False)
    known_hosts: Path | None = None
    agent: bool = True
    host_key_alias: str | None = None


class SshServerDown(LinkError):
    """Nobody listens there, or hangs up before a word: the machine may be on its way up."""


class SshLink:
    """A ``Link`` to a program that an SSH server starts, by paramiko.

    The server's host key must be known. It is the end of the stream when the program ends, even if one that
    it left behind keeps its output open, and when the other machine is silent for too long.

    ``LinkError`` if the server can't be reached, does not show the known key, does not let us in or does not
    start the command; ``TimeoutError`` if all that takes more than ``timeout`` seconds.
    """

    def __init__(
        self,
        config: SshConfig,
        command: str,
        *,
        timeout: float,
        close_timeout: float = CLOSE_TIMEOUT,
    ) -> None:
        self._close_timeout = close_timeout
        self._closed = False
        self._ended: str | None = None
        self._last_words = b""
        self._outbox = Outbox(self._write)
        self._receiving = threading.Lock()
        self._closing = threading.Lock()
        self._transport, self._channel = _connect(config, command, timeout)
        self._channel.settimeout(_TICK)
        self._errors = threading.Thread(
            target=self._read_errors, name="kdriver-ssh-stderr", daemon=True
        )
        self._errors.start()

    @property
    def ended(self) -> str | None:
        """See ``Link.ended``."""
        return self._ended

    def send(self, data: bytes, timeout: float) -> None:
        """See ``Link.send``."""
        self._outbox.send(data, timeout)

    def _write(self, data: bytes, deadline: float) -> bytes:
        rest = memoryview(data)
        while rest and not (self._closed or self._ended):
            left = deadline - time.monotonic()
            self._channel.settimeout(min(max(left, 0.001), _TICK))
            try:
                count = self._channel.send(rest[:_CHUNK].tobytes())
            except TimeoutError:
                if left > _TICK:
                    continue
                return bytes(rest)
            except _LOST:
                break
            finally:
                self._channel.settimeout(_TICK)
            if count == 0:
                break
            rest = rest[count:]
        if rest:
            raise LinkError(
                "the link is closed" if self._closed else f"the agent is gone: {self._why()}"
            )
        return b""

    def receive(self) -> bytes:
        """See ``Link.receive``."""
        with self._receiving:
            while not (self._closed or self._ended):
                exited = self._channel.exit_status_ready()
                try:
                    data = bytes(self._channel.recv(_CHUNK))
                except TimeoutError:
                    data = b""
                    if not exited:
                        continue
                except _LOST:
                    data = b""
                if self._closed:
                    break
                if data:
                    return data
                self._ended = self._why()
            return b""

    def _why(self) -> str:
        """Why the stream is at its end."""
        if not self._channel.status_event.wait(_TICK):
            return "it closed its output"
        code = self._channel.exit_status
        if code == -1:
            reason = words(str(self._transport.saved_exception or ""))
            lost = "it was ended" if self._transport.is_active() else "the connection was lost"
            return f"{lost}: {reason}" if reason else lost
        self._errors.join(_TICK)
        said = words(self._last_words.decode(errors="replace").strip())
        return f"it ended with exit code {code}" + (f" and said: {said}" if said else "")

    def _read_errors(self) -> None:
        """Take what the agent complains of, for what nobody takes would stop it at some time."""
        while True:
            try:
                data = bytes(self._channel.recv_stderr(_CHUNK))
            except TimeoutError:
                continue
            except _LOST:
                return
            if not data:
                return
            self._last_words = (self._last_words + data)[-_LAST_WORDS:]

    def close(self) -> None:
        """See ``Link.close``. The agent's input ends first; where it stays, the connection is cut."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(OSError, EOFError):
                self._channel.shutdown_write()
            self._channel.status_event.wait(self._close_timeout)
            self._channel.close()
            _cut(self._transport)
            with self._outbox.lock, self._receiving:
                self._errors.join()


def place_file(config: SshConfig, content: bytes, path: str, *, timeout: float) -> bool:
    """See to it by SFTP that the server's file ``path`` has ``content``; whether it had to be copied.

    It appears whole or not at all. Folders are made. ``path`` is as SFTP has it. Errors are those of
    ``SshLink``.
    """
    ssh = _paramiko()

    def place(transport: paramiko.Transport) -> bool:
        try:
            sftp = ssh.SFTPClient.from_transport(transport)
        except (ssh.SSHException, EOFError) as error:
            if not transport.is_active():
                raise
            told = words(str(error)) or "it closed the channel"
            raise LinkError(
                f"the SSH server {config.host}:{config.port} has no SFTP ({told}): give its sshd_config the "
                "line Subsystem sftp, with its sftp-server behind it"
            ) from None
        return _Sftp(sftp, f"on {config.host}:{config.port}").place(content, path)

    transport, copied = _reach(config, f"take the file {path}", place, timeout)
    _cut(transport)
    return copied


class _Sftp:
    """An SFTP session. ``where`` says with whom."""

    def __init__(self, client: paramiko.SFTPClient, where: str) -> None:
        self._client = client
        self._where = where

    def place(self, content: bytes, path: str) -> bool:
        if self._has(content, path):
            return False
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.new"
        try:
            self._make_folder(path.rpartition("/")[0])
            self._write(content, temporary)
            self._rename(content, temporary, path)
        except BaseException:
            with contextlib.suppress(Exception):
                self._client.remove(temporary)
            raise
        return True

    def _has(self, content: bytes, path: str) -> bool:
        try:
            with self._client.open(path, "rb") as file:
                return bytes(file.read(len(content) + 1)) == content
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._error(error, f"{path} can't be read") from None

    def _make_folder(self, folder: str) -> None:
        """Make it with what is missing above it; a drive of Windows is there."""
        if not folder or folder.endswith(":"):
            return
        try:
            self._client.stat(folder)
        except FileNotFoundError:
            self._make_folder(folder.rpartition("/")[0])
        except OSError as error:
            raise self._error(error, f"the folder {folder} can't be entered") from None
        else:
            return
        try:
            self._client.mkdir(folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._client.stat(folder)
                return  # another run was faster
            raise self._error(error, f"the folder {folder} can't be made") from None

    def _write(self, content: bytes, path: str) -> None:
        try:
            with self._client.open(path, "wb") as file:
                file.write(content)
        except OSError as error:
            full = "" if error.errno else " (is its disk full?)"  # which SFTP has no word for
            raise self._error(error, f"{path} can't be written{full}") from None

    def _rename(self, content: bytes, path: str, name: str) -> None:
        try:
            self._client.posix_rename(path, name)  # OpenSSH's own, on Windows too
        except OSError as error:
            if self._has(content, name):
                self._client.remove(path)  # another run was faster, and its agent may run already
                return
            raise self._error(
                error,
                f"{path} can't be renamed to {name} (if that is there, does it run? End it, or give the "
                "target another agent_path)",
            ) from None

    def _error(self, error: OSError, told: str) -> OSError | LinkError:
        """What to raise. A connection that ended is the caller's to tell."""
        if (
            isinstance(error, TimeoutError)
            or not self._client.get_channel().get_transport().is_active()
        ):
            return error
        why = words(error.strerror or str(error)) or "no reason was given"
        return LinkError(f"{self._where}, {told}: {why}")


def _connect(
    config: SshConfig, command: str, timeout: float
) -> tuple[paramiko.Transport, paramiko.Channel]:
    """Connect, check who is there, say who we are, and start the command."""

    def start(transport: paramiko.Transport) -> paramiko.Channel:
        transport.set_keepalive(KEEPALIVE)
        channel = transport.open_session()
        channel.exec_command(command)
        return channel

    return _reach(config, "start the agent", start, timeout)


def _reach(
    config: SshConfig, what: str, use: Callable[[paramiko.Transport], T], timeout: float
) -> tuple[paramiko.Transport, T]:
    """Connect, check who is there, say who we are, and do what ``use`` does, which is called ``what``."""
    ssh = _paramiko()
    where = f"SSH server {config.host}:{config.port}"
    deadline = time.monotonic() + timeout
    known = _read_known_hosts(ssh, config)
    key = _read_key(ssh, config)
    doing = "take the connection"
    transport = None
    met = False
    try:
        connection = socket.create_connection((config.host, config.port), timeout)
        _watch_peer(connection)
        transport = ssh.Transport(connection)
        with _cut_at(transport, deadline):
            doing = "say who it is"
            _start(transport, known, timeout)
            met = True
            _check_host_key(config, transport.get_remote_server_key(), known)
            doing = "let us in"
            _authenticate(ssh, transport, config, key)
            doing = what
            done = use(transport)
    except BaseException as error:
        if transport is not None:
            _cut(transport)
        if not isinstance(error, (ssh.SSHException, EOFError, OSError)):
            raise
        # "from None", for a report of pytest's shows what functions were called with: the password.
        if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
            raise TimeoutError(f"the {where} did not {doing} within {timeout:g} s") from None
        told = words(str(error)) or "it hung up"
        kind = LinkError if met else SshServerDown
        raise kind(f"the {where} did not {doing}: {told}") from None
    if time.monotonic() >= deadline:
        _cut(transport)
        raise TimeoutError(f"the {where} did not {doing} within {timeout:g} s")
    return transport, done


def _paramiko() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old ciphers that its libraries are about to drop
            import paramiko
    except ImportError as error:
        raise LinkError(
            f"a target that is reached by SSH needs paramiko ({error}): pip install 'pytest-kdriver[ssh]'"
        ) from error
    # What it has to say is in its exceptions; without a handler Python would write it to stderr, too.
    logging.getLogger("paramiko").addHandler(logging.NullHandler())
    module: ModuleType = paramiko
    return module


def _watch_peer(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(PEER_TIMEOUT * 1000))


@contextlib.contextmanager
def _cut_at(transport: paramiko.Transport, deadline: float) -> Iterator[None]:
    """Cut the connection at the deadline: not all that waits for the server takes a timeout."""
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), transport.close)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _cut(transport: paramiko.Transport) -> None:
    transport.close()
    if transport.ident is not None:
        transport.join(CLOSE_TIMEOUT)
    transport.sock.close()


def _start(transport: paramiko.Transport, known: _Keys, timeout: float) -> None:
    """Agree on keys and ciphers: if it can be, on a host key of a kind that is known."""
    transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = timeout
    options = transport.get_security_options()
    kinds = {"rsa" if "rsa" in kind else kind for kind in known}
    options.key_types = sorted(
        options.key_types, key=lambda kind: ("rsa" if "rsa" in kind else kind) not in kinds
    )
    transport.start_client()


def _read_known_hosts(ssh: ModuleType, config: SshConfig) -> _Keys:
    """The keys of this host by their kinds; none where the file is not there."""
    path = _known_hosts(config)
    try:
        keys = ssh.HostKeys(str(path))
    except FileNotFoundError:
        return {}
    except (OSError, ssh.SSHException, ssh.hostkeys.InvalidHostKey) as error:
        raise LinkError(f"the known host keys can't be read: {error}") from error
    return dict(keys.lookup(_known_name(config)) or {})


def _check_host_key(config: SshConfig, shown: paramiko.PKey, known: _Keys) -> None:
    name, path = _known_name(config), _known_hosts(config)
    told = f"{shown.get_name()} {_fingerprint(shown)}"
    if not known:
        raise LinkError(
            f"{name} shows the host key {told}, and {path} knows none of this host. If it is the right one, "
            f"add this line there: {name} {shown.get_name()} {shown.get_base64()}"
        )
    expected = known.get(shown.get_name())
    if expected is None or expected.asbytes() != shown.asbytes():
        keys = ", ".join(f"{kind} {_fingerprint(key)}" for kind, key in known.items())
        raise LinkError(
            f"{name} shows the host key {told}, but {path} knows {keys}: this is another machine, or it was "
            f"made anew. If it was, remove the old key: ssh-keygen -f '{path}' -R '{name}'"
        )


def _known_hosts(config: SshConfig) -> Path:
    return config.known_hosts or Path.home() / ".ssh" / "known_hosts"


def _known_name(config: SshConfig) -> str:
    """How known_hosts calls the server."""
    if config.host_key_alias is not None:
        return config.host_key_alias
    return config.host if config.port == STANDARD_PORT else f"[{config.host}]:{config.port}"


def _fingerprint(key: paramiko.PKey) -> str:
    """As OpenSSH shows it."""
    fingerprint: str = key.fingerprint
    return fingerprint


def _read_key(ssh: ModuleType, config: SshConfig) -> paramiko.PKey | None:
    if config.key is None:
        return None
    try:
        try:
            return ssh.PKey.from_path(config.key)
        except TypeError:  # it is encrypted
            if config.password is None:
                raise LinkError(
                    f"the SSH key {config.key} needs a passphrase: give it to ssh-agent (ssh-add)"
                ) from None
            return ssh.PKey.from_path(config.key, config.password.encode())
    except (OSError, ValueError, ssh.SSHException, ssh.UnknownKeyType) as error:
        # "from None", for a report of pytest's shows what functions were called with: the passphrase.
        raise LinkError(f"the SSH key {config.key} can't be read: {error}") from None


def _authenticate(
    ssh: ModuleType,
    transport: paramiko.Transport,
    config: SshConfig,
    key: paramiko.PKey | None,
) -> None:
    tried = []
    with contextlib.ExitStack() as stack:
        keys = [] if key is None else [(f"the key {config.key}", key)]
        if config.agent:
            agent = stack.enter_context(contextlib.closing(ssh.Agent()))
            keys += [("a key of ssh-agent", agent_key) for agent_key in agent.get_keys()]
        attempts: list[tuple[str, Callable[[], object]]] = [
            (name, functools.partial(transport.auth_publickey, config.user, offered))
            for name, offered in keys
        ]
        if config.password is not None:
            # No local variable has the password: pytest's --showlocals shows them.
            attempts.append(
                ("the password", lambda: transport.auth_password(config.user, config.password))
            )
        for name, authenticate in attempts:
            tried.append(name)
            with contextlib.suppress(ssh.AuthenticationException):
                authenticate()
            if transport.is_authenticated():
                return
            if not transport.is_active():
                raise ssh.SSHException(f"it hung up after {name}")
    refused = (
        " and ".join(dict.fromkeys(tried)) or "nothing (no key, ssh-agent or password is there)"
    )
    raise LinkError(
        f"{config.host}:{config.port} did not let the user {config.user} in; tried: {refused}. "
        "Name a key or give a password that this server takes"
    )
