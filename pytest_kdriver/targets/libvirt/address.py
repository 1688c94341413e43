"""Where a guest's agent is, in a form that can be written down."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from pytest_kdriver.guest.links.link import Link
from pytest_kdriver.guest.links.serial import SerialLink


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


Address = SerialAddress | SshAddress


def to_json(address: Address) -> dict[str, object]:
    """What ``from_json`` reads."""
    return asdict(address)


def from_json(written: dict[str, object]) -> Address:
    """The address that ``to_json`` wrote."""
    kind = SerialAddress if "path" in written else SshAddress
    return kind(**written)  # type: ignore[arg-type]
