r"""The answer file of an unattended installation, which does what no agent can do before it is there.

The rest is ``settings.py``'s. Names of components, their passes and their elements are those of Microsoft's
"Unattended Windows Setup Reference" (learn.microsoft.com/windows-hardware/customize/desktop/unattend/).
Not verified on Windows.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from pytest_kdriver.targets.recipe import WindowsSetup
from pytest_kdriver.vm_config import PORT, VmConfig

NAMESPACE: Final = "urn:schemas-microsoft-com:unattend"
_ACTION_NAMESPACE: Final = "http://schemas.microsoft.com/WMIConfig/2002/State"

AGENT_FILE: Final = "kdagent.exe"
AGENT_SERVICE: Final = "kdagent"
AGENT_PATH: Final = rf"C:\Windows\{AGENT_FILE}"
_DRIVES: Final = "D E F G H"
"""Where a CD can be; C: is the disk."""

_EFI_SIZE: Final = 260
_MSR_SIZE: Final = 16
"""MiB; the least that fits any sector size ("UEFI/GPT-based hard drive partitions")."""

_LEAST: Final = {"memory": 4096, "cpus": 2, "disk": 64 << 30}
"""What Windows 11 asks for, in MiB, processors and bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """What is in the answer file, and shall be nowhere else."""

    password: str = field(repr=False)
    product_key: str | None = field(default=None, repr=False)


def answer_file(setup: WindowsSetup, machine: VmConfig, secrets: Secrets) -> bytes:
    """``autounattend.xml`` for an installation of ``setup`` on ``machine``; it has the secrets in it."""
    root = ET.Element("unattend", {"xmlns": NAMESPACE, "xmlns:wcm": _ACTION_NAMESPACE})
    first = ET.SubElement(root, "settings", {"pass": "windowsPE"})
    international = _component(first, "Microsoft-Windows-International-Core-WinPE")
    _add(ET.SubElement(international, "SetupUILanguage"), UILanguage=setup.locale)
    _add_locale(international, setup)
    _add_setup(_component(first, "Microsoft-Windows-Setup"), setup, machine, secrets)

    second = ET.SubElement(root, "settings", {"pass": "specialize"})
    deployment = _component(second, "Microsoft-Windows-Deployment")
    _add_commands(deployment, _specialize_commands(setup, machine))

    third = ET.SubElement(root, "settings", {"pass": "oobeSystem"})
    _add_locale(_component(third, "Microsoft-Windows-International-Core"), setup)
    _add_shell(_component(third, "Microsoft-Windows-Shell-Setup"), setup, secrets)
    ET.indent(root)
    text: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return text


def is_virtio(machine: VmConfig) -> bool:
    """Whether the agent's port is one of virtio's, and no COM port."""
    return str(machine.agent_port).startswith("virtio:")


def agent_port(port: str) -> str:
    """What Windows calls a port of the machine's: a COM port, or one of virtio's, as vioserial names them."""
    match = PORT.fullmatch(port)
    assert match is not None
    return rf"\\.\COM{match[2]}" if match[2] else rf"\\.\Global\{match[1]}"


def _component(settings: ET.Element, name: str) -> ET.Element:
    return ET.SubElement(
        settings,
        "component",
        name=name,
        processorArchitecture="amd64",
        publicKeyToken="31bf3856ad364e35",
        language="neutral",
        versionScope="nonSxS",
    )


def _add(parent: ET.Element, **texts: object) -> ET.Element:
    """Add elements of text; a truth value is written as XML Schema does."""
    for tag, text in texts.items():
        ET.SubElement(parent, tag).text = str(text).lower() if isinstance(text, bool) else str(text)
    return parent


def _item(parent: ET.Element, tag: str, **texts: object) -> ET.Element:
    """Add one of a list."""
    return _add(ET.SubElement(parent, tag, {"wcm:action": "add"}), **texts)


def _add_locale(component: ET.Element, setup: WindowsSetup) -> None:
    _add(
        component,
        InputLocale=setup.locale,
        SystemLocale=setup.locale,
        UILanguage=setup.locale,
        UserLocale=setup.locale,
    )


def _add_setup(
    component: ET.Element, setup: WindowsSetup, machine: VmConfig, secrets: Secrets
) -> None:
    if bypasses := list(_bypasses(setup, machine)):
        _add_commands(component, bypasses)
    windows = _add_disk(component, uefi=machine.firmware == "uefi")

    image = ET.SubElement(ET.SubElement(component, "ImageInstall"), "OSImage")
    by = "INDEX" if isinstance(setup.edition, int) else "NAME"
    source = ET.SubElement(image, "InstallFrom")
    _item(source, "MetaData", Key=f"/IMAGE/{by}", Value=setup.edition)
    _add(ET.SubElement(image, "InstallTo"), DiskID=0, PartitionID=windows)

    user = _add(ET.SubElement(component, "UserData"), AcceptEula=True)
    key = ET.SubElement(user, "ProductKey")
    if secrets.product_key is not None:
        _add(key, Key=secrets.product_key)
    _add(key, WillShowUI="OnError")


def _bypasses(setup: WindowsSetup, machine: VmConfig) -> Iterable[str]:
    """Commands that spare Windows 11 the search for what the machine has not."""
    if setup.release != "w11":
        return
    lacking = {
        "SecureBoot": True,  # drivers under test are signed by nobody that it knows
        "TPM": not machine.tpm,
        "RAM": machine.memory < _LEAST["memory"],
        "CPU": machine.cpus < _LEAST["cpus"],
        "Storage": setup.disk < _LEAST["disk"],
    }
    for name, lacks in lacking.items():
        if lacks:
            yield _reg_add(r"SYSTEM\Setup\LabConfig", f"Bypass{name}Check")


def _reg_add(key: str, name: str, number: int = 1) -> str:
    return rf"reg.exe add HKLM\{key} /v {name} /t REG_DWORD /d {number} /f"


def _add_disk(component: ET.Element, *, uefi: bool) -> int:
    """Say how the disk is parted; the number of Windows' partition."""
    configuration = ET.SubElement(component, "DiskConfiguration")
    _add(configuration, WillShowUI="OnError")
    disk = _item(configuration, "Disk", DiskID=0, WillWipeDisk=True)
    created = ET.SubElement(disk, "CreatePartitions")
    modified = ET.SubElement(disk, "ModifyPartitions")
    windows = {"Format": "NTFS", "Label": "Windows", "Letter": "C"}
    if not uefi:
        _item(created, "CreatePartition", Order=1, Type="Primary", Extend=True)
        _item(modified, "ModifyPartition", Order=1, PartitionID=1, Active=True, **windows)
        return 1
    _item(created, "CreatePartition", Order=1, Type="EFI", Size=_EFI_SIZE)
    _item(created, "CreatePartition", Order=2, Type="MSR", Size=_MSR_SIZE)
    _item(created, "CreatePartition", Order=3, Type="Primary", Extend=True)
    _item(modified, "ModifyPartition", Order=1, PartitionID=1, Format="FAT32", Label="System")
    _item(modified, "ModifyPartition", Order=2, PartitionID=3, **windows)
    return 3


def _specialize_commands(setup: WindowsSetup, machine: VmConfig) -> Iterable[str]:
    """What runs as the system's user when Windows has first started from its disk.

    The agent's service begins at the restart behind it, and again a second after it ended: its port may
    not be there yet.
    """
    port = agent_port(str(machine.agent_port))
    program = f"{AGENT_PATH} --service {AGENT_SERVICE} --end port {port}"
    yield (
        f"cmd.exe /c for %d in ({_DRIVES}) do "
        rf"if exist %d:\{AGENT_FILE} copy /y %d:\{AGENT_FILE} {AGENT_PATH}"
    )
    yield f'sc.exe create {AGENT_SERVICE} start= auto binPath= "{program}"'
    yield f"sc.exe failure {AGENT_SERVICE} reset= 0 actions= restart/1000"
    yield f"sc.exe failureflag {AGENT_SERVICE} 1"
    if not is_virtio(
        machine
    ):  # else a "M" from the host, when Windows looks for mice, takes its port
        yield _reg_add(r"SYSTEM\CurrentControlSet\Services\sermouse", "Start", 4)
    if machine.tpm:  # each clone has a TPM of its own, which has no key of this disk
        yield _reg_add(r"SYSTEM\CurrentControlSet\Control\BitLocker", "PreventDeviceEncryption")
    if setup.release == "w11":
        yield _reg_add(r"SOFTWARE\Microsoft\Windows\CurrentVersion\OOBE", "BypassNRO")


def _add_commands(component: ET.Element, commands: Iterable[str]) -> None:
    run = ET.SubElement(component, "RunSynchronous")
    for order, command in enumerate(commands, 1):
        _item(run, "RunSynchronousCommand", Order=order, Path=command)


def _add_shell(component: ET.Element, setup: WindowsSetup, secrets: Secrets) -> None:
    _add(
        ET.SubElement(component, "OOBE"),
        HideEULAPage=True,
        HideOnlineAccountScreens=True,
        HideWirelessSetupInOOBE=True,
        ProtectYourPC=3,
    )
    accounts = ET.SubElement(component, "UserAccounts")
    password = {"Value": secrets.password, "PlainText": True}
    if setup.release.startswith("2k"):  # a server asks for it
        _add(ET.SubElement(accounts, "AdministratorPassword"), **password)
    local = ET.SubElement(accounts, "LocalAccounts")
    user = _item(local, "LocalAccount", Name=setup.user, Group="Administrators")
    _add(ET.SubElement(user, "Password"), **password)
