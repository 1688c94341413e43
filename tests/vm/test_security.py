"""What a guest can reach, what names can become, and who may read what is written down."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pytest_kdriver.errors import AgentError
from pytest_kdriver.targets.disk_images import DiskImage
from pytest_kdriver.targets.libvirt.address import SshAddress
from pytest_kdriver.targets.libvirt.base_disk import BaseDisk, make_overlay
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.libvirt.kept import KeptVm
from pytest_kdriver.targets.libvirt.machine import LibvirtMachine
from pytest_kdriver.targets.machine_target import MachineTarget
from tests.vm.daemon import emulators
from tests.vm.tiny_guest import TinyGuest

PATIENCE = 120.0

PROBES = r"""
mkdir -p /run/systemd/network
cat >/run/systemd/network/00-eth.network <<'END'
[Match]
Name=eth*
[Network]
Address=10.0.2.15/24
Gateway=10.0.2.2
Gateway=fe80::2
LinkLocalAddressing=ipv6
IPv6AcceptRA=no
[Address]
Address=fec0::15/64
DuplicateAddressDetection=none
END
systemctl restart systemd-networkd
for needed in route:0202000A if_inet6:fe80.*eth0 ipv6_route:^0.*eth0
do until grep -q ${needed#*:} /proc/net/${needed%:*}; do sleep 0.1; done; done
tcp() {
    if timeout 4 bash -c "exec 3<>/dev/tcp/$1/$2" 2>/dev/null; then echo "tcp $1 $2"; fi
}
dns() {  # a query for localhost; any answer at all counts
    exec 4<>/dev/udp/$1/53 || return
    printf '\0\1\1\0\0\1\0\0\0\0\0\0\11localhost\0\0\1\0\1' >&4
    if [ -n "$(timeout 4 head -c 1 <&4 | od -An)" ]; then echo "dns $1"; fi
}
udp() { echo hello >/dev/udp/$1/$2; }
{
"""


@pytest.fixture
def listeners() -> Iterator[dict[str, socket.socket]]:
    """Whoever might be reached on this host: at loopback alone and at each address, by TCP and by UDP."""
    kinds = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
    with ExitStack() as stack:
        found = {}
        for name, kind in kinds.items():
            for address in ("127.0.0.1", "0.0.0.0", "::1"):
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                listener = stack.enter_context(socket.socket(family, kind))
                listener.bind((address, 0))
                if kind == socket.SOCK_STREAM:
                    listener.listen()
                listener.settimeout(0.0)
                found[f"{name} {address}"] = listener
        yield found


def port_of(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port


def heard(listener: socket.socket) -> bool:
    """Whether anybody came."""
    try:
        if listener.type == socket.SOCK_STREAM:
            listener.accept()[0].close()
        else:
            listener.recv(100)
    except BlockingIOError:
        return False
    return True


def own_address() -> str:
    """An address of this host's that is not loopback's, if it has one; nothing is sent."""
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "192.0.2.1"
        address: str = probe.getsockname()[0]
        return address


def run_script(target: MachineTarget, script: str) -> list[str]:
    """Run a script of the guest's bash; the lines of its output. Wine tells no end of Unix programs."""
    agent = target.agent
    text = (
        f"{PROBES}{script}\nwait\n}} >/tmp/probes.new 2>/dev/null\nmv /tmp/probes.new /tmp/probes\n"
    )
    agent.put(text.encode(), r"Z:\tmp\probes.sh")
    agent.run([r"Z:\bin\bash", "/tmp/probes.sh"], time_limit=PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return agent.get(r"Z:\tmp\probes").decode().splitlines()
        except AgentError:
            assert time.monotonic() < deadline, "the script did not end"
            time.sleep(0.1)


class TestNetwork:
    def test_reaches_neither_the_host_nor_the_outside(
        self, winevm: MachineTarget, listeners: dict[str, socket.socket]
    ) -> None:
        tcp = [port_of(found) for name, found in listeners.items() if name.startswith("tcp")]
        udp = [port_of(found) for name, found in listeners.items() if name.startswith("udp")]
        hosts = ("10.0.2.2", own_address(), "fec0::2", "fe80::2%eth0")
        probes = [f"tcp {host} {port} &" for host in hosts for port in tcp]
        probes += [f"udp {host} {port} &" for host in hosts for port in udp]
        probes += [f"tcp {host} 53 &" for host in ("10.0.2.3", "fec0::3")]
        probes += [f"tcp {host} 443 &" for host in ("1.1.1.1", "2606:4700:4700::1111")]
        probes += ["dns 10.0.2.3 &", "dns fec0::3 &", "dns 1.1.1.1 &"]
        reached = run_script(winevm, "\n".join(["tcp 127.0.0.1 22", "tcp 10.0.2.15 22", *probes]))
        assert reached == ["tcp 127.0.0.1 22", "tcp 10.0.2.15 22"]
        assert [name for name, listener in listeners.items() if heard(listener)] == []

    def test_is_there_all_the_same(self, winevm: MachineTarget) -> None:
        """What the test before proves would be nothing if the guest had no network."""
        machine = winevm.machine
        assert isinstance(machine, LibvirtMachine)
        domain = machine._running().domain
        run_script(winevm, "")
        domain.monitor("human-monitor-command", command_line="hostfwd_add tcp:127.0.0.1:0-:22")
        port = domain.forwarded(22)
        try:
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
                connection.settimeout(PATIENCE)
                assert connection.recv(8) == b"SSH-2.0-"
        finally:
            command = f"hostfwd_remove tcp:127.0.0.1:{port}"
            domain.monitor("human-monitor-command", command_line=command)


AWKWARD = ["a,b=c,,d", 'it\'s "quoted"', "<a>&amp;]]>", "$HOME `id` %s \\", "naïve ü"]


@pytest.mark.parametrize("name", AWKWARD)
def test_a_path_is_only_a_path(hypervisor: Hypervisor, guest_folder: Path, name: str) -> None:
    """QEMU takes options apart at commas, libvirt writes XML and JSON, shells have signs of their own."""
    folder = guest_folder / name
    folder.mkdir()
    hypervisor.hand_over(folder)
    cdrom = folder / f"{name}.iso"
    cdrom.write_bytes(bytes(1 << 20))
    cdrom.chmod(0o644)
    console = folder / f"{name}.log"
    guest = TinyGuest(hypervisor, folder, cdrom=cdrom, console=console, ports=())
    try:
        guest.domain.start()
        opened = [block["inserted"] for block in guest.domain.monitor("query-block")]
        files = {entry["image"]["filename"] for entry in opened}
        assert files == {str(cdrom), str(folder / "disk.qcow2")}
        (disk,) = (entry for entry in opened if not entry["ro"])
        assert disk["image"]["backing-image"]["filename"] == str(folder / "base.raw")
        assert console.exists()
    finally:
        guest.close()


@pytest.mark.parametrize("name", [*AWKWARD, "-o backing_file=x", "json:{}"])
def test_a_clone_is_of_the_disk_that_was_named(
    own_cache: Path, guest_folder: Path, name: str
) -> None:
    folder = guest_folder / name
    folder.mkdir()
    disk = folder / f"{name}.raw"
    disk.write_bytes(b"here".ljust(1 << 20, b"\0"))
    overlay = folder / f"{name}.qcow2"
    make_overlay(BaseDisk(disk).path, overlay)
    flat = guest_folder / "flat.raw"
    command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", "--", str(overlay), str(flat)]
    subprocess.run(command, check=True)
    assert flat.read_bytes() == disk.read_bytes()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class TestFiles:
    def test_of_a_run_are_nobody_elses(self, winevm: MachineTarget) -> None:
        """Sockets are the group's, too, as libvirt makes them; so it is the folder that matters."""
        machine = winevm.machine
        assert isinstance(machine, LibvirtMachine)
        vm = machine._running()
        run = vm.folder.parent
        assert mode(vm.sockets) == 0o700
        assert {path.name for path in vm.sockets.iterdir()} == {"agent", "trace"}
        assert mode(vm.folder) == 0o700
        assert mode(run) & 0o027 == 0
        assert mode(run / "resources") == mode(run / "lock") == 0o600

    def test_of_an_image_keep_its_key_and_its_password(
        self, winevm: MachineTarget, winevm_image: DiskImage
    ) -> None:
        """The disk has both; it may be of the group of whom guests run as, where that is another user."""
        assert mode(winevm_image.folder / "id_ed25519") == 0o600
        assert mode(winevm_image.folder / "winrm_password") == 0o600
        assert mode(winevm_image.disk) in {0o400, 0o440}

    def test_of_a_kept_machine_have_no_password(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KDRIVER_PASSWORD_MINE", "correct horse")
        address = SshAddress(
            port=22,
            user="root",
            key=None,
            known_hosts=None,
            host_key_alias="kdriver-mine",
            command="kdagent",
            password_variable="KDRIVER_PASSWORD_MINE",
        )
        kept = KeptVm(
            folder=tmp_path,
            target="mine",
            domain="kdriver-mine-1",
            uri="qemu:///session",
            console="/console",
            address=address,
        )
        mask = os.umask(0)
        try:
            kept.write()
        finally:
            os.umask(mask)
        assert mode(tmp_path / "vm.json") == 0o600
        written = (tmp_path / "vm.json").read_text()
        assert "correct horse" not in written + repr(kept) + kept.how_to_reach()

    def test_of_a_console_are_not_qemus_own(self, winevm: MachineTarget) -> None:
        """virtlogd has it, and begins a new one at its size: a guest that talks for ever fills no disk."""
        machine = winevm.machine
        assert isinstance(machine, LibvirtMachine)
        spec = machine._running().domain.spec
        assert spec.console is not None
        assert spec.console.exists()
        (pid,) = emulators(f"={spec.name},")
        opened = {fd.readlink() for fd in Path("/proc", str(pid), "fd").iterdir()}
        assert spec.console not in opened
