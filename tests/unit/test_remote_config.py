"""``[targets.NAME]`` of the kind remote: what it sets, and what it says when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_kdriver.config import load_config
from pytest_kdriver.errors import ConfigError
from pytest_kdriver.remote_config import RemoteConfig


def remote(folder: Path, text: str) -> RemoteConfig:
    (folder / "kdriver.toml").write_text(f'[targets.lab]\nkind = "remote"\n{text}\n')
    config = load_config(folder).target("lab").remote
    assert config is not None
    return config


def test_host_and_user_are_enough(tmp_path: Path) -> None:
    assert remote(tmp_path, 'host = "lab"\nuser = "tester"') == RemoteConfig(
        host="lab",
        user="tester",
        via="ssh",
        port=None,
        ssh_key=None,
        ssh_known_hosts=None,
        ssh_command="{agent}",
        https=True,
        ca=None,
        basic=False,
        winrm_command="{agent}",
        agent_path=r"C:\kdriver\kdagent.exe",
        timeout=60.0,
    )


def test_all_that_can_be_set_of_winrm(tmp_path: Path) -> None:
    config = remote(
        tmp_path,
        """
        host = "lab"
        user = "tester"
        via = "winrm"
        port = 443
        https = true
        ca = "lab.pem"
        basic = true
        winrm_command = "psexec -s {agent}"
        """,
    )
    assert config == RemoteConfig(
        host="lab",
        user="tester",
        via="winrm",
        port=443,
        https=True,
        ca=tmp_path / "lab.pem",
        basic=True,
        winrm_command="psexec -s {agent}",
    )


def test_all_that_can_be_set(tmp_path: Path) -> None:
    config = remote(
        tmp_path,
        r"""
        host = "fe80::1"
        user = 'DOMAIN\tester'
        port = 2222
        ssh_key = "keys/lab"
        ssh_known_hosts = "known_hosts"
        agent_path = 'D:\tools\agent.exe'
        ssh_command = "psexec -s {agent}"
        timeout = 5
        """,
    )
    assert config == RemoteConfig(
        host="fe80::1",
        user=r"DOMAIN\tester",
        port=2222,
        ssh_key=tmp_path / "keys" / "lab",
        ssh_known_hosts=tmp_path / "known_hosts",
        agent_path=r"D:\tools\agent.exe",
        ssh_command="psexec -s {agent}",
        timeout=5.0,
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('user = "tester"', r"targets\.lab: host is needed: the machine's name or address"),
        ('host = "lab"', r"targets\.lab: user is needed: an administrator of the machine"),
        ('host = "a b"', "host is 'a b'; allowed: a host's name or address"),
        ('user = ""', "user is ''; allowed: a line of text"),
        ("port = 0", "port is 0; allowed: a TCP port, 1 to 65535"),
        ("port = true", "port is True; allowed: a TCP port"),
        ("ssh_key = 7", "ssh_key is 7; allowed: a line of text"),
        (
            "agent_path = 'kdagent.exe'",
            r"agent_path is 'kdagent.exe'; allowed: a full path .*C:\\kdr",
        ),
        (r"agent_path = 'C:\a b\kdagent.exe'", "agent_path is .*without blanks"),
        ('ssh_command = "kdagent"', r"ssh_command is 'kdagent'; allowed: .*\{agent\} where"),
        ('winrm_command = "kdagent"', r"winrm_command is 'kdagent'; allowed: .*\{agent\} where"),
        ('via = "telnet"', "via is 'telnet'; allowed: ssh, winrm"),
        ("https = 1", "https is 1; allowed: true, false"),
        (
            'host = "a"\nuser = "b"\nbasic = true',
            "basic is for via = 'winrm', and this target's is 'ssh'",
        ),
        (
            'host = "a"\nuser = "b"\nvia = "winrm"\nssh_key = "x"',
            "ssh_key is for via = 'ssh', and this target's is 'winrm'",
        ),
        (
            'host = "a"\nuser = "b"\nvia = "winrm"\nbasic = true\nhttps = false',
            "basic needs https, or it would show the password to the network",
        ),
        ("timeout = 0", "timeout is 0; allowed: seconds, more than 0"),
        ('ssh_usr = "x"', "unknown key 'ssh_usr'.*allowed: kind, host, user, via, port"),
        ('password = "x"', "unknown key 'password'"),
        (
            'host = "a"\nuser = "b"\nwithout = ["pol"]',
            "without is 'pol'; allowed: kernel-log, pool",
        ),
    ],
)
def test_what_can_t_be_is_told_with_what_can(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        remote(tmp_path, text)
