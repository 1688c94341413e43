"""Virtual machines that live on behind the run that made them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from pytest_kdriver.errors import LinkError, TargetError
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.targets.leftovers import REMOVERS
from pytest_kdriver.targets.libvirt.address import Address, from_json, to_json
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.libvirt.domain import domain_state, screenshot
from pytest_kdriver.targets.runs import kept_runs, remove_kept

_FILE: Final = "vm.json"
CONNECT_TIMEOUT: Final = 10.0
"""Seconds for the agent's first answer: the machine is up, or somebody else is at its port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptVm:
    """A machine that was kept. ``folder`` is its run's, ``console`` a file with what its console said.

    ``listen`` is how its kernel is listened to, which stands still at an exception where nobody does; "" for
    one without a debugger.
    """

    folder: Path
    target: str
    domain: str
    uri: str
    console: str
    address: Address
    listen: str = ""

    def write(self) -> None:
        """Write it down, for ``kept_vms``."""
        written = asdict(self) | {"folder": "", "address": to_json(self.address)}
        file = self.folder / _FILE
        file.touch(mode=0o600)
        file.write_text(json.dumps(written), encoding="utf-8")

    def how_to_reach(self) -> str:
        """The commands for it, in lines."""
        listen = [f"    {self.listen}   is its kernel's debugger"] if self.listen else []
        return "\n".join(
            (
                f"{self.domain} is kept:",
                f"    kdriver vm shell {self.domain}",
                f"    kdriver vm screenshot {self.domain}",
                f"    virsh --connect '{self.uri}' dominfo {self.domain}",
                f"    tail -f {self.console}",
                *listen,
                f"    kdriver vm stop {self.domain}   ends it",
            )
        )

    def connect(self) -> Agent:
        """Its agent. Raises ``TargetError``, and what agents raise."""
        try:
            return Agent.connect(self.address.open(CONNECT_TIMEOUT), timeout=CONNECT_TIMEOUT)
        except (LinkError, TimeoutError) as error:
            raise TargetError(f"{error}; {self._situation()}") from error

    def state(self) -> str:
        """Libvirt's word for its state; "undefined" where libvirt knows it no more."""
        hypervisor = Hypervisor.open(self.uri)
        try:
            return domain_state(hypervisor, self.domain)
        finally:
            hypervisor.close()

    def screenshot(self, path: Path) -> None:
        """Write its screen to ``path``, a PNG. Raises ``TargetError``."""
        hypervisor = Hypervisor.open(self.uri)
        try:
            screenshot(hypervisor, self.domain, path)
        except TargetError as error:
            raise TargetError(f"{error}; {self._situation()}") from error
        finally:
            hypervisor.close()

    def _situation(self) -> str:
        """What libvirt says of it, and what to do, behind an error of its own."""
        try:
            state = self.state()
        except TargetError as error:
            return str(error)
        if state == "running":
            waits = f"; its kernel may wait for its debugger: {self.listen}" if self.listen else ""
            return f"{self.domain} is running{waits}"
        return f"{self.domain} is {state}: kdriver vm stop {self.domain} removes it"

    def remove(self) -> None:
        """End it, and remove all that was made for it. Raises OSError for what must stay."""
        remove_kept(self.folder, REMOVERS)


def kept_vms() -> list[KeptVm]:
    """The machines that were kept, the oldest first."""
    folders = sorted(kept_runs(), key=lambda folder: folder.stat().st_mtime)
    return [vm for folder in folders if (vm := _read(folder)) is not None]


def find_kept(name: str) -> KeptVm:
    """The one kept machine that is called ``name``, or is of the target ``name``. Raises ``TargetError``."""
    vms = kept_vms()
    found = [vm for vm in vms if vm.domain == name] or [vm for vm in vms if vm.target == name]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(vm.domain for vm in found)
        raise TargetError(f"there is more than one machine of the target {name!r}: {names}")
    names = ", ".join(vm.domain for vm in vms)
    there = f"there are: {names}" if names else "there is none: kdriver vm start NAME starts one"
    raise TargetError(f"no machine {name!r} was started or kept; {there}")


def _read(folder: Path) -> KeptVm | None:
    try:
        written = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        address = from_json(written.pop("address"))
        return KeptVm(**written | {"folder": folder, "address": address})
    except (OSError, ValueError, TypeError, KeyError):
        return None  # it was not a machine's run, or its owner died while it wrote
