"""Where a guest's agent is, in a form that can be written down."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from pytest_kdriver.errors import LinkError
from pytest_kdriver.guest.links.link import Link
from pytest_kdriver.guest.links.serial import SerialLink


class NotLetInError(LinkError):
    """A server is up, and does not let us in or start an agent: to ask again is no use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SerialAddress:
    """The Unix socket of a machine's port."""

    path: str

    def open(self, timeout: float) -> Link:
        """A link to the agent. Raises ``LinkError``, ``TimeoutError``."""
        return SerialLink(Path(self.path), timeout=timeout)


@dataclass(frozen=True, slots=True, kw_only=True)
class SshAddress:
    """An SSH server, at a port of 127.0.0.1 that leads to it.

    ``password_variable`` is the environment's that has the password; the password is written nowhere.
    """

    port: int
    user: str
    key: str | None
    known_hosts: str | None
    host_key_alias: str
    command: str
    password_variable: str

    def open(self, timeout: float) -> Link:
        """A link to an agent that is started for it. Raises ``LinkError``, ``TimeoutError``."""
        from pytest_kdriver.guest.links.ssh import SshConfig, SshLink

        config = SshConfig(
            host="127.0.0.1",
            port=self.port,
            user=self.user,
            key=Path(self.key) if self.key is not None else None,
            password=os.environ.get(self.password_variable),
            known_hosts=Path(self.known_hosts) if self.known_hosts is not None else None,
            host_key_alias=self.host_key_alias,
        )
        return SshLink(config, self.command, timeout=timeout)


@dataclass(frozen=True, slots=True, kw_only=True)
class WinrmAddress:
    """A WinRM server, at a port of 127.0.0.1 that leads to it.

    The password is that of the environment's ``password_variable``, else the line in ``password_file``.
    """

    port: int
    user: str
    password_file: str | None
    https: bool
    ca: str | None
    command: str
    password_variable: str

    def open(self, timeout: float) -> Link:
        """A link to an agent that is started for it. Raises ``LinkError``, ``TimeoutError``.

        ``NotLetInError`` where a second attempt would end as this one: of wrong ones Windows counts how many
        there were, and locks the user out.
        """
        from pytest_kdriver.guest.links.winrm import WinrmConfig, WinrmServerDown, open_agent

        config = WinrmConfig(
            host="127.0.0.1",
            port=self.port,
            user=self.user,
            password=os.environ.get(self.password_variable) or self._read_password(),
            https=self.https,
            ca=Path(self.ca) if self.ca is not None else None,
        )
        try:
            return open_agent(config, self.command, timeout=timeout)
        except WinrmServerDown:
            raise
        except LinkError as error:
            raise NotLetInError(str(error)) from None

    def _read_password(self) -> str:
        """``NotLetInError`` for a file that others may read, or that can't be."""
        if self.password_file is None:
            raise NotLetInError(f"WinRM needs a password: set {self.password_variable}")
        path = Path(self.password_file)
        try:
            if path.stat().st_mode & 0o077:
                raise NotLetInError(f"others may read the file with the password: chmod 600 {path}")
            return path.read_text(encoding="utf-8", errors="replace").rstrip("\n")
        except OSError as error:
            raise NotLetInError(
                f"the password can't be read from {path}: {error.strerror}"
            ) from error


Address = SerialAddress | SshAddress | WinrmAddress


def to_json(address: Address) -> dict[str, object]:
    """What ``from_json`` reads."""
    return asdict(address)


def from_json(written: dict[str, object]) -> Address:
    """The address that ``to_json`` wrote."""
    kind: type[Address] = WinrmAddress
    if "path" in written:
        kind = SerialAddress
    elif "key" in written:
        kind = SshAddress
    return kind(**written)  # type: ignore[arg-type]
