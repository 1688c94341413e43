r"""What can be said of an existing machine, in ``[targets.NAME]`` with ``kind = "remote"``.

::

    host = "lab.example"        # its name or address
    user = "tester"             # an administrator there
    port = 22                   # the TCP port of its SSH server
    ssh_key = "path"            # a private key's file; else ssh-agent's keys
    ssh_known_hosts = "path"    # where its host key stands; else the user's own file
    agent_path = 'C:\kdriver\kdagent.exe'   # the agent goes there, its hash behind its name
    ssh_command = "{agent}"     # what starts it; {agent} is where it is
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
from typing import Final, TypeAlias, cast

from pytest_kdriver.errors import ConfigError

DEFAULT_AGENT_PATH: Final = r"C:\kdriver\kdagent.exe"
DEFAULT_TIMEOUT: Final = 60.0
AGENT_PLACE: Final = "{agent}"
"""Stands in ``ssh_command`` for the agent's path."""

_AGENT_PATH: Final = re.compile(r"(?:[A-Za-z]:\\|/)[\w.\\/+-]*\w\.exe", re.ASCII)
"""No blanks: each shell that may be there (cmd.exe, PowerShell) has quotes of its own."""

_HOST: Final = re.compile(r"[\w.:-]{1,255}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteConfig:
    """An existing machine, defaults filled in."""

    host: str
    user: str
    port: int = 22
    ssh_key: Path | None = None
    ssh_known_hosts: Path | None = None
    agent_path: str = DEFAULT_AGENT_PATH
    ssh_command: str = AGENT_PLACE
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
    return RemoteConfig(**settings)  # type: ignore[arg-type]  # each was checked


class _Refused(Exception):
    """A value that can't be; the message says what can."""


_Check: TypeAlias = Callable[[object, Path], object]
_NEEDED: Final = {
    "host": "the machine's name or address",
    "user": "an administrator of the machine",
}


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
    "port": _port,
    "ssh_key": _path,
    "ssh_known_hosts": _path,
    "agent_path": _matching(
        _AGENT_PATH,
        r"a full path of that machine to a .exe, without blanks, as C:\kdriver\kdagent.exe",
    ),
    "ssh_command": _command,
    "timeout": _seconds,
}

REMOTE_KEYS: Final = tuple(_CHECKS)
