"""What a guest's machine has, as libvirt's XML.

Built as a tree, so that no name can be more than a name.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pytest_kdriver.errors import ConfigError
from pytest_kdriver.targets.libvirt.connection import SOCKET_PATH_LIMIT
from pytest_kdriver.vm_config import PORT

METADATA: Final = "urn:pytest-kdriver:run"
"""The namespace of the element that says whose a domain is."""

Accelerator = Literal["kvm", "tcg"]
Panic = Literal["isa", "hyperv", "none"]

_QEMU: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_SLOT: Final = 0x1E  # libvirt deals them out from the other end, and does not know of this one
CDROMS: Final = ("sdb", "sdc", "sdd", "sde", "sdf")
"""What libvirt calls the CDs: the ports of a q35's SATA that a disk leaves."""

_XML: Final = re.compile(r"[\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]*")
"""What XML can say (XML 1.0, 2.2), without what a reader takes for a line's end."""


ET.register_namespace("qemu", _QEMU)
ET.register_namespace("kdriver", METADATA)


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSpec:
    """A guest's machine.

    ``ports`` are the guest's serial ports ("virtio:NAME", "com1" to "com4") and the Unix sockets on the
    host that they are. ``console`` is a file that gets what the guest says on its first COM port, where
    that port is not in ``ports``. ``forwards`` are TCP ports of the guest which loopback ports of the
    host lead to; the host's are free ones, see ``Domain.forwarded``. ``memory`` in MiB. ``media`` are the
    CDs of an installation: the first is booted while the disk can't be.
    """

    name: str
    run: str
    owner_pid: int
    accelerator: Accelerator
    emulator: Path
    disk: Path | None
    memory: int = 1024
    cpus: int = 1
    bus: Literal["virtio", "sata"] = "virtio"
    cdrom: Path | None = None
    media: tuple[Path, ...] = ()
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str | None = None
    firmware: Literal["bios", "uefi"] = "bios"
    varstore: Path | None = None
    tpm: bool = False
    nic: Literal["virtio", "e1000e", "none"] = "virtio"
    network: str = "user"
    forwards: tuple[int, ...] = ()
    ports: tuple[tuple[str, Path], ...] = ()
    console: Path | None = None
    enlightenments: tuple[str, ...] = ()
    panic: Panic = "none"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"{self.name!r} can't be a domain's name: letters, digits, '.', '_', '-'"
            )
        for port, path in self.ports:
            if not PORT.fullmatch(port):
                raise ConfigError(f"{port!r} is no port: virtio:NAME, or com1 to com4")
            if len(bytes(path)) > SOCKET_PATH_LIMIT:
                raise ConfigError(f"{path} is too long for a socket ({SOCKET_PATH_LIMIT} bytes)")
        if len({port for port, _ in self.ports}) < len(self.ports):
            raise ConfigError(
                f"one port is used twice: {', '.join(port for port, _ in self.ports)}"
            )
        if self.firmware == "uefi" and self.varstore is None:
            raise ConfigError("UEFI needs a file for its variables")
        for text in (self.network, self.cmdline or "", *map(str, self._files())):
            if not _XML.fullmatch(text):
                raise ConfigError(f"{text!r} has characters that libvirt can't be told")
        for file in self._files():
            if "\n" in str(file):
                raise ConfigError(f"{str(file)!r} has a line's end, which libvirt takes in no path")

    @property
    def hypervisor_type(self) -> Literal["kvm", "qemu"]:
        """What libvirt calls the accelerator."""
        return "kvm" if self.accelerator == "kvm" else "qemu"

    def _files(self) -> list[Path]:
        files = [self.emulator, self.disk, self.cdrom, self.kernel, self.initrd, self.varstore]
        return [path for path in (*files, *self.media, self.console) if path is not None] + [
            p for _, p in self.ports
        ]


def domain_xml(spec: DomainSpec) -> str:
    """The domain's XML."""
    domain = ET.Element("domain", type=spec.hypervisor_type)
    _text(domain, "name", spec.name)
    metadata = ET.SubElement(domain, "metadata")
    ET.SubElement(metadata, f"{{{METADATA}}}run", id=spec.run, owner=str(spec.owner_pid))
    _text(domain, "memory", str(spec.memory), unit="MiB")
    _text(domain, "vcpu", str(spec.cpus))
    _add_boot(domain, spec)
    _add_features(domain, spec)
    _add_cpu(domain, spec)
    _add_clock(domain, spec)
    _text(domain, "on_poweroff", "destroy")
    _text(domain, "on_reboot", "restart")  # a domain that counts resets can still be looked at
    _text(domain, "on_crash", "preserve")
    _add_devices(domain, spec)
    if spec.nic != "none" and spec.network == "user":
        _add_user_network(domain, spec)
    return ET.tostring(domain, encoding="unicode")


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, attributes)
    element.text = text
    return element


def _add_boot(domain: ET.Element, spec: DomainSpec) -> None:
    os = ET.SubElement(domain, "os")
    if spec.firmware == "uefi":
        os.set("firmware", "efi")
    _text(os, "type", "hvm", arch="x86_64", machine="q35")
    if spec.firmware == "uefi":
        firmware = ET.SubElement(os, "firmware")
        for feature in ("secure-boot", "enrolled-keys"):  # drivers under test are signed by nobody
            ET.SubElement(firmware, "feature", enabled="no", name=feature)
        _text(os, "nvram", str(spec.varstore))
    if spec.kernel is not None:
        _text(os, "kernel", str(spec.kernel))
        if spec.initrd is not None:
            _text(os, "initrd", str(spec.initrd))
        if spec.cmdline is not None:
            _text(os, "cmdline", spec.cmdline)


def _add_features(domain: ET.Element, spec: DomainSpec) -> None:
    features = ET.SubElement(domain, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "apic")
    if spec.enlightenments:
        hyperv = ET.SubElement(features, "hyperv", mode="custom")
        for name in spec.enlightenments:
            feature = ET.SubElement(hyperv, name, state="on")
            if name == "spinlocks":
                feature.set("retries", "8191")


def _add_cpu(domain: ET.Element, spec: DomainSpec) -> None:
    """The processor that the accelerator was tried with.

    QEMU before 8.0 emulates ``iretq`` in user mode wrongly while SMAP is on, and Wine executes it.
    """
    if spec.accelerator == "tcg":
        cpu = ET.SubElement(domain, "cpu", mode="maximum")
        ET.SubElement(cpu, "feature", policy="disable", name="smap")
    else:
        cpu = ET.SubElement(domain, "cpu", mode="host-passthrough", migratable="on")
        ET.SubElement(cpu, "feature", policy="disable", name="arch-capabilities")


def _add_clock(domain: ET.Element, spec: DomainSpec) -> None:
    clock = ET.SubElement(domain, "clock", offset="utc")
    ET.SubElement(clock, "timer", name="rtc", tickpolicy="catchup")
    ET.SubElement(clock, "timer", name="hpet", present="no")
    if spec.enlightenments and spec.accelerator == "kvm":
        ET.SubElement(clock, "timer", name="hypervclock", present="yes")


def _add_devices(domain: ET.Element, spec: DomainSpec) -> None:
    devices = ET.SubElement(domain, "devices")
    _text(devices, "emulator", str(spec.emulator))
    if spec.disk is not None:
        boot = 1 if spec.media else None
        _add_disk(
            devices, spec.disk, device="disk", driver="qcow2", target="vda", bus=spec.bus, boot=boot
        )
    cdroms = ([spec.cdrom] if spec.cdrom is not None else []) + list(spec.media)
    for target, path in zip(CDROMS, cdroms, strict=False):
        boot = 2 if spec.media and path == spec.media[0] else None
        _add_disk(devices, path, device="cdrom", driver="raw", target=target, bus="sata", boot=boot)
    ET.SubElement(devices, "controller", type="usb", model="none")
    _add_ports(devices, spec)
    if spec.nic != "none" and spec.network != "user":
        interface = ET.SubElement(devices, "interface", type="network")
        ET.SubElement(interface, "source", network=spec.network)
        ET.SubElement(interface, "model", type=spec.nic)
    if spec.tpm:
        tpm = ET.SubElement(devices, "tpm", model="tpm-crb")
        ET.SubElement(tpm, "backend", type="emulator", version="2.0")
    video = ET.SubElement(devices, "video")  # a screenshot needs one; nobody need look at it
    ET.SubElement(video, "model", type="vga")
    ET.SubElement(devices, "memballoon", model="none")
    rng = ET.SubElement(devices, "rng", model="virtio")
    _text(rng, "backend", "/dev/urandom", model="random")
    if spec.panic != "none":
        ET.SubElement(devices, "panic", model=spec.panic)


def _add_disk(
    devices: ET.Element,
    path: Path,
    *,
    device: str,
    driver: str,
    target: str,
    bus: str,
    boot: int | None = None,
) -> None:
    disk = ET.SubElement(devices, "disk", type="file", device=device)
    options = ET.SubElement(disk, "driver", name="qemu", type=driver)
    ET.SubElement(disk, "source", file=str(path))
    ET.SubElement(disk, "target", dev=target if bus == "virtio" else f"sd{target[-1]}", bus=bus)
    if boot is not None:
        ET.SubElement(disk, "boot", order=str(boot))
    if device == "cdrom":
        ET.SubElement(disk, "readonly")
    else:
        options.set("cache", "unsafe")  # an overlay does not outlive its run
        options.set("discard", "unmap")


def _add_ports(devices: ET.Element, spec: DomainSpec) -> None:
    coms: dict[int, Path] = {}
    for port, path in spec.ports:
        match = PORT.fullmatch(port)
        assert match is not None
        if match[2]:
            coms[int(match[2]) - 1] = path
            continue
        channel = ET.SubElement(devices, "channel", type="unix")
        ET.SubElement(channel, "source", mode="bind", path=str(path))
        ET.SubElement(channel, "target", type="virtio", name=match[1])
    for number in range(max(coms, default=0) + 1):
        if path_of_com := coms.get(number):
            serial = ET.SubElement(devices, "serial", type="unix")
            ET.SubElement(serial, "source", mode="bind", path=str(path_of_com))
        elif number == 0 and spec.console is not None:
            serial = ET.SubElement(devices, "serial", type="file")
            ET.SubElement(serial, "source", path=str(spec.console))
        else:
            serial = ET.SubElement(devices, "serial", type="null")
        target = ET.SubElement(serial, "target", type="isa-serial", port=str(number))
        ET.SubElement(target, "model", name="isa-serial")


def _add_user_network(domain: ET.Element, spec: DomainSpec) -> None:
    """QEMU's own network: nothing gets out, and only loopback gets in.

    libvirt's ``<interface type='user'>`` has neither ``restrict`` nor forwarded ports.
    """
    options = ["user", "id=kdriver", "restrict=on"]
    options += [f"hostfwd=tcp:127.0.0.1:0-:{port}" for port in spec.forwards]
    model = {"virtio": "virtio-net-pci", "e1000e": "e1000e"}[spec.nic]
    commandline = ET.SubElement(domain, f"{{{_QEMU}}}commandline")
    device = f"{model},netdev=kdriver,romfile=,bus=pcie.0,addr={_SLOT:#x}"
    for argument in ("-netdev", ",".join(options), "-device", device):
        ET.SubElement(commandline, f"{{{_QEMU}}}arg", value=argument)
