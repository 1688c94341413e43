"""A guest in one sector, for what is about libvirt and not about what runs there. See ``tiny_guest.S``."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pytest_kdriver.targets.libvirt.accelerator import trial_code
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.libvirt.domain import Domain
from pytest_kdriver.targets.libvirt.domain_xml import DomainSpec
from pytest_kdriver.targets.runs import remove_tree

TIMEOUT = 30.0


def trial_disk() -> bytes:
    """The trial of the accelerator, behind a boot sector that loads it to where it runs."""
    code = trial_code()
    entry = 0x8000 + code.index(b"\xb0r\xe6\xe9")
    loader = bytes.fromhex("31c0 8ed8 8ec0 8ed0 bc007c b80202 b90200 b600 bb0080 cd13 fa ea")
    return (loader + struct.pack("<HH", entry, 0)).ljust(510, b"\0") + b"\x55\xaa" + code


class TinyGuest:
    """A domain of its own over a linked clone, and the socket that its COM1 is; ``close`` removes all."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        folder: Path,
        *,
        first: str = "\0",
        boots: bytes | None = None,
        on_stop: Callable[[str], None] | None = None,
        **settings: object,
    ) -> None:
        self.hypervisor = hypervisor
        self.sockets = hypervisor.make_socket_folder()
        base, disk = folder / "base.raw", folder / "disk.qcow2"
        if boots is None:
            sector = bytearray(Path(__file__).with_name("tiny_guest.bin").read_bytes())
            sector[509] = ord(first)
            boots = bytes(sector)
        base.write_bytes(boots.ljust(1 << 20, b"\0"))
        command = [
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "-b",
            str(base),
            str(disk),
        ]
        subprocess.run(command, check=True)
        hypervisor.hand_over(disk)
        defaults: dict[str, object] = {
            "name": f"kdriver-tiny-{uuid.uuid4().hex[:12]}",
            "run": "tests",
            "owner_pid": os.getpid(),
            "accelerator": "tcg",
            "emulator": hypervisor.emulator,
            "disk": disk,
            "memory": 16,
            "nic": "none",
            "ports": (("com1", self.sockets / "com1"),),
        }
        self.spec = DomainSpec(**{**defaults, **settings})  # type: ignore[arg-type]  # checked when run
        self.domain = Domain(hypervisor, self.spec, on_stop=on_stop)
        self.domain.define()
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Start it, and wait until it answers; what it says before is lost unless someone listens."""
        self.domain.start()
        self.connect()
        self.port.settimeout(0.5)
        for _ in range(int(TIMEOUT / 0.5)):
            with suppress(TimeoutError):
                self.port.sendall(b"?")
                self._wait_for(b"?")
                break
        self.port.sendall(b"!")  # after which nothing of before can come
        self._wait_for(b"!")
        self.port.settimeout(TIMEOUT)

    def _wait_for(self, answer: bytes) -> None:
        while (said := self.port.recv(1)) != answer:
            assert said, "QEMU is gone"

    def connect(self) -> None:
        self.disconnect()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT)
        self._socket.connect(str(self.sockets / "com1"))

    @property
    def port(self) -> socket.socket:
        """COM1, once it is connected."""
        assert self._socket is not None
        return self._socket

    def ask(self, command: str) -> int:
        """Send a byte; the byte that comes back."""
        self.port.sendall(command.encode())
        return self.port.recv(1)[0]

    def send(self, command: str) -> None:
        self.port.sendall(command.encode())

    def wait_stopped(self) -> str:
        """Why it stopped; fails where it does not."""
        deadline = time.monotonic() + TIMEOUT
        while (reason := self.domain.stopped) is None:
            assert time.monotonic() < deadline, "the guest goes on"
            time.sleep(0.01)
        return reason

    def disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def close(self) -> None:
        self.disconnect()
        self.domain.destroy()
        self.domain.undefine()
        remove_tree(self.sockets)
