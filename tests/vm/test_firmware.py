"""UEFI and a TPM, and that a snapshot holds what they keep."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_kdriver.targets.libvirt.connection import Hypervisor
from tests.vm.tiny_guest import TinyGuest

TPM = 0xFED40000
REQUEST, READY, START, BUFFER = 0x08, 0x40, 0x4C, 0x80
"""Registers of the TPM's command and response buffer: locality control, control request, start, data."""

PCR_READ = bytes.fromhex("8001 00000014 0000017e 00000001 000b 03 000400")  # of PCR 10
PCR_EVENT = (
    bytes.fromhex("8002 00000021 0000013c 0000000a 00000009 40000009 0000 00 0000 0004") + b"test"
)


class Shell:
    """The UEFI shell, at COM1."""

    def __init__(self, guest: TinyGuest) -> None:
        self._port = guest.port
        self._port.settimeout(60)

    def wait(self) -> str:
        """What is said until the next prompt."""
        said = b""
        while not said.endswith(b"Shell> \x1b[0m\x1b[37m\x1b[40m"):
            said += (some := self._port.recv(4096))
            assert some, "QEMU is gone"
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", said.decode(errors="replace"))

    def run(self, command: str) -> str:
        self._port.sendall(command.encode() + b"\r")
        return self.wait()

    def poke(self, register: int, value: int, size: int = 4) -> None:
        self.run(f"mm {TPM + register:x} {value:x} -w {size} -MMIO -n")

    def peek(self, register: int) -> bytes:
        said = self.run(f"mm {TPM + register:x} -w 4 -MMIO -n")
        (value,) = re.findall(r"MMIO\s+0x\w+\s*:\s*0x(\w+)", said)
        return int(value, 16).to_bytes(4, "little")

    def ask_tpm(self, command: bytes) -> bytes:
        """The first 16 bytes of the TPM's answer."""
        self.poke(REQUEST, 1)
        self.poke(READY, 1)
        for at in range(0, len(command), 8):
            self.poke(
                BUFFER + at, int.from_bytes(command[at : at + 8].ljust(8, b"\0"), "little"), 8
            )
        self.poke(START, 1)
        deadline = time.monotonic() + 60
        while self.peek(START) != bytes(4):
            assert time.monotonic() < deadline
        return b"".join(self.peek(BUFFER + at) for at in range(0, 16, 4))

    def pcr_updates(self) -> int:
        """How often the TPM's registers have been extended."""
        return int.from_bytes(self.ask_tpm(PCR_READ)[10:14], "big")


@pytest.fixture
def guest(hypervisor: Hypervisor, guest_folder: Path) -> Iterator[TinyGuest]:
    kept = guest_folder / "kept"
    kept.mkdir()
    hypervisor.hand_over(kept)
    guest = TinyGuest(
        hypervisor,
        guest_folder,
        firmware="uefi",
        varstore=kept / "variables.fd",
        tpm=True,
        memory=128,
    )
    yield guest
    guest.close()


def test_a_load_brings_variables_and_the_tpm_back(guest: TinyGuest) -> None:
    assert guest.spec.varstore is not None
    guest.domain.start()
    guest.connect()
    shell = Shell(guest)
    shell.wait()
    before = shell.pcr_updates()
    assert guest.domain.snapshot_save("first") == "qmp"
    variables = guest.spec.varstore.read_bytes()

    shell.run("setvar kdriver -guid 12345678-1234-1234-1234-123456789abc -bs -rt -nv =0x01")
    assert guest.spec.varstore.read_bytes() != variables
    assert shell.ask_tpm(PCR_EVENT)[6:10] == bytes(4)
    assert shell.pcr_updates() == before + 1

    guest.domain.snapshot_load("first")
    shell.run("")
    assert shell.pcr_updates() == before
    deadline = time.monotonic() + 10
    while guest.spec.varstore.read_bytes() != variables:  # QEMU writes it back
        assert time.monotonic() < deadline
        time.sleep(0.05)
    guest.domain.destroy()
    guest.domain.undefine()
    assert not guest.spec.varstore.exists()
