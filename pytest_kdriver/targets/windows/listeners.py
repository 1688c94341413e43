"""WinRM in a Windows: what it listens to, by which certificate, and that it is reached.

Not verified on Windows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pytest_kdriver.errors import AgentError, TargetError
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.targets.machine import FOLDER
from pytest_kdriver.targets.windows.kinds import Reading, run
from pytest_kdriver.win32error import Win32Error

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

LISTENER: Final = r"SOFTWARE\Microsoft\Windows\CurrentVersion\WSMAN\Listener"
"""Where WinRM keeps its listeners, each by its address and transport."""

PORTS: Final = {"HTTP": 5985, "HTTPS": 5986}
NETSH_RULE: Final = ("netsh.exe", "advfirewall", "firewall")
RULE: Final = "kdriver-winrm"


@dataclass(frozen=True, slots=True)
class FirewallRule:
    """That WinRM's ports are open, whatever Windows takes the network for."""

    name: str = "firewall rule"

    def make(self, agent: Agent) -> None:
        """See ``Setting``. A rule of this name that is there already goes first: netsh would add another."""
        rule = (*NETSH_RULE, "delete", "rule", f"name={RULE}")
        run(agent, rule, accept=(0, 1))
        ports = ",".join(map(str, PORTS.values()))
        opened = ("dir=in", "action=allow", "protocol=TCP", f"localport={ports}", "profile=any")
        run(agent, (*NETSH_RULE, "add", "rule", f"name={RULE}", *opened))

    def read(self, agent: Agent) -> Reading:
        """See ``Setting``. netsh ends with 1 where there is none; of its table only the ports count."""
        done = run(agent, (*NETSH_RULE, "show", "rule", f"name={RULE}"), accept=(0, 1))
        shown = done.stdout.decode(errors="replace") if done.exit_code == 0 else ""
        open_ports = [port for port in map(str, PORTS.values()) if re.search(rf"\b{port}\b", shown)]
        return Reading(
            name=self.name,
            wanted="TCP " + ", ".join(map(str, PORTS.values())),
            found=f"TCP {', '.join(open_ports)}" if open_ports else "no such rule",
            in_force=len(open_ports) == len(PORTS),
        )


@dataclass(frozen=True, slots=True)
class Listeners:
    """That WinRM listens, by HTTP, and by HTTPS where there is a certificate for it."""

    certificate: bytes | None = field(repr=False)
    name: str = "WinRM listeners"

    def make(self, agent: Agent) -> None:
        """See ``Setting``. The service has to run for it."""
        code = agent.start_service("WinRM")
        if code not in (Win32Error.ERROR_SUCCESS, Win32Error.ERROR_SERVICE_ALREADY_RUNNING):
            raise AgentError("WinRM does not start", operation="start_service", code=code)
        if self.certificate is not None:
            pfx = f"{FOLDER}\\winrm.pfx"
            agent.put(self.certificate, pfx)
            try:
                run(agent, ["certutil.exe", "-f", "-p", "", "-importpfx", pfx])
            finally:
                agent.delete(pfx)
        # winrm is a batch file, whose arguments have quotes that CommandLineToArgvW would not leave alone.
        script = f"{FOLDER}\\listeners.cmd"
        agent.put(self._script().encode(), script)
        run(agent, ["cmd.exe", "/c", script])
        agent.delete(script)

    def _script(self) -> str:
        lines = ["@echo off"]
        for transport in self._transports():
            listener = f"winrm/config/Listener?Address=*+Transport={transport}"
            lines.append(f"call winrm delete {listener} >nul 2>nul")
            if transport == "HTTPS" and self.certificate is not None:
                name = common_name(self.certificate)
                listener += f' @{{Hostname="{name}";CertificateThumbprint="{self._thumbprint()}"}}'
            lines.append(f"call winrm create {listener} || exit /b 1")
        return "".join(f"{line}\r\n" for line in lines)

    def _transports(self) -> tuple[str, ...]:
        return ("HTTP",) if self.certificate is None else ("HTTP", "HTTPS")

    def _thumbprint(self) -> str:
        return "" if self.certificate is None else thumbprint(self.certificate)

    def read(self, agent: Agent) -> Reading:
        """See ``Setting``. Where the service keeps its configuration."""
        wanted, found, in_force = [], [], True
        for transport in self._transports():
            key = f"{LISTENER}\\*+{transport}"
            port, ours = agent.get_value(key, "Port"), PORTS[transport]
            wanted.append(f"{transport} {ours}")
            found.append(f"{transport} {port if isinstance(port, int) else 'absent'}")
            in_force = in_force and port == ours
            if transport == "HTTPS":
                held = agent.get_value(key, "certThumbprint")
                held = held.replace(" ", "").upper() if isinstance(held, str) else "no certificate"
                wanted.append(self._thumbprint())
                found.append(held)
                in_force = in_force and held == self._thumbprint()
        return Reading(
            name=self.name, wanted=", ".join(wanted), found=", ".join(found), in_force=in_force
        )


def thumbprint(pfx: bytes) -> str:
    """How Windows names the certificate of a PFX without a password: its SHA-1, in capitals.

    ``TargetError`` without the package cryptography; ``ValueError`` for what is no such PFX.
    """
    certificate = _certificate(pfx)
    from cryptography.hazmat.primitives.hashes import SHA1

    return certificate.fingerprint(SHA1()).hex().upper()  # noqa: S303 -- that is its name


def common_name(pfx: bytes) -> str:
    """The host that a PFX's certificate is for, which a listener has to name. Raises as ``thumbprint``."""
    certificate = _certificate(pfx)
    from cryptography.x509.oid import NameOID

    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1 or not re.fullmatch(r"[\w.-]+", str(names[0].value)):
        raise ValueError(f"the certificate is of {certificate.subject.rfc4514_string()!r}, no host")
    return str(names[0].value)


def _certificate(pfx: bytes) -> Certificate:
    try:
        from cryptography.hazmat.primitives.serialization.pkcs12 import load_pkcs12
    except ImportError:
        raise TargetError(
            "WinRM's certificate takes a package: pip install 'pytest-kdriver[signing]'"
        ) from None
    held = load_pkcs12(pfx, None).cert
    if held is None:
        raise ValueError("the PFX has no certificate")
    return held.certificate
