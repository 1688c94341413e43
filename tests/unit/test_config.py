"""kdriver.toml and [tool.kdriver]: what they set, and what they say when they are wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pytest_kdriver.config import find_root, load_config
from pytest_kdriver.errors import ConfigError
from pytest_kdriver.vm_config import VmSettings, vm_config


def write(folder: Path, text: str, name: str = "kdriver.toml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_nothing_set_is_the_defaults(tmp_path: Path) -> None:
    config = load_config(tmp_path)
    assert (config.vm, config.isolation, config.manifest, config.timeout) == ((), None, None, 30.0)
    windows = ["win10", "win11", "server2022", "server2025"]
    assert list(config.targets) == ["wine", "winevm", *windows]


def test_all_that_can_be_set(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "Cargo.toml").write_text("")
    config = load_config(
        write(
            tmp_path,
            """
            vm = ["old", "wine"]
            isolation = "test"
            manifest = "d"
            profile = "release"
            timeout = 2
            artifacts = "out"
            [targets.old]
            kind = "wine"
            wine = "/opt/wine"
            without = ["pool"]
            """,
        )
    )
    assert config.vm == ("old", "wine")
    assert config.isolation == "test"
    assert config.manifest == tmp_path / "d" / "Cargo.toml"
    assert (config.profile, config.timeout) == ("release", 2.0)
    assert config.artifacts == tmp_path / "out"
    old = config.target("old")
    assert (old.kind, old.wine, old.without) == ("wine", "/opt/wine", frozenset({"pool"}))


def test_pyproject_has_a_table_for_it(tmp_path: Path) -> None:
    write(tmp_path, '[tool.kdriver]\nvm = "wine"\n', "pyproject.toml")
    assert load_config(tmp_path).vm == ("wine",)


def test_a_pyproject_without_the_table_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, "this is = no toml", "pyproject.toml")
    assert load_config(tmp_path).vm == ()


@pytest.mark.parametrize("where", ["Cargo.toml", "drivers/Cargo.toml"])
def test_the_usual_manifests_are_found(tmp_path: Path, where: str) -> None:
    (tmp_path / "drivers").mkdir()
    write(tmp_path, "", where)
    assert load_config(tmp_path).manifest == tmp_path / where


def test_the_root_is_the_nearest_folder_with_a_config(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    assert find_root(deep) == deep
    write(tmp_path, "")
    assert find_root(deep) == tmp_path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "vmm = 'wine'",
            r"kdriver.toml: kdriver: unknown key 'vmm' \(did you mean 'vm'\?\); allowed: vm, ",
        ),
        ("vm = 1", "vm is 1; allowed: a string, or a list of strings"),
        ("vm = 'win7'", "no target 'win7'.*; there are: .*wine"),
        ("isolation = 'tests'", "isolation is 'tests'; allowed: test, module, session, none"),
        ("timeout = 0", "timeout is 0; allowed: seconds, more than 0"),
        ("timeout = true", "timeout is True"),
        ("profile = 1", "profile is 1; allowed: a string"),
        ("manifest = 'nope'", "manifest 'nope': there is no "),
        ("targets = 1", r"targets is no table; write \[targets.NAME\]"),
        ("targets.x = 1", r"targets.x is no table; write \[targets.x\]"),
        ("[targets.x]\n", "targets.x: kind is None; allowed: wine"),
        ("[targets.x]\nkind='vmware'", "targets.x: kind is 'vmware'; allowed: wine"),
        ("[targets.wine]\nwhithout=[]", "unknown key 'whithout' .did you mean 'without'"),
        ("[targets.wine]\nwithout=['fly']", "without is 'fly'; allowed: kernel-log, "),
        ("vm = ", "kdriver.toml: "),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_a_file_that_is_no_text_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "kdriver.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="kdriver.toml"):
        load_config(tmp_path)


def test_an_unknown_target_is_told_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no target 'wne' \(did you mean 'wine'\?\); there are: .*wine"
    ):
        load_config(tmp_path).target("wne")


def test_a_virtual_machine_is_what_the_recipe_says_unless_the_config_does(tmp_path: Path) -> None:
    (tmp_path / "kdriver.toml").write_text(
        """
        [targets.mine]
        kind = "libvirt"
        disk = "disks/mine.qcow2"
        agent = "ssh"
        agent_port = 2222
        memory = 4096
        without = ["snapshots"]
        """
    )
    target = load_config(tmp_path).target("mine")
    machine = vm_config({"memory": 512, "cpus": 2, "bus": "sata"}, target.vm)
    assert (machine.memory, machine.cpus, machine.bus) == (4096, 2, "sata")
    assert machine.disk == tmp_path / "disks" / "mine.qcow2"
    assert (machine.agent, machine.tcp_port) == ("ssh", 2222)
    assert machine.uri == "qemu:///session"
    assert target.without == {"snapshots"}


def test_winevm_needs_no_config_and_takes_some(tmp_path: Path) -> None:
    assert load_config(tmp_path).target("winevm").vm == {"image": "winevm"}
    (tmp_path / "kdriver.toml").write_text("[targets.winevm]\ncpus = 2")
    assert load_config(tmp_path).target("winevm").vm == {"image": "winevm", "cpus": 2}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("", "one of disk and image is needed, and only one"),
        ("disk = 'a'\nimage = 'b'", "one of disk and image is needed, and only one"),
        ("image = '../../etc'", "image is '../../etc'; allowed: the name of a disk image"),
        ('disk = "a\\u0000b"', "disk is"),
        ("disk = 'a'\nnetwork = \"x'/><evil\"", "network is"),
        ("disk = 'a'\nkernel_log = 'x'", "kernel_log is 'x'; allowed: kd, text, wine-trace, none"),
        ("disk = 'a'\nkernel_log_port = 'virtio:../x'", "kernel_log_port is"),
        ("disk = 'a'\nagent_port = 'com5'", "agent_port is 'com5'; allowed: \"virtio:NAME\""),
        (f"disk = 'a'\nagent_port = 'virtio:{'x' * 32}'", "at most 31 characters"),
        ("disk = 'a'\nagent = 'ssh'\nagent_port = 'com1'", "for ssh it is a TCP port"),
        ("disk = 'a'\nagent = 'serial'\nagent_port = 22", "agent_port is 22"),
        ("disk = 'a'\nagent = 'ssh'\nnetwork = 'lan'", "agent ssh needs network 'user'"),
        ("disk = 'a'\nagent = 'winrm'\nnetwork = 'lan'", "agent winrm needs network 'user'"),
        ("disk = 'a'\nagent = 'winrm'\nagent_port = 'com1'", "for winrm it is a TCP port"),
        ("disk = 'a'\nwinrm_password = 'secret'", "unknown key 'winrm_password'"),
        ("disk = 'a'\nagent_port = 70000", "agent_port is 70000; allowed: a TCP port"),
        ("disk = 'a'\nmemory = true", "memory is True; allowed: MiB, 64 to"),
        ("disk = 'a'\ncpus = 0", "cpus is 0; allowed: a number, 1 to 64"),
        ("disk = 'a'\nboot_timeout = 0", "boot_timeout is 0; allowed: seconds, more than 0"),
        ("disk = 'a'\ntpm = 'yes'", "tpm is 'yes'; allowed: true, false"),
        ("disk = 'a'\nmemry = 1", "unknown key 'memry' (did you mean 'memory'?)"),
    ],
)
def test_a_machine_that_can_t_be_is_told(tmp_path: Path, settings: str, told: str) -> None:
    (tmp_path / "kdriver.toml").write_text(f"[targets.mine]\nkind = 'libvirt'\n{settings}")
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "settings", "told"),
    [
        ({}, {"agent_port": 22}, "agent is 'serial', agent_port 22; allowed: \"virtio:NAME\""),
        (
            {"kernel_log": "wine-trace", "kernel_log_port": "com2"},
            {"agent_port": "com2"},
            "agent_port and kernel_log_port are both 'com2'; each needs its own",
        ),
        (
            {"agent": "ssh"},
            {"network": "lab"},
            "agent is 'ssh', network 'lab'; agent ssh needs network 'user'",
        ),
        ({"agent": "ssh"}, {"nic": "none"}, "agent is 'ssh', nic 'none'"),
        ({"nic": "none"}, {"agent": "winrm"}, "agent is 'winrm', nic 'none'"),
    ],
)
def test_a_config_and_a_recipe_that_contradict_each_other_are_told(
    recipe: VmSettings, settings: VmSettings, told: str
) -> None:
    with pytest.raises(ConfigError, match=rf"targets\.mine: {re.escape(told)}"):
        vm_config(recipe, settings, where="targets.mine")


@pytest.mark.parametrize(
    "settings",
    [
        {"agent": "ssh", "agent_port": 2222},
        {"agent": "ssh", "kernel_log": "wine-trace", "kernel_log_port": "com1"},
        {"agent_port": "virtio:kdriver.trace"},  # there is no log
        {"agent_port": f"virtio:_{'x' * 30}", "network": "lab", "nic": "none"},
    ],
)
def test_settings_that_contradict_nothing_are_taken(settings: VmSettings) -> None:
    assert vm_config(settings).cpus == 1


@pytest.mark.parametrize(
    ("settings", "port"),
    [
        ({"agent_port": "com1"}, None),
        ({"agent": "ssh", "agent_port": "com1"}, 22),
        ({"agent": "winrm", "agent_port": "com1"}, 5986),
        ({"agent": "winrm", "winrm_https": False}, 5985),
        ({"agent": "winrm", "agent_port": 8080}, 8080),
    ],
)
def test_the_port_of_an_agent_is_that_of_its_way(settings: VmSettings, port: int | None) -> None:
    """A recipe's may be of another way than the config's."""
    assert vm_config(settings).tcp_port == port


def test_a_target_s_name_can_t_escape(tmp_path: Path) -> None:
    (tmp_path / "kdriver.toml").write_text("[targets.'../x']\nkind = 'wine'")
    with pytest.raises(ConfigError, match="a target's name is letters"):
        load_config(tmp_path)
