r"""What can be said of an existing machine, in ``[targets.NAME]`` with ``kind = "remote"``.

::

    host = "lab.example"        # its name or address
    user = "tester"             # an administrator there
    via = "ssh"                 # "ssh" | "winrm"
    port = 22                   # the TCP port of its server; of WinRM's 5986, or 5985 without https
    ssh_key = "path"            # a private key's file; else ssh-agent's keys
    ssh_known_hosts = "path"    # where its host key stands; else the user's own file
    ssh_command = "{agent}"     # what starts the agent; {agent} is where it is
    https = true                # of WinRM; without it NTLM encrypts each message
    ca = "path"                 # certificates that WinRM's server is trusted by; else the system's
    basic = false               # WinRM by Basic authentication, over HTTPS alone; else by NTLM
    winrm_command = "{agent}"   # as ssh_command
    agent_path = 'C:\kdriver\kdagent.exe'   # the agent goes there, its hash behind its name
    timeout = 60                # seconds from the first attempt to the agent's answer
    without = ["programs"]      # capabilities it shall not have

A password comes from the environment, ``KDRIVER_PASSWORD_`` and the target's name in capitals. Paths of this
host are relative to the file that they stand in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias, cast, get_args

from pytest_kdriver.config_values import (
    Check,
    Refused,
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

DEFAULT_AGENT_PATH: Final = r"C:\kdriver\kdagent.exe"
DEFAULT_TIMEOUT: Final = 60.0
AGENT_PLACE: Final = "{agent}"
"""Stands in a command for the agent's path."""

Via: TypeAlias = Literal["ssh", "winrm"]

_AGENT_PATH: Final = re.compile(r"(?:[A-Za-z]:\\|/)[\w.\\/+-]*\w\.exe", re.ASCII)
"""No blanks: each shell that may be there (cmd.exe, PowerShell) has quotes of its own."""

_HOST: Final = re.compile(r"[\w.:-]{1,255}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteConfig:
    """An existing machine, defaults filled in. ``port`` None is the usual one."""

    host: str
    user: str
    via: Via = "ssh"
    port: int | None = None
    ssh_key: Path | None = None
    ssh_known_hosts: Path | None = None
    ssh_command: str = AGENT_PLACE
    https: bool = True
    ca: Path | None = None
    basic: bool = False
    winrm_command: str = AGENT_PLACE
    agent_path: str = DEFAULT_AGENT_PATH
    timeout: float = DEFAULT_TIMEOUT


def parse_remote(table: Mapping[str, object], where: str, folder: Path) -> RemoteConfig:
    """The machine that ``table`` describes. Raises ``ConfigError``.

    ``where`` says what is being read, ``folder`` what paths are relative to.
    """
    settings = check_values(table, _CHECKS, where, folder)
    for key in ("host", "user"):
        if key not in settings:
            raise ConfigError(f"{where}: {key} is needed: {_NEEDED[key]}")
    via = settings.get("via", "ssh")
    for key, its in _VIA.items():
        if key in settings and its != via:
            raise ConfigError(f"{where}: {key} is for via = {its!r}, and this target's is {via!r}")
    if settings.get("basic") and not settings.get("https", True):
        raise ConfigError(
            f"{where}: basic needs https, or it would show the password to the network"
        )
    return RemoteConfig(**settings)  # type: ignore[arg-type]  # each was checked


_NEEDED: Final = {
    "host": "the machine's name or address",
    "user": "an administrator of the machine",
}
_VIA: Final[Mapping[str, Via]] = {
    "ssh_key": "ssh",
    "ssh_known_hosts": "ssh",
    "ssh_command": "ssh",
    "https": "winrm",
    "ca": "winrm",
    "basic": "winrm",
    "winrm_command": "winrm",
}
"""The keys that are for one way alone."""


def _command(value: object, folder: Path) -> object:
    if AGENT_PLACE not in cast("str", text(value, folder)):
        raise Refused(f"a command with {AGENT_PLACE} where the agent's path belongs")
    return value


_CHECKS: Final[Mapping[str, Check]] = {
    "host": matching(_HOST, "a host's name or address"),
    "user": text,
    "via": one_of(*get_args(Via)),
    "port": tcp_port,
    "ssh_key": path,
    "ssh_known_hosts": path,
    "ssh_command": _command,
    "https": flag,
    "ca": path,
    "basic": flag,
    "winrm_command": _command,
    "agent_path": matching(
        _AGENT_PATH,
        r"a full path of that machine to a .exe, without blanks, as C:\kdriver\kdagent.exe",
    ),
    "timeout": seconds,
}

REMOTE_KEYS: Final = tuple(_CHECKS)
