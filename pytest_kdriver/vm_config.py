"""What can be said of a virtual machine, in ``[targets.NAME]`` with ``kind = "libvirt"``, and in a recipe.

::

    image = "winevm"            # a disk image that kdriver makes; or, instead,
    disk = "path.qcow2"         # a disk of your own: it is never written to
    sha256 = "9f86d0..."        # what the disk has to be
    uri = "qemu:///session"     # the libvirt, on this machine
    cdrom = "path.iso"
    kernel = "path"             # boot this kernel, with initrd and cmdline, instead of the disk's
    initrd = "path"
    cmdline = "root=/dev/vda"
    firmware = "bios"           # "bios" | "uefi"
    tpm = false
    memory = 2048               # MiB
    cpus = 1
    bus = "virtio"              # the disk's: "virtio" | "sata"
    nic = "virtio"              # "virtio" | "e1000e" | "none"
    network = "user"            # QEMU's own, which reaches nothing; or the name of a libvirt network
    enlightenments = false      # Hyper-V's, for Windows
    kernel_log = "none"         # "kd" | "text" | "wine-trace" | "none"
    kernel_log_port = "com1"    # to "com4"; for "wine-trace" "virtio:kdriver.trace"
    agent = "serial"            # "serial" | "ssh" | "winrm"
    agent_port = "virtio:kdriver.agent"         # or "com1" to "com4"; else the guest's TCP port
    ssh_user = "root"
    ssh_key = "path"
    ssh_known_hosts = "path"
    ssh_command = "kdagent"
    winrm_user = "Administrator"
    winrm_password_file = "path"        # of one line, which only you may read
    winrm_https = true
    winrm_ca = "path"           # certificates that are trusted; else the system's
    winrm_command = "kdagent"
    boot_timeout = 300          # seconds from power on to the agent's answer
    warm_start = true           # go on from where a guest like it was once it had booted
    without = ["snapshots"]     # capabilities it shall not have

A password comes from the environment, ``KDRIVER_PASSWORD_`` and the target's name in capitals, which counts
more than a file. Paths are relative to the file that they stand in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from pytest_kdriver.config_values import (
    Check,
    Refused,
    between,
    check_values,
    flag,
    matching,
    one_of,
    path,
    seconds,
    tcp_port,
    text,
)
from pytest_kdriver.errors import ConfigError

Firmware: TypeAlias = Literal["bios", "uefi"]
Bus: TypeAlias = Literal["virtio", "sata"]
Nic: TypeAlias = Literal["virtio", "e1000e", "none"]
KernelLogKind: TypeAlias = Literal["kd", "text", "wine-trace", "none"]
"""By the kernel's debugger over a COM port, as text from one, by Wine's trace from a port of our own."""
AgentKind: TypeAlias = Literal["serial", "ssh", "winrm"]

USER_NETWORK: Final = "user"
DEFAULT_URI: Final = "qemu:///session"
PORT: Final = re.compile(r"virtio:([A-Za-z0-9_][A-Za-z0-9_.-]{0,30})|com([1-4])")
"""A port of a guest: the name of one of virtio's, or a COM port's number."""

_NETWORK: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")
_NEEDED: Final = f"needs network {USER_NETWORK!r}, whose ports are forwarded"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_IMAGE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")

VmSettings: TypeAlias = Mapping[str, object]
"""What was set, checked, under the names of ``VmConfig``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmConfig:
    """A virtual machine, defaults filled in. ``disk`` is None where it is ``image``'s."""

    image: str | None = None
    disk: Path | None = None
    sha256: str = ""
    uri: str = DEFAULT_URI
    cdrom: Path | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    firmware: Firmware = "bios"
    tpm: bool = False
    memory: int = 2048
    cpus: int = 1
    bus: Bus = "virtio"
    nic: Nic = "virtio"
    network: str = USER_NETWORK
    enlightenments: bool = False
    kernel_log: KernelLogKind = "none"
    kernel_log_port: str = ""
    agent: AgentKind = "serial"
    agent_port: str | int = "virtio:kdriver.agent"
    ssh_user: str = "root"
    ssh_key: Path | None = None
    ssh_known_hosts: Path | None = None
    ssh_command: str = "kdagent"
    winrm_user: str = "Administrator"
    winrm_password_file: Path | None = None
    winrm_https: bool = True
    winrm_ca: Path | None = None
    winrm_command: str = "kdagent"
    boot_timeout: float = 300.0
    warm_start: bool = True

    @property
    def log_port(self) -> str:
        """The port that the kernel log comes by."""
        default = "virtio:kdriver.trace" if self.kernel_log == "wine-trace" else "com1"
        return self.kernel_log_port or default

    @property
    def tcp_port(self) -> int | None:
        """The guest's TCP port whose server starts an agent for each connection; None for a resident one."""
        if self.agent == "serial":
            return None
        if isinstance(self.agent_port, int):
            return self.agent_port
        if self.agent == "ssh":
            return 22
        return 5986 if self.winrm_https else 5985


def vm_config(*settings: VmSettings, where: str = "the virtual machine") -> VmConfig:
    """The machine that ``settings`` make, the later counting more than the earlier.

    Raises ``ConfigError`` where each can be, and all together can't; ``where`` says whose they are.
    """
    merged: dict[str, object] = {}
    for some in settings:
        merged |= some
    config = VmConfig(**merged)  # type: ignore[arg-type]  # each was checked
    if (contradiction := _contradiction(config)) is not None:
        raise ConfigError(f"{where}: {contradiction}")
    return config


def _contradiction(config: VmConfig) -> str | None:
    """Which keys can't be together; None where all can."""
    if config.kernel_log in {"kd", "text"} and not config.log_port.startswith("com"):
        return (
            f"kernel_log is {config.kernel_log!r}, kernel_log_port {config.kernel_log_port!r}; "
            'allowed: "com1" to "com4"'
        )
    if config.tcp_port is not None:
        agent = config.agent
        if config.network != USER_NETWORK:
            return f"agent is {agent!r}, network {config.network!r}; agent {agent} {_NEEDED}"
        if config.nic == "none":
            return f"agent is {agent!r}, nic 'none'; agent {agent} needs one"
        return None
    if isinstance(config.agent_port, int):
        return f"agent is 'serial', agent_port {config.agent_port}; allowed: {_PORT_WORDS}"
    if config.kernel_log != "none" and config.agent_port == config.log_port:
        return f"agent_port and kernel_log_port are both {config.agent_port!r}; each needs its own"
    return None


def parse_vm(table: Mapping[str, object], where: str, folder: Path) -> dict[str, object]:
    """Check the keys of a virtual machine, each of which may be left out. Raises ``ConfigError``.

    ``where`` says what is being read, ``folder`` what paths are relative to.
    """
    settings = check_values(table, _CHECKS, where, folder)
    agent, port = settings.get("agent"), settings.get("agent_port")
    if agent in {"ssh", "winrm"}:
        if settings.get("network", USER_NETWORK) != USER_NETWORK:
            raise ConfigError(f"{where}: agent {agent} {_NEEDED}")
        if isinstance(port, str):
            raise ConfigError(f"{where}: agent_port is {port!r}; for {agent} it is a TCP port")
    elif agent == "serial" and isinstance(port, int):
        raise ConfigError(f"{where}: agent_port is {port!r}; allowed: {_PORT_WORDS}")
    return settings


_PORT_WORDS: Final = '"virtio:NAME" (at most 31 characters), "com1" to "com4"'


def _agent_port(value: object, folder: Path) -> object:
    if isinstance(value, int):
        return tcp_port(value, folder)
    return _port(value, folder)


def _port(value: object, _: Path) -> object:
    if not isinstance(value, str) or not PORT.fullmatch(value):
        raise Refused(_PORT_WORDS)
    return value


_CHECKS: Final[Mapping[str, Check]] = {
    "image": matching(_IMAGE, "the name of a disk image, see kdriver image list"),
    "disk": path,
    "sha256": matching(_SHA256, "64 lowercase hexadecimal digits"),
    "uri": text,
    "cdrom": path,
    "kernel": path,
    "initrd": path,
    "cmdline": text,
    "firmware": one_of("bios", "uefi"),
    "tpm": flag,
    "memory": between(64, 1 << 20, "MiB"),
    "cpus": between(1, 64, "a number"),
    "bus": one_of("virtio", "sata"),
    "nic": one_of("virtio", "e1000e", "none"),
    "network": matching(_NETWORK, '"user", or the name of a libvirt network'),
    "enlightenments": flag,
    "kernel_log": one_of("kd", "text", "wine-trace", "none"),
    "kernel_log_port": _port,
    "agent": one_of("serial", "ssh", "winrm"),
    "agent_port": _agent_port,
    "ssh_user": text,
    "ssh_key": path,
    "ssh_known_hosts": path,
    "ssh_command": text,
    "winrm_user": text,
    "winrm_password_file": path,
    "winrm_https": flag,
    "winrm_ca": path,
    "winrm_command": text,
    "boot_timeout": seconds,
    "warm_start": flag,
}

VM_KEYS: Final = tuple(_CHECKS)
