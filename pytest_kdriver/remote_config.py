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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias, cast, get_args

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
    settings: dict[str, object] = {}
    for key, value in table.items():
        try:
            settings[key] = _CHECKS[key](value, folder)
        except _Refused as refused:
            raise ConfigError(f"{where}: {key} is {value!r}; allowed: {refused}") from None
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


class _Refused(Exception):
    """A value that can't be; the message says what can."""


_Check: TypeAlias = Callable[[object, Path], object]
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


def _matching(pattern: re.Pattern[str], words: str) -> _Check:
    def check(value: object, _: Path) -> object:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise _Refused(words)
        return value

    return check


def _text(value: object, _: Path) -> object:
    if not isinstance(value, str) or not value or any(not sign.isprintable() for sign in value):
        raise _Refused("a line of text")
    return value


def _path(value: object, folder: Path) -> object:
    return folder / Path(cast("str", _text(value, folder))).expanduser()


def _port(value: object, _: Path) -> object:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65535:
        raise _Refused("a TCP port, 1 to 65535")
    return value


def _via(value: object, _: Path) -> object:
    if value not in get_args(Via):
        raise _Refused(", ".join(get_args(Via)))
    return value


def _flag(value: object, _: Path) -> object:
    if not isinstance(value, bool):
        raise _Refused("true or false")
    return value


def _command(value: object, folder: Path) -> object:
    if AGENT_PLACE not in cast("str", _text(value, folder)):
        raise _Refused(f"a command with {AGENT_PLACE} where the agent's path belongs")
    return value


def _seconds(value: object, _: Path) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise _Refused("seconds, more than 0")
    return float(value)


_CHECKS: Final[Mapping[str, _Check]] = {
    "host": _matching(_HOST, "a host's name or address"),
    "user": _text,
    "via": _via,
    "port": _port,
    "ssh_key": _path,
    "ssh_known_hosts": _path,
    "ssh_command": _command,
    "https": _flag,
    "ca": _path,
    "basic": _flag,
    "winrm_command": _command,
    "agent_path": _matching(
        _AGENT_PATH,
        r"a full path of that machine to a .exe, without blanks, as C:\kdriver\kdagent.exe",
    ),
    "timeout": _seconds,
}

REMOTE_KEYS: Final = tuple(_CHECKS)
