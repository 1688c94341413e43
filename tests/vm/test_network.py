"""The network that guests have unless a config says otherwise: QEMU's own, which leads nowhere."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from tests.vm.daemon import emulators
from tests.vm.tiny_guest import TinyGuest

Make = Callable[..., TinyGuest]


@pytest.fixture
def make(hypervisor: Hypervisor, guest_folder: Path) -> Iterator[Make]:
    guests: list[TinyGuest] = []

    def make(**settings: object) -> TinyGuest:
        guests.append(TinyGuest(hypervisor, guest_folder, **settings))  # type: ignore[arg-type]
        guests[-1].start()
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()


def _arguments(guest: TinyGuest) -> list[str]:
    (pid,) = emulators(f"={guest.spec.name},")
    return Path("/proc", str(pid), "cmdline").read_text(errors="replace").split("\0")


def _listening(pid_of: TinyGuest) -> set[str]:
    """The addresses, as the kernel writes them, of TCP sockets that listen and are QEMU's."""
    (pid,) = emulators(f"={pid_of.spec.name},")
    own = {str(fd.readlink()) for fd in Path("/proc", str(pid), "fd").iterdir()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.add(fields[1])
    return found


@pytest.mark.parametrize("nic", ["virtio", "e1000e"])
def test_the_guest_is_restricted_and_reached_by_loopback_alone(make: Make, nic: str) -> None:
    guest = make(nic=nic, forwards=(22, 5985))
    arguments = _arguments(guest)
    network = arguments[arguments.index("-netdev") + 1]
    assert "restrict=on" in network.split(",")
    ports = [guest.domain.forwarded(22), guest.domain.forwarded(5985)]
    assert _listening(guest) == {f"0100007F:{port:04X}" for port in ports}
    with socket.create_connection(("127.0.0.1", ports[0]), timeout=5):
        pass
    with pytest.raises(TargetError, match="no port of the host leads to the guest's port 80"):
        guest.domain.forwarded(80)


def test_forwarded_ports_stay_through_a_load(make: Make) -> None:
    guest = make(nic="virtio", forwards=(22,))
    port = guest.domain.forwarded(22)
    guest.domain.snapshot_save("first")
    guest.domain.snapshot_load("first")
    assert guest.domain.forwarded(22) == port


def test_no_network_is_none(make: Make) -> None:
    guest = make(nic="none")
    assert "-netdev" not in _arguments(guest)
    assert _listening(guest) == set()


def test_a_network_that_libvirt_does_not_have_is_told(
    hypervisor: Hypervisor, guest_folder: Path
) -> None:
    guest = TinyGuest(hypervisor, guest_folder, nic="virtio", network="nobody's <net>")
    try:
        with pytest.raises(TargetError, match=r"QEMU does not start: .*nobody's <net>"):
            guest.domain.start()
        assert guest.domain.stopped is not None
        assert guest.domain.stopped.startswith("did not start")
    finally:
        guest.close()
