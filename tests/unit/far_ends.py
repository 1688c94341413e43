"""What is at the other side of a link, without an agent: ordinary programs, behind each kind of link."""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

import pytest

from pytest_kdriver.guest.links.ssh import SshConfig
from pytest_kdriver.port_stream import Decoder, Mark, MarkKind, encode_mark, encode_payload

T = TypeVar("T")

PATIENCE = 30.0


def until(ask: Callable[[], T]) -> T:
    """Ask until the answer is true."""
    deadline = time.monotonic() + PATIENCE
    while not (answer := ask()):
        assert time.monotonic() < deadline, "it never became true"
    return answer


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


class PortGuest:
    """A guest's port as QEMU has it, a Unix socket, and behind it a program for each host that comes.

    By hand and by our own codec, which is held against the agent's elsewhere.
    """

    def __init__(self, path: Path, script: str) -> None:
        self._script = script
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(1)
        self._threads: list[threading.Thread] = []
        self._programs: list[subprocess.Popen[bytes]] = []
        self._start(self._accept)

    def _start(self, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                with connection:
                    self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        """Bytes to the program as it takes them, until the host has gone."""
        decoder = Decoder(MarkKind.SYNC)
        program: subprocess.Popen[bytes] | None = None
        with suppress(OSError):
            while data := connection.recv(1 << 16):
                for event in decoder.receive_data(data):
                    if isinstance(event, Mark):
                        connection.sendall(encode_mark(MarkKind.ANSWER, event.nonce))
                        if program is None:
                            program = self._run(connection)
                    elif isinstance(event, bytes) and program is not None:
                        assert program.stdin is not None
                        program.stdin.write(event)
        if program is not None:
            assert program.stdin is not None
            with suppress(OSError):
                program.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                program.wait(0.2)
            program.kill()
            program.wait()
            assert program.stdout is not None
            program.stdout.close()

    def _run(self, connection: socket.socket) -> subprocess.Popen[bytes]:
        program = subprocess.Popen(
            python(self._script), bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._programs.append(program)
        output = program.stdout
        assert output is not None
        self._start(lambda: _send_output(output, connection))
        return program

    def close(self) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for program in self._programs:
            program.kill()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


def _send_output(output: IO[bytes], connection: socket.socket) -> None:
    """What the program writes goes to the host; its end is the connection's, one way."""
    with suppress(OSError, ValueError):
        while data := output.read(1 << 16):
            connection.sendall(encode_payload(data))
        connection.shutdown(socket.SHUT_WR)


class Sshd:
    """A real SSH server, as an ordinary process of this user's, with SFTP or without."""

    def __init__(self, folder: Path, *, sftp: bool = True) -> None:
        program = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")
        if program is None or shutil.which("ssh-keygen") is None:
            pytest.skip("sshd is not here; on Debian or Ubuntu: apt-get install openssh-server")
        if os.getuid() == 0:  # it insists on it, and else the system's service makes it
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.folder = folder
        self._sftp = "Subsystem sftp internal-sftp\n" if sftp else ""
        folder.mkdir()
        self.host_key = self.new_key("host_key")
        self.key = self.new_key("key")
        shutil.copy(self.key.with_suffix(".pub"), folder / "authorized_keys")
        self._program = program
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.known_hosts = folder / "known_hosts"
        self.know(f"[127.0.0.1]:{self.port}")
        self._start()

    def new_key(self, name: str, passphrase: str = "") -> Path:
        path = self.folder / name
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", str(path)], check=True
        )
        return path

    def know(self, name: str) -> None:
        """Write the host key down as that of the host of this name."""
        kind, key = self.host_key.with_suffix(".pub").read_text().split()[:2]
        self.known_hosts.write_text(f"# of these tests\n{name} {kind} {key}\n")

    def _start(self) -> None:
        config = self.folder / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.host_key}\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\nPidFile none\nStrictModes no\n"
            "UsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n" + self._sftp
        )
        log = (self.folder / "log").open("ab")
        self._process = subprocess.Popen(
            [self._program, "-D", "-e", "-f", str(config)], stdin=subprocess.DEVNULL, stderr=log
        )
        log.close()
        until(self._listens)

    def _listens(self) -> bool:
        assert self._process.poll() is None, (self.folder / "log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def config(self, **changes: object) -> SshConfig:
        values: dict[str, object] = {
            "host": "127.0.0.1",
            "port": self.port,
            "user": getpass.getuser(),
            "key": self.key,
            "known_hosts": self.known_hosts,
            "agent": False,
        }
        return SshConfig(**(values | changes))  # type: ignore[arg-type]

    @property
    def pid(self) -> int:
        """Its process id; each connection has a child process of its own."""
        return self._process.pid

    def kill(self) -> None:
        """End it with all that it serves, as a guest that loses its power."""
        self._process.send_signal(signal.SIGSTOP)  # so that it starts no other meanwhile
        for pid in [*_descendants(self._process.pid), self._process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    close = kill


def _descendants(pid: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:  # it grows meanwhile
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


def command_line(script: str) -> str:
    return f"exec {shlex.join(python(script))}"
