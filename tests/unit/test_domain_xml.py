"""A guest's machine as libvirt's XML: what is asked for is there, and no name is more than a name."""

from __future__ import annotations

import os
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kdriver.errors import ConfigError
from pytest_kdriver.targets.libvirt.domain_xml import DomainSpec, domain_xml

QEMU_ARGUMENT = "{http://libvirt.org/schemas/domain/qemu/1.0}arg"


def spec(**settings: object) -> DomainSpec:
    defaults: dict[str, object] = {
        "name": "kdriver-mine-1",
        "run": "4711-abcdef01",
        "owner_pid": 4711,
        "accelerator": "tcg",
        "emulator": Path("/usr/bin/qemu-system-x86_64"),
        "disk": Path("/runs/disk.qcow2"),
    }
    return DomainSpec(**{**defaults, **settings})  # type: ignore[arg-type]  # checked when run


def tree(**settings: object) -> ET.Element:
    return ET.fromstring(domain_xml(spec(**settings)))


EVERYTHING: dict[str, object] = {
    "accelerator": "kvm",
    "bus": "sata",
    "cdrom": Path("/iso/a.iso"),
    "kernel": Path("/boot/vmlinuz"),
    "initrd": Path("/boot/initrd"),
    "cmdline": 'root=/dev/vda x="a<b>&c"',
    "firmware": "uefi",
    "varstore": Path("/runs/variables.fd"),
    "tpm": True,
    "nic": "e1000e",
    "network": "lab",
    "ports": (("virtio:kdriver.agent", Path("/s/agent")), ("com2", Path("/s/trace"))),
    "console": Path("/runs/console"),
    "enlightenments": ("relaxed", "spinlocks", "vpindex", "synic", "stimer"),
    "panic": "hyperv",
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"forwards": (22, 5985)},
        {"nic": "none"},
        {"media": (Path("/iso/windows"), Path("/iso/ours")), "bus": "sata"},
        EVERYTHING,
    ],
)
def test_it_is_what_libvirts_schema_allows(settings: dict[str, object], tmp_path: Path) -> None:
    if shutil.which("virt-xml-validate") is None:
        pytest.skip("needs virt-xml-validate (Debian: libvirt-clients)")
    file = tmp_path / "domain.xml"
    file.write_text(domain_xml(spec(**settings)))
    done = subprocess.run(
        ["virt-xml-validate", str(file), "domain"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_path_with_a_line_s_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="has a line's end"):
        domain_xml(spec(cdrom=Path("/a\nb.iso")))


def test_it_says_whose_it_is() -> None:
    run = ET.fromstring(domain_xml(spec())).find("metadata/{urn:pytest-kdriver:run}run")
    assert run is not None
    assert run.attrib == {"id": "4711-abcdef01", "owner": "4711"}


def test_emulation_has_no_smap() -> None:
    cpu = tree().find("cpu")
    assert cpu is not None
    assert cpu.get("mode") == "maximum"
    assert [(f.get("name"), f.get("policy")) for f in cpu] == [("smap", "disable")]


def test_kvm_has_the_processor_that_was_tried() -> None:
    cpu = tree(accelerator="kvm").find("cpu")
    assert cpu is not None
    assert cpu.get("mode") == "host-passthrough"
    assert [(f.get("name"), f.get("policy")) for f in cpu] == [("arch-capabilities", "disable")]


def test_the_network_is_restricted() -> None:
    arguments = [a.get("value", "") for a in tree(forwards=(22, 80)).iter(QEMU_ARGUMENT)]
    assert arguments[:2] == [
        "-netdev",
        "user,id=kdriver,restrict=on,hostfwd=tcp:127.0.0.1:0-:22,hostfwd=tcp:127.0.0.1:0-:80",
    ]
    assert arguments[3].startswith("virtio-net-pci,netdev=kdriver,")


def test_a_network_of_the_users_is_libvirts_and_not_qemus() -> None:
    domain = tree(network="lab", forwards=(22,))
    source = domain.find("devices/interface[@type='network']/source")
    assert source is not None
    assert source.get("network") == "lab"
    assert not list(domain.iter(QEMU_ARGUMENT))


def test_it_has_no_sound_no_usb_and_no_balloon() -> None:
    devices = tree().find("devices")
    assert devices is not None
    assert devices.find("sound") is None
    assert devices.find("controller[@type='usb']").get("model") == "none"  # type: ignore[union-attr]
    assert devices.find("memballoon").get("model") == "none"  # type: ignore[union-attr]


def test_ports_are_sockets_and_the_console_has_the_port_that_is_left() -> None:
    devices = tree(
        ports=(("virtio:a.b", Path("/s/a")), ("com2", Path("/s/b"))), console=Path("/c")
    ).find("devices")
    assert devices is not None
    (channel,) = devices.findall("channel")
    assert channel.find("source").attrib == {"mode": "bind", "path": "/s/a"}  # type: ignore[union-attr]
    assert channel.find("target").attrib == {"type": "virtio", "name": "a.b"}  # type: ignore[union-attr]
    first, second = devices.findall("serial")
    assert first.get("type") == "file"
    assert second.get("type") == "unix"
    assert second.find("source").get("path") == "/s/b"  # type: ignore[union-attr]


def test_a_port_that_is_used_leaves_no_console() -> None:
    domain = tree(ports=(("com1", Path("/s/a")),), console=Path("/c"))
    assert [serial.get("type") for serial in domain.iter("serial")] == ["unix"]


def test_a_port_below_one_that_is_used_leads_nowhere() -> None:
    domain = tree(ports=(("com3", Path("/s/a")),))
    assert [serial.get("type") for serial in domain.iter("serial")] == ["null", "null", "unix"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "../../etc"}, "can't be a domain's name"),
        ({"name": "a/b"}, "can't be a domain's name"),
        ({"name": "a,b"}, "can't be a domain's name"),
        ({"name": "-rf"}, "can't be a domain's name"),
        ({"name": ""}, "can't be a domain's name"),
        ({"name": "a\n"}, "can't be a domain's name"),
        ({"name": "a" * 65}, "can't be a domain's name"),
        ({"ports": (("virtio:../x", Path("/s")),)}, "is no port"),
        ({"ports": (("com5", Path("/s")),)}, "is no port"),
        ({"ports": (("com1\n", Path("/s")),)}, "is no port"),
        ({"ports": (("com1", Path("/a")), ("com1", Path("/b")))}, "used twice"),
        ({"ports": (("com1", Path("/" + "a" * 107)),)}, "too long for a socket"),
        ({"ports": (("com1", Path("/" + "ä" * 54)),)}, "too long for a socket"),
        ({"firmware": "uefi"}, "needs a file for its variables"),
        ({"network": "a\0b"}, "libvirt can't be told"),
        ({"cmdline": "a\rb"}, "libvirt can't be told"),
        ({"network": "a\x1bb"}, "libvirt can't be told"),
        ({"cmdline": "a\ufffeb"}, "libvirt can't be told"),
        ({"disk": Path(os.fsdecode(b"/runs/\xff"))}, "libvirt can't be told"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        spec(**settings)


def test_the_longest_socket_is_taken() -> None:
    spec(ports=(("com1", Path("/" + "a" * 106)),))


# "user" is QEMU's own network, no name; Hypothesis tries the strings that it finds in our code, too.
@given(hostile=st.text(min_size=1).filter(lambda text: text != "user"))
def test_no_text_becomes_more_than_a_text(hostile: str) -> None:
    plain = tree(network="x", cmdline="x", kernel=Path("/x"), cdrom=Path("/x"))
    path = Path("/" + hostile.replace("/", "_"))
    try:
        domain = tree(network=hostile, cmdline=hostile, kernel=path, cdrom=path)
    except ConfigError:
        return
    assert [element.tag for element in domain.iter()] == [element.tag for element in plain.iter()]
    source = domain.find("devices/interface/source")
    assert source is not None
    assert source.attrib == {"network": hostile}
    assert domain.findtext("os/kernel") == str(path)


def test_an_installation_s_first_cd_is_booted_while_the_disk_can_t_be() -> None:
    domain = tree(media=(Path("/iso/windows"), Path("/iso/ours")), bus="sata")
    found = [
        (
            disk.get("device"),
            disk.find("target").get("dev"),  # type: ignore[union-attr]
            disk.find("source").get("file"),  # type: ignore[union-attr]
            boot.get("order") if (boot := disk.find("boot")) is not None else None,
        )
        for disk in domain.iter("disk")
    ]
    assert found == [
        ("disk", "sda", "/runs/disk.qcow2", "1"),
        ("cdrom", "sdb", "/iso/windows", "2"),
        ("cdrom", "sdc", "/iso/ours", None),
    ]
    assert not list(tree(cdrom=Path("/iso/a.iso")).iter("boot"))


def test_an_enlightenment_is_named_for_libvirt() -> None:
    hyperv = tree(accelerator="kvm", enlightenments=("relaxed", "spinlocks")).find(
        "features/hyperv"
    )
    assert hyperv is not None
    assert [(e.tag, e.get("state"), e.get("retries")) for e in hyperv] == [
        ("relaxed", "on", None),
        ("spinlocks", "on", "8191"),
    ]
